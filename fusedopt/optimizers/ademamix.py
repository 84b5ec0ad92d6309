"""AdEMAMix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.ademamix import ademamix
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdEMAMix(FusedOptimizer):
    """AdEMAMix: AdamW with a second, slow momentum.

    Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", arXiv:2409.03137. State
    per parameter: `step` (float32, 0-d), `exp_avg`, `exp_avg_slow` and `exp_avg_sq`, of the parameter's
    shape.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0.
        betas: Decay of the fast momentum, of the second moment and of the slow momentum, each in [0, 1).
        alpha: Weight of the slow momentum, >= 0.
        t_alpha: Steps over which alpha grows linearly from 0; None does not schedule it.
        t_beta3: Steps over which the slow momentum's decay grows from betas[0]; None does not schedule it.
            The paper takes the length of the training for both.
        eps: Added to the denominator, >= 0.
        weight_decay: Decoupled weight decay, >= 0, multiplied by lr.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("exp_avg"), StateSpec("exp_avg_slow"), StateSpec("exp_avg_sq", is_signed=False))
    REFERENCES: ClassVar[dict[str, Reference]] = {"ademamix": ademamix}
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "ademamix": {},
        "ademamix_8bit": {"state_dtype": "8bit"},
        "paged_ademamix_32bit": {"state_device": "cpu"},
        "paged_ademamix_8bit": {"state_dtype": "8bit", "state_device": "cpu"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params,
            defaults,
            **options,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.betas(group["betas"], (0.9, 0.999, 0.9999))
        checks.nonnegative("alpha", group["alpha"])
        for name in ("t_alpha", "t_beta3"):
            if group[name] is not None and checks.nonnegative(name, group[name]) == 0:
                raise ValueError(
                    f"{name}=0 is no length of a schedule; pass a number of steps, or None for no schedule"
                )
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])

    def rule(self, group: dict[str, Any]) -> str:
        return "ademamix"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2, beta3 = group["betas"]
        return {
            "lr": checks.number("lr", group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "beta3": float(beta3),
            "alpha": float(group["alpha"]),
            "t_alpha": float(group["t_alpha"] or 0),
            "t_beta3": float(group["t_beta3"] or 0),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }
