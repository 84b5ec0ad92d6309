"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.sgd import sgd
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(FusedOptimizer):
    """Stochastic gradient descent, a drop-in for `torch.optim.SGD`.

    Momentum: Polyak, 1964; Nesterov's in the form of Sutskever et al., ICML 2013. State per parameter: `step`
    (float32, 0-d) and, with momentum, `momentum_buffer` of the parameter's shape.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor.
        momentum: Momentum, >= 0.
        dampening: Dampening of the gradient in the momentum, from the second step on.
        weight_decay: L2 penalty added to the gradient, >= 0.
        nesterov: Nesterov's momentum; needs momentum and no dampening.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("momentum_buffer"),)
    takes_sparse = True
    begins_in_first_step = True
    REFERENCES: ClassVar[dict[str, Reference]] = {
        "sgd": sgd,
        "sgd_momentum": sgd,
        "sgd_nesterov": partial(sgd, nesterov=True),
    }
    USUAL_LR = (1e-6, 1.0)
    UPDATE_RMS = None
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"sgd": {}}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(
            params,
            defaults,
            **options,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.nonnegative("momentum", group["momentum"])
        checks.number("dampening", group["dampening"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        if checks.switch("nesterov", group["nesterov"]) and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True needs a momentum and no dampening, and here momentum={group['momentum']!r} and "
                f"dampening={group['dampening']!r}; pass for example momentum=0.9, dampening=0"
            )

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        return self.STATES if group["momentum"] else ()

    def rule(self, group: dict[str, Any]) -> str:
        if group["momentum"] == 0:
            return "sgd"
        return "sgd_nesterov" if group["nesterov"] else "sgd_momentum"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return {
            "lr": checks.number("lr", group["lr"]),
            **{name: float(group[name]) for name in ("momentum", "dampening", "weight_decay")},
        }
