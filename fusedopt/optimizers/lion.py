"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.lion import lion
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(FusedOptimizer):
    """Lion: every weight moves by lr, in the direction of an interpolated momentum's sign.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675. State per parameter:
    `step` (float32, 0-d) and `exp_avg`, of the parameter's shape. A weight whose direction is exactly 0
    moves by its decay only.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; three to ten times smaller than for AdamW, the paper advises.
        betas: Of the direction and of the momentum, each in [0, 1).
        weight_decay: Decoupled weight decay, >= 0, multiplied by lr.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("exp_avg"),)
    REFERENCES: ClassVar[dict[str, Reference]] = {"lion": lion}
    USUAL_LR = (1e-9, 3e-4)
    USUAL_LR_NOTE = "every weight moves by lr in each step, so the paper takes a third to a tenth of AdamW's"
    USUAL_WEIGHT_DECAY = 1.0  # by the same factor larger
    # transformers' Trainer gives Lion the betas of Adam, so its names mean those.
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "lion": {},
        "lion_32bit": {"betas": (0.9, 0.999)},
        "lion_8bit": {"betas": (0.9, 0.999), "state_dtype": "8bit"},
        "paged_lion_32bit": {"betas": (0.9, 0.999), "state_device": "cpu"},
        "paged_lion_8bit": {"betas": (0.9, 0.999), "state_dtype": "8bit", "state_device": "cpu"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            **options,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.betas(group["betas"], (0.9, 0.99))
        checks.nonnegative("weight_decay", group["weight_decay"])

    def rule(self, group: dict[str, Any]) -> str:
        return "lion"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": checks.number("lr", group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "weight_decay": float(group["weight_decay"]),
        }
