"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine import checkpoint
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..engine.sharding import local
from ..reference.adagrad import adagrad
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adagrad(FusedOptimizer):
    """Adagrad, a drop-in for `torch.optim.Adagrad`.

    Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
    12 (2011). State per parameter: `step` (float32, 0-d) and `sum`, of the parameter's shape; made in the
    first step, not by the constructor.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor.
        lr_decay: lr is divided by 1 + lr_decay * (step - 1); >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        initial_accumulator_value: What `sum` begins with, >= 0.
        eps: Added to the denominator, >= 0.
        foreach: Accepted for torch's sake; every step is fused.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("sum", is_signed=False),)
    takes_sparse = True
    REFERENCES: ClassVar[dict[str, Reference]] = {"adagrad": adagrad}
    USUAL_LR = (1e-6, 0.1)
    UPDATE_RMS = None  # it falls with the root of the number of steps
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"adagrad": {}}

    def __init__(  # type: ignore[misc]  # torch takes some of the options by position
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(
            params,
            defaults,
            foreach=foreach,
            **options,
        )

    def share_memory(self) -> None:
        """Moves states to memory that processes share, as torch's.

        States that there are not yet are made first: torch's optimizer has them from the beginning.

        Raises:
            ValueError: A parameter cannot be stepped. Nothing has changed then.
        """
        self.init_state()
        for group in self.param_groups:
            for param in group["params"]:
                held = self.state.get(param, {})
                for key in checkpoint.state_keys(self, group, param, held):
                    if key in held:
                        local(held[key]).share_memory_()  # type: ignore[no-untyped-call]

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            checks.nonnegative(name, group[name])

    def first_value(self, spec: StateSpec, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def rule(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "lr": checks.number("lr", group["lr"]),
            **{name: float(group[name]) for name in ("lr_decay", "eps", "weight_decay")},
        }
