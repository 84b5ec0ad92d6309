"""RMSprop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.rmsprop import rmsprop, rmsprop_centered, rmsprop_centered_momentum, rmsprop_momentum
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CANCELS = "centered RMSprop subtracts two states that nearly cancel"
_MOMENTUM = StateSpec("momentum_buffer")
_PLAIN = (_MOMENTUM, StateSpec("square_avg", is_signed=False))
_CENTERED = (
    _MOMENTUM,
    StateSpec("square_avg", is_signed=False, unquantized=_CANCELS),
    StateSpec("grad_avg", unquantized=_CANCELS),
)


class RMSprop(FusedOptimizer):
    """RMSprop, a drop-in for `torch.optim.RMSprop`.

    Tieleman & Hinton, "Lecture 6.5 - rmsprop", 2012; centered: Graves, arXiv:1308.0850. State per parameter:
    `step` (float32, 0-d), `square_avg`, with momentum `momentum_buffer`, centered `grad_avg`, of the
    parameter's shape. A centered variance below 0, which rounding can make, counts as 0.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor.
        alpha: Decay of the second moment per step, in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        momentum: Momentum, >= 0.
        centered: Divide by an estimate of the variance. Its two averages are never stored in 8 bits: their
            difference would be noise.
        capturable: Accepted for torch's sake.
        foreach: Accepted for torch's sake; every step is fused.
        maximize: Ascend instead of descend.
        differentiable: Must be False.
        **options: As for `FusedOptimizer`.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (*_PLAIN, StateSpec("grad_avg", unquantized=_CANCELS))
    REFERENCES: ClassVar[dict[str, Reference]] = {
        "rmsprop": rmsprop,
        "rmsprop_momentum": rmsprop_momentum,
        "rmsprop_centered": rmsprop_centered,
        "rmsprop_centered_momentum": rmsprop_centered_momentum,
    }
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "rmsprop": {},
        "rmsprop_bnb": {},
        "rmsprop_bnb_32bit": {},
        "rmsprop_8bit": {"state_dtype": "8bit"},
        "rmsprop_bnb_8bit": {"state_dtype": "8bit"},
        "paged_rmsprop": {"state_device": "cpu"},
        "paged_rmsprop_8bit": {"state_dtype": "8bit", "state_device": "cpu"},
    }

    def __init__(  # type: ignore[misc]  # torch takes some of the options by position
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(
            params,
            defaults,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            **options,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.fraction("alpha", group["alpha"])
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        checks.nonnegative("momentum", group["momentum"])
        checks.switch("centered", group["centered"])

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        specs = _CENTERED if group["centered"] else _PLAIN
        return specs if group["momentum"] else specs[1:]

    def rule(self, group: dict[str, Any]) -> str:
        return "rmsprop" + ("_centered" if group["centered"] else "") + ("_momentum" if group["momentum"] else "")

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "lr": checks.number("lr", group["lr"]),
            **{name: float(group[name]) for name in ("alpha", "eps", "weight_decay", "momentum")},
        }
