"""What kernels ask of an optimizer's equation, as csrc/rules/rule.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Normalizing:
    """What a rule adds that divides the gradient by the root of its second moment, and sums over a tensor first.

    Attributes:
        moments: (config, step, machine epsilon of parameters) -> what the rule's `hyper` begins with (normalize.py).
        quotient: (row, derived, g, states, hyper, place, COUNT, WHOLE) -> what takes the gradient's place in a tile;
            None if nothing does, and `update` brings the second moment up to date.
        eps: Which hyperparameter is added to squares.
        second: The state that is the second moment, in float32 and brought up to date before the step unless `update`
            does that; -1 if it is factored into averages over rows and columns.
    """

    moments: Any
    quotient: Any = None
    eps: int = 0
    second: int = -1


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
