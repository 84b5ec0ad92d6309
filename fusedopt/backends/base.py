"""What a backend is, and what the optimizer hands it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .. import _core
from ..reference.asking import Asking, Extent, Result
from ..storage.masters import KEYS
from ..storage.state import StateSpec

# reference(param, grad, *states, step=, **hyper) -> (param, *states), all in the precision it computes in.
# A rule of several layouts has a reference for each; it is also told dtype=, the parameter's as it is stored.
Reference = Callable[..., "tuple[Tensor, ...]"]

# Counts by name, as csrc/core/tensors.h explains and lists them, of parameters by (group, position). A session's groups
# are GroupSteps, everybody else's are param groups.
Health = dict[tuple[int, int], dict[str, int]]
HEALTH_COUNTS = _core.health_counts

# Sums of squares of updates, new weights less old in float32, and of the new weights, as reference/norm.py adds; by
# parameter, as counts.
SquareSums = dict[tuple[int, int], tuple[float, float]]

# The same, for rules that take sums over a whole parameter, of a shard of one; it is also told whole=.
AskingReference = Callable[..., "Asking[tuple[Tensor, ...]]"]
ASKING: dict[str, AskingReference] = {}

# Every compiled rule's equation in plain torch, by the rule's name; FusedOptimizer's subclasses fill it.
REFERENCES: dict[str, Reference] = {}


@dataclass(frozen=True)
class GroupStep:
    """One param group in one step, or those of its parameters whose states have one layout.

    Attributes:
        rule: Name of the compiled rule.
        hyper: The rule's hyperparameters by name.
        states: The rule's states, in its order.
        roundings: How each of them is rounded when stored in 16 or 8 bits.
        seed: Seeds stochastic rounding, a uint32.
        maximize: Whether the gradient is negated.
        rounding: How 16-bit parameters are rounded.
        master: What they keep beside them: None, or one of masters.KEYS.
        skips_blocks: Whether weights stay as they were whose step would not be finite (storage/skipping.py).
        layout: Name of the layout; empty if all parameters have the same.
        param_group: Index of the param group.
        lr: The learning rate, where it is a tensor on the parameters' device; `hyper` has 1 in its place.
    """

    rule: str
    hyper: dict[str, float]
    states: tuple[StateSpec, ...]
    roundings: tuple[str, ...]
    seed: int
    maximize: bool
    rounding: str = "nearest"
    master: str | None = None
    skips_blocks: bool = False
    layout: str = ""
    param_group: int = 0
    lr: Tensor | None = None

    @property
    def takes_sums(self) -> bool:
        """Whether its rule takes sums over a whole parameter."""
        return self.rule in ASKING

    @property
    def master_key(self) -> str:
        """What parameters' state calls their masters; empty if there are none."""
        return "" if self.master is None else KEYS[self.master]


@dataclass(frozen=True)
class Scaling:
    """What all gradients of a step are multiplied by, as tensors that need not be waited for.

    Attributes:
        grad_scale: Gradients are this many times too large.
        found_inf: Not 0 if one is not finite, and the step must not be taken.
        max_grad_norm: Clip to this norm; None does not.
        skip_step_above: Above this norm, or if it is NaN, the step must not be taken; None takes all. Needs a
            max_grad_norm, of infinity if nothing is to be clipped.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    skip_step_above: float | None = None

    @property
    def may_forbid(self) -> bool:
        """Whether a step may turn out to be one that must not be taken."""
        return self.found_inf is not None or self.skip_step_above is not None


class Spread(Protocol):
    """The whole of a sharded parameter."""

    @property
    def extent(self) -> Extent:
        """Its size."""

    @property
    def is_even(self) -> bool:
        """Whether every rank holds an evenly spread run of elements, as compiled backends take them."""

    def matrices(self, held: Tensor) -> int:
        """How many matrices there are in what is held here of it; 0 if it is none."""

    def channel(self, over: str) -> tuple[str, ...]:
        """Where its sums over "rows", "columns" or "all" go: sums of one channel over the same ranks, of () nowhere."""

    @staticmethod
    def sums(asked: Sequence[tuple[Spread, str, Tensor]]) -> list[Tensor]:
        """The sums over all shards of what is here: over their "rows", "columns", or "all" of them."""


# Where the rest of a DTensor is; None if all of it is here.
SpreadOf = Callable[[Tensor], "Spread | None"]

# A parameter of which the rest is elsewhere, over what of it a sum goes, what is here; and a step that asks for sums.
Asked = tuple[Spread, str, Tensor]
Summing = Generator["list[Asked]", "Sequence[Tensor]", Result]


@dataclass(frozen=True)
class ParamStep:
    """One parameter in one step.

    `group` is the index of its GroupStep, `position` its place among the parameters of that. `states` are in the order
    of its group's: a tuple of one tensor each, or of codes and scales. `master` is what a 16-bit parameter keeps
    beside it.
    """

    group: int
    position: int
    param: Tensor
    grad: Tensor
    states: tuple[tuple[Tensor, ...], ...]
    step: Tensor
    master: Tensor | None = None
    # Where the elements of a shard are in the global tensor, in row-major order, for random bits.
    first_index: int = 0
    segment: int = 0  # how many follow each other there as they do here; 0 if all do
    segment_stride: int = 0  # from where one such segment begins to where the next does
    indices: Tensor | None = None  # of each, if they are not as regular as that
    spread: Spread | None = None  # where the rest of it is, if its rule takes sums over all of it


class Session(Protocol):
    """One backend's part in an optimizer's steps: begin, collect and add, square_sums, step.

    Nothing is changed before `step`.
    """

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        """Starts a new step. `positions` are those of a group's parameters in its param group; None for all."""

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        """Takes what it can of a group as it lies, DTensors among it; returns the positions left with a gradient.

        Args:
            group: The index of its GroupStep.
            params: Its parameters.
            state: The optimizer's.
            spread_of: Tells where the rest of a DTensor is, if the group's rule takes sums over all of it.
        """

    def add(self, entry: ParamStep) -> bool:
        """Takes one parameter whose tensors are plain, contiguous and of one shape; False if it cannot."""

    def __len__(self) -> int:
        """How many parameters it has taken in this step."""

    def square_sums(self) -> Tensor:
        """The sums of squares of the gradients taken, by reduction chunk and in list order (float64)."""

    def step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        """Steps what it has taken, each group's gradients times its multiplier; counts the step.

        Args:
            grad_multipliers: Of each group.
            counts_health: Whether to count what goes wrong.
            square_sums: Takes the sums of what was stepped, if it is given.

        Returns:
            If asked for, what was counted of each parameter on the way; else nothing.
        """

    def summing_step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Summing[Health]:
        """The same, together with the steps of other backends: asks for the sums that it needs (rounds.py)."""


class Backend(Protocol):
    """A way to take steps on some kind of tensors."""

    name: str

    def refusal(self, param: Tensor) -> str | None:
        """Why it cannot step this parameter, as a clause; None if it can."""

    def session(self) -> Session:
        """A new session for one optimizer."""
