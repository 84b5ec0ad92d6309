"""StableAdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import AskingReference, Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.stable_adamw import asking_stable_adamw, stable_adamw
from ..storage.masters import KEYS
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableAdamW(FusedOptimizer):
    """StableAdamW, a drop-in for `optimi.StableAdamW`: AdamW with update clipping in place of gradient clipping.

    Wortsman et al., "Stable and low-precision training for large-scale vision-language models", arXiv:2304.13013,
    section 3. Each step divides the learning rate of each parameter by the RMS, over all of it, of the gradient over
    the root of the second moment, where that is above 1: where gradients have grown faster than the second moment has
    learnt of it. State per parameter: `step` (float32, 0-d), `exp_avg` and `exp_avg_sq`, of the parameter's shape, both
    debiased. Everything is computed in float32 whatever is stored; float64 and complex parameters are computed and
    stored in their own precision. A gradient that is not finite anywhere makes all of its parameter's step so.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor.
        betas: Decay of the first and the second moment per step, each in [0, 1).
        weight_decay: Decoupled weight decay, >= 0, times the divided learning rate.
        eps: Added to the denominator, >= 0; the root of the second moment counts as no smaller in the RMS. Below
            2.7e-23 its square is 0 in float32: a weight whose gradients were all 0 then makes its whole tensor NaN.
        decouple_lr: Decay by weight_decay * lr / max_lr instead, so that the decay of a whole learning rate is
            weight_decay itself, as about 1e-5.
        max_lr: The largest learning rate of the schedule, > 0, for decouple_lr; lr by default.
        kahan_sum: True keeps what bfloat16 parameters cannot hold, as ``master_weights="kahan"``; None leaves that to
            master_weights (optimi then does it for all 16-bit parameters).
        foreach: Accepted for optimi's sake; every step is fused.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range, or of no use together with another.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("exp_avg"), StateSpec("exp_avg_sq", is_signed=False))
    REFERENCES: ClassVar[dict[str, Reference]] = {"stable_adamw": stable_adamw}
    ASKING: ClassVar[dict[str, AskingReference]] = {"stable_adamw": asking_stable_adamw}
    takes_sums = True
    # What transformers' Trainer gives it; kahan_sum=None there means that there is a compensation.
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "stable_adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "master_weights": "kahan"}
    }

    def __init__(  # type: ignore[misc]  # optimi takes one of the options by position
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
        decouple_lr: bool = False,
        max_lr: float | None = None,
        kahan_sum: bool | None = None,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        if kahan_sum is not None:
            options = {**options, "master_weights": _compensation(kahan_sum, options)}
        if max_lr is None and decouple_lr is True:
            max_lr = checks.number("lr", lr)
        defaults = {
            **{"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps},
            **{"decouple_lr": decouple_lr, "max_lr": max_lr},
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    @classmethod
    def implied(cls, name: str, given: dict[str, Any]) -> dict[str, Any]:
        implied = super().implied(name, given)
        if given.get("kahan_sum") is None:
            return implied
        return {key: value for key, value in implied.items() if key != "master_weights"}

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.betas(group["betas"], (0.9, 0.99))
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        max_lr = group["max_lr"]
        if checks.flag("decouple_lr", group["decouple_lr"]):
            if max_lr is None or not checks.nonnegative("max_lr", max_lr) > 0:
                raise ValueError(
                    f"max_lr={max_lr!r} with decouple_lr=True, which divides by it; pass the largest learning rate of "
                    "the schedule as max_lr, a number > 0"
                )
        elif max_lr is not None:
            raise ValueError(
                f"max_lr={max_lr!r} without decouple_lr=True, which alone looks at it; pass decouple_lr=True with it, "
                "or leave it out"
            )

    def rule(self, group: dict[str, Any]) -> str:
        return "stable_adamw"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": checks.number("lr", group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "max_lr": float(group["max_lr"]) if group["decouple_lr"] else 1.0,
        }

    # ---- checkpoints of optimi and pytorch_optimizer -----------------------------------------------

    def translated_group(self, group: dict[str, Any]) -> dict[str, Any]:
        if group.get("weight_decouple") is False:  # pytorch_optimizer's
            raise ValueError(
                "weight_decouple=False adds the weight decay to the gradient, which StableAdamW does not do here; pass "
                "weight_decay=0 there, or use Adam"
            )
        group = dict(group)
        if "beta1" in group and "beta2" in group:  # optimi's
            group["betas"] = (group.pop("beta1"), group.pop("beta2"))
        if not group["decouple_lr"]:
            group["max_lr"] = None
        return group

    def translated(self, group: dict[str, Any], param: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        held = {key: value for key, value in held.items() if key not in ("eps_sq", "mean_square")}
        rest = held.pop("kahan_comp", None)
        if isinstance(rest, Tensor) and rest.shape == param.shape and rest.is_floating_point():
            held[KEYS["kahan"]] = rest
        if "exp_avg" in held and "step" not in held and "step" in group:  # which they count in groups
            held["step"] = float(group["step"])
        return held


def _compensation(kahan_sum: bool, options: Mapping[str, Any]) -> str | None:
    """What kahan_sum says of master_weights."""
    wanted = "kahan" if checks.flag("kahan_sum", kahan_sum) else None
    given = options.get("master_weights", wanted)
    if given != wanted:
        raise ValueError(
            f"kahan_sum={kahan_sum!r} and master_weights={given!r} say different things of what is kept beside 16-bit "
            "parameters; pass one of them"
        )
    return wanted
