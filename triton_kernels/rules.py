"""The only list of rules, by the names of csrc/rules/all.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import adafactor, adagrad, adamw, ademamix, lion, rmsprop, sgd


@dataclass(frozen=True)
class Normalizing:
    """What a rule adds whose update takes the gradient over the root of its second moment in place of the gradient.

    Attributes:
        moments: (config, step, machine epsilon of parameters) -> what the rule's `hyper` begins with (normalize.py).
        quotient: (row, derived, g, states, hyper, place, COUNT, WHOLE) -> what takes the gradient's place in a tile.
        eps: Which hyperparameter is added to squares.
        second: The state that is the second moment, in float32 and brought up to date before the step; -1 if that is
            factored into averages over rows and columns.
    """

    moments: Any
    quotient: Any
    eps: int
    second: int


@dataclass(frozen=True)
class Rule:
    """What kernels need of an optimizer.

    Attributes:
        update: (p, g, states, hyper) -> (p, states, root), in float32: the equation. `g` comes multiplied by
            +-(inverse loss scale x clip coefficient), `root` is that of the state `rooted` after the step.
        derive: (config, step) -> hyper, in float64; each result is rounded to float32 once. For a rule that normalizes,
            (config, step, (sum of squared weights, of squared quotients, elements)) -> what follows its moments.
        config: The hyperparameters of a param group, in the order of `derive`.
        states: Names of the states, and whether they have signs.
        hyper: How many numbers `derive` gives.
        rooted: The state whose root `update` has at hand, or -1.
        normalizing: What a rule that normalizes adds; else None.
    """

    update: Any
    derive: Any
    config: tuple[str, ...]
    states: tuple[tuple[str, bool], ...]
    hyper: int
    rooted: int = -1
    normalizing: Normalizing | None = None

    @property
    def signs(self) -> int:
        """The states that have signs, one bit each."""
        return sum(is_signed << k for k, (_, is_signed) in enumerate(self.states))


def _adam(update: Any) -> Rule:
    return Rule(update, adamw.derive, adamw.CONFIG, adamw.STATES, 9, rooted=1)


def _amsgrad(update: Any) -> Rule:
    return Rule(update, adamw.derive, adamw.CONFIG, adamw.STATES_AMSGRAD, 9)


def _rmsprop(update: Any, states: tuple[tuple[str, bool], ...], rooted: int = -1) -> Rule:
    return Rule(update, rmsprop.derive, rmsprop.CONFIG, states, 6, rooted)


def _sgd(update: Any, states: tuple[tuple[str, bool], ...] = sgd.STATES) -> Rule:
    return Rule(update, sgd.derive, sgd.CONFIG, states, 4)


def _adafactor(update: Any, derive: Any, quotient: Any, states: tuple[tuple[str, bool], ...], second: int) -> Rule:
    normalizing = Normalizing(adafactor.moments, quotient, adafactor.EPS, second)
    return Rule(update, derive, adafactor.CONFIG, states, 12, normalizing=normalizing)


RULES = {
    "adamw": _adam(adamw.adamw),
    "adamw_amsgrad": _amsgrad(adamw.adamw_amsgrad),
    "adam": _adam(adamw.adam),
    "adam_amsgrad": _amsgrad(adamw.adam_amsgrad),
    "lion": Rule(lion.lion, lion.derive, lion.CONFIG, lion.STATES, 6),
    "ademamix": Rule(ademamix.ademamix, ademamix.derive, ademamix.CONFIG, ademamix.STATES, 12, rooted=2),
    "rmsprop": _rmsprop(rmsprop.rmsprop, rmsprop.STATES, 0),
    "rmsprop_momentum": _rmsprop(rmsprop.rmsprop_momentum, rmsprop.STATES_MOMENTUM, 1),
    "rmsprop_centered": _rmsprop(rmsprop.rmsprop_centered, rmsprop.STATES_CENTERED),
    "rmsprop_centered_momentum": _rmsprop(rmsprop.rmsprop_centered_momentum, rmsprop.STATES_CENTERED_MOMENTUM),
    "adagrad": Rule(adagrad.adagrad, adagrad.derive, adagrad.CONFIG, adagrad.STATES, 3, rooted=0),
    "sgd": _sgd(sgd.sgd, ()),
    "sgd_momentum": _sgd(sgd.sgd_momentum),
    "sgd_nesterov": _sgd(sgd.sgd_nesterov),
    "adafactor_matrix": _adafactor(adafactor.matrix, adafactor.derive, adafactor.of_matrix, (), -1),
    "adafactor_momentum_matrix": _adafactor(
        adafactor.matrix_momentum, adafactor.derive_momentum, adafactor.of_matrix, adafactor.MOMENTUM, -1
    ),
    "adafactor_vector": _adafactor(adafactor.vector, adafactor.derive, adafactor.of_vector, adafactor.VECTOR, 0),
    "adafactor_momentum_vector": _adafactor(
        adafactor.vector_momentum,
        adafactor.derive_momentum,
        adafactor.of_vector_momentum,
        adafactor.MOMENTUM + adafactor.VECTOR,
        1,
    ),
}
