"""Schedule-free optimizers: an average of the weights takes the place of a learning rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine import sharding
from ..engine.fp32 import full_precision, set_full_precision
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.schedule_free import schedule_free
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Z = StateSpec("z", unquantized="z is the weights themselves, without the average")
_SECOND = StateSpec("exp_avg_sq", is_signed=False)

# What a param group has seen, under the names of the schedulefree package.
_SEEN: dict[str, Any] = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0, "train_mode": True}


class _ScheduleFree(FusedOptimizer):
    """What the three have in common: averages, their weights, and two modes."""

    INTERPOLATION: ClassVar[str] = "betas[0]"  # which argument says how much of a parameter in training is the average
    derives_on_device = False  # the weights of averages are added up from it
    changes_groups = True
    replaces_schedules = True
    why_no_block_is_skipped = "its weight would be missing from the averages of a parameter's other steps"

    # ---- what the equations differ in ------------------------------------------------------------

    def _interpolation(self, group: dict[str, Any]) -> float:
        """How much of a parameter is the average in training mode."""
        return float(group["betas"][0])

    def _moment(self, group: dict[str, Any]) -> tuple[float, float]:
        """Decay of the second moment, and what is added to its root."""
        return float(group["betas"][1]), float(group["eps"])

    def _factor(self, group: dict[str, Any]) -> tuple[float, bool]:
        """What this step's lr is multiplied by, and whether it divides by the second moment."""
        warmup, k = group["warmup_steps"], group["k"]
        return ((k + 1) / warmup if k < warmup else 1.0), True

    # ---- steps -----------------------------------------------------------------------------------

    def own_defaults(self) -> dict[str, Any]:
        return dict(_SEEN)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        checks.nonnegative("weight_lr_power", group["weight_lr_power"])
        checks.number("r", group["r"])
        if not (value := checks.fraction(self.INTERPOLATION, self._interpolation(group))) > 0:
            raise ValueError(
                f"{self.INTERPOLATION}={value!r} leaves no average in the weights; pass a number above 0, such as 0.9"
            )

    def _after(self, group: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """What a group will have seen after the step that comes, and the step's weight in the average."""
        lr = checks.number("lr", group["lr"]) * self._factor(group)[0]
        lr_max = max(lr, group["lr_max"])
        weight = (group["k"] + 1) ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = group["weight_sum"] + weight
        seen = {"k": group["k"] + 1, "weight_sum": weight_sum, "lr_max": lr_max, "scheduled_lr": lr}
        return seen, weight / weight_sum if weight_sum else 0.0

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        seen, average = self._after(group)
        beta2, eps = self._moment(group)
        return {
            "lr": seen["scheduled_lr"],
            "beta1": self._interpolation(group),
            "beta2": beta2,
            "eps": eps,
            "weight_decay": float(group["weight_decay"]),
            "average": average,
            "adaptive": float(self._factor(group)[1]),
        }

    def before_step(self) -> None:
        super().before_step()
        if not all(group["train_mode"] for group in self.param_groups):
            raise ValueError(
                "the weights are the averages that eval() put there, and steps are taken elsewhere; "
                "call the optimizer's train() before step()"
            )

    def after_step(self) -> None:
        for group in self.param_groups:
            group.update(self._after(group)[0])

    # ---- modes -----------------------------------------------------------------------------------

    def eval(self) -> None:
        """Puts the averages in the place of the weights, to evaluate or to save them; `train` undoes it.

        What 16-bit weights cannot hold is rounded to nearest; with ``master_weights`` they hold more.
        """
        self._switch(False)

    def train(self) -> None:
        """Puts the weights back from which steps are taken; does nothing in training mode, in which training begins."""
        self._switch(True)

    @torch.no_grad()
    def _switch(self, trains: bool) -> None:
        with self._lock:
            for group in self.param_groups:
                if group["train_mode"] == trains:
                    continue
                beta = self._interpolation(group)
                share = 1.0 - beta if trains else 1.0 - 1.0 / beta
                for param in dict.fromkeys(group["params"]):
                    z = self.state.get(param, {}).get("z")
                    if z is not None and float(self.state[param]["step"]) > 0:
                        weights = full_precision(self, group, param)
                        z = sharding.local(z).to(weights.dtype)
                        set_full_precision(self, group, param, weights + share * (z - weights))
                group["train_mode"] = trains

    def translated(self, group: dict[str, Any], param: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        if "z" in held and "step" not in held:
            return {**held, "step": float(group["k"])}  # the schedulefree package counts in groups
        return held


class SGDScheduleFree(_ScheduleFree):
    """Schedule-free SGD, a drop-in for `schedulefree.SGDScheduleFree`.

    Defazio et al., "The Road Less Scheduled", arXiv:2405.15682. Evaluate, and save what is to be used, between `eval()`
    and `train()`. Use no schedule; a warmup is inside. State per parameter: `step` (float32, 0-d) and `z`, of the
    parameter's shape, never in 8 bits.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor. Larger than for SGD with momentum, the paper advises.
        momentum: How much of the weights in training is the average, in (0, 1).
        weight_decay: L2 penalty added to the gradient, >= 0.
        warmup_steps: Steps over which lr grows linearly from lr / warmup_steps, >= 0.
        r: Power of the step in the weights of the average; 0 for equal weights.
        weight_lr_power: Power of the largest lr so far in these weights, >= 0.
        foreach: Accepted for the schedulefree package's sake; every step is fused.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (_Z,)
    REFERENCES: ClassVar[dict[str, Reference]] = {"schedule_free_sgd": schedule_free}
    INTERPOLATION = "momentum"
    USUAL_LR = (1e-4, 50.0)
    UPDATE_RMS = None
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"schedule_free_sgd": {}}

    def __init__(  # type: ignore[misc]  # the schedulefree package takes one of the options by position
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            **{"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "warmup_steps": warmup_steps},
            **{"r": r, "weight_lr_power": weight_lr_power},
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.number("momentum", group["momentum"])
        super().check_group(group)
        checks.nonnegative("warmup_steps", group["warmup_steps"])

    def translated_group(self, group: dict[str, Any]) -> dict[str, Any]:
        if "betas" in group:
            raise ValueError(
                f"betas={group['betas']!r} are of another optimizer, whose averages are not those of SGDScheduleFree; "
                "load the state dict into an optimizer of its own kind, and begin this one with the averages"
            )
        return group

    def _interpolation(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def _moment(self, group: dict[str, Any]) -> tuple[float, float]:
        return 0.0, 0.0  # there is none

    def rule(self, group: dict[str, Any]) -> str:
        return "schedule_free_sgd"


class AdamWScheduleFree(_ScheduleFree):
    """Schedule-free AdamW, a drop-in for `schedulefree.AdamWScheduleFree`.

    Defazio et al., "The Road Less Scheduled", arXiv:2405.15682. Evaluate, and save what is to be used, between `eval()`
    and `train()`. Use no schedule; a warmup is inside. State per parameter: `step` (float32, 0-d), `exp_avg_sq` and
    `z`, of the parameter's shape; `z` never in 8 bits.

    Args:
        params: As for `SGDScheduleFree`, like every argument not listed here.
        lr: Learning rate, >= 0; one to ten times that of AdamW with a schedule, the paper advises.
        betas: How much of the weights in training is the average, in (0, 1), and the decay of the second moment.
        eps: Added to the denominator, >= 0.
        weight_decay: Added to the normalized gradient, times the weights in training; >= 0.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (_Z, _SECOND)
    REFERENCES: ClassVar[dict[str, Reference]] = {"schedule_free_adam": schedule_free}
    USUAL_LR = (1e-7, 0.1)
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"schedule_free_adamw": {}}

    def __init__(  # type: ignore[misc]  # the schedulefree package takes one of the options by position
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            **{"lr": lr, "betas": betas, "eps": eps, "r": r, "warmup_steps": warmup_steps},
            **{"weight_lr_power": weight_lr_power, "weight_decay": weight_decay},
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.betas(group["betas"], (0.9, 0.999))
        super().check_group(group)
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("warmup_steps", group["warmup_steps"])

    def rule(self, group: dict[str, Any]) -> str:
        return "schedule_free_adam"


class RAdamScheduleFree(_ScheduleFree):
    """Schedule-free RAdam, a drop-in for `schedulefree.RAdamScheduleFree`: no warmup is needed.

    As `AdamWScheduleFree`, with the lr that RAdam rectifies (Liu et al., arXiv:1908.03265).

    Args:
        params: As for `AdamWScheduleFree`, like every argument not listed here.
        silent_sgd_phase: Stand still in the first steps, in which RAdam's second moment is too young to divide by,
            instead of taking steps of SGD.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (_Z, _SECOND)
    REFERENCES: ClassVar[dict[str, Reference]] = {"schedule_free_adam": schedule_free}
    USUAL_LR = (1e-7, 0.1)
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"schedule_free_radam": {}}

    def __init__(  # type: ignore[misc]  # the schedulefree package takes one of the options by position
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        silent_sgd_phase: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            **{"lr": lr, "betas": betas, "eps": eps, "r": r, "weight_lr_power": weight_lr_power},
            **{"weight_decay": weight_decay, "silent_sgd_phase": silent_sgd_phase},
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_group(self, group: dict[str, Any]) -> None:
        checks.betas(group["betas"], (0.9, 0.999))
        super().check_group(group)
        checks.nonnegative("eps", group["eps"])
        checks.flag("silent_sgd_phase", group["silent_sgd_phase"])
        if group["silent_sgd_phase"] and (beta2 := float(group["betas"][1])) <= 0.6:
            raise ValueError(
                f"betas[1]={beta2!r} averages over too few steps for RAdam ever to divide by them, and with "
                "silent_sgd_phase=True nothing would move; pass a number above 0.6, such as 0.999"
            )

    def rule(self, group: dict[str, Any]) -> str:
        return "schedule_free_adam"

    def _factor(self, group: dict[str, Any]) -> tuple[float, bool]:
        beta2, step = float(group["betas"][1]), group["k"] + 1
        left = beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * left / (1 - left)
        if length <= 4:
            return float(not group["silent_sgd_phase"]), False
        return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5, True
