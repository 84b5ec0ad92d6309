"""Adafactor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..backends.base import AskingReference, Reference
from ..engine import sharding
from ..engine.fp32 import full_precision
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..engine.shard_sums import shard_sums
from ..reference.adafactor import (
    Knobs,
    actual_lr,
    adafactor_matrix,
    adafactor_vector,
    asking_matrix,
    asking_vector,
    relative_lr,
    scaled_lr,
)
from ..storage.state import StateSpec
from .adafactor_torch import TORCHS_NAMES, check_switches, is_torchs, renamed, torchs_group, torchs_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SMALL = "Adafactor's second moments are few numbers, or those of a vector"
_FIRST = StateSpec("exp_avg")
_ROW = StateSpec("exp_avg_sq_row", is_signed=False, always_float32=_SMALL, extent="rows")
_COL = StateSpec("exp_avg_sq_col", is_signed=False, always_float32=_SMALL, extent="columns")
_FOLDED = (replace(_ROW, is_folded=True), replace(_COL, is_folded=True))
_VECTOR = StateSpec("exp_avg_sq", is_signed=False, always_float32=_SMALL)

_VARIANTS = ("transformers", "torch")
_SHARED_DEFAULTS = {"decay_rate": -0.8, "clip_threshold": 1.0}
_TORCHS_LR = 1e-2
_TORCHS_EPS = (None, 1e-3)
# The constructor tells by identity whether eps was given: torch's default is another.
_EPS: tuple[float | None, float] = (1e-30, 1e-3)


class Adafactor(FusedOptimizer):
    """Adafactor, a drop-in for `transformers.Adafactor` and, with variant="torch", for `torch.optim.Adafactor`.

    Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv:1804.04235. State per
    parameter: `step` (float32, 0-d); with beta1 `exp_avg`, of the parameter's shape; from two dimensions on
    `exp_avg_sq_row`, without the last dimension, and `exp_avg_sq_col`, without the last but one, else `exp_avg_sq`, of
    the parameter's shape. Second moments are float32 in every `state_dtype`. Everything is computed in float32;
    float64 parameters are computed and stored in float64. A group with relative_step has lr None.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0, a number or a one-element tensor; None with relative_step. variant="torch" takes it for
            the upper limit of the relative one, and 1e-2 for None.
        eps: Added to squared gradients, and the smallest RMS that a parameter counts with; both >= 0; (1e-30, 1e-3) by
            default. For variant="torch" (None, 1e-3), where None is the machine epsilon of a parameter's dtype, and the
            first bounds the root of the second moment from below instead.
        clip_threshold: Updates of a larger RMS are scaled down to it; > 0.
        decay_rate: A step's squared gradient counts with step**decay_rate; < 0.
        beta1: Decay of the first moment per step, in [0, 1); None keeps none.
        weight_decay: Decoupled weight decay, >= 0, times the actual learning rate; for variant="torch" times lr.
        scale_parameter: Multiply the learning rate by the RMS of the parameter.
        relative_step: Take the learning rate from the step's number: min(1e-2, 1 / sqrt(step)).
        warmup_init: Take 1e-6 * step for 1e-2 there.
        variant: Whose equation: "transformers" or "torch".
        compat: Keep the first moment times the learning rates of its time, as transformers does: a parameter then
            moves on with what was kept after the learning rate has gone to 0.
        fold_conv: Take parameters of more than two dimensions, convolutions', for matrices of the first dimension by
            the rest, not for as many matrices of the last two. Not what the others do, but less state.
        beta2_decay: What variant="torch" calls decay_rate; there it may be 0.
        d: What variant="torch" calls clip_threshold.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range, or of no use together with another.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (_FIRST, _ROW, _COL, _VECTOR)
    REFERENCES: ClassVar[dict[str, Reference]] = {
        "adafactor_matrix": adafactor_matrix,
        "adafactor_vector": adafactor_vector,
        "adafactor_momentum_matrix": adafactor_matrix,
        "adafactor_momentum_vector": adafactor_vector,
    }
    why_no_block_is_skipped = "one such number spoils means over its row, its column and the parameter"
    ASKING: ClassVar[dict[str, AskingReference]] = {
        "adafactor_matrix": asking_matrix,
        "adafactor_vector": asking_vector,
        "adafactor_momentum_matrix": asking_matrix,
        "adafactor_momentum_vector": asking_vector,
    }
    takes_sums = True
    derives_on_device = False  # which lr it has decides what else it may have
    USUAL_LR = (1e-8, 0.1)
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"adafactor": {}}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        eps: tuple[float | None, float] = _EPS,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        variant: str = "transformers",
        compat: bool = False,
        fold_conv: bool = False,
        beta2_decay: float | None = None,
        d: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        given = {"beta2_decay": beta2_decay, "d": d}
        settings = {
            "lr": lr,
            "eps": _TORCHS_EPS if variant == "torch" and eps is _EPS else eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "variant": variant,
            "compat": compat,
            "fold_conv": fold_conv,
        }
        for theirs, ours in TORCHS_NAMES.items():
            if given[theirs] is not None and settings[ours] not in (_SHARED_DEFAULTS[ours], given[theirs]):
                raise ValueError(
                    f"{theirs}={given[theirs]!r} and {ours}={settings[ours]!r} are the same knob; pass one"
                )
        # Of groups that will be asked for, by index: the number of a step, and the first parameter's RMS before it.
        self._rms_before: dict[int, tuple[Any, Tensor]] = {}
        settings.update(renamed({key: value for key, value in given.items() if value is not None}, variant))
        super().__init__(params, settings, **options)

    @classmethod
    def implied(cls, name: str, given: dict[str, Any]) -> dict[str, Any]:
        # As in transformers' Trainer, which always has an lr.
        has_lr = given.get("lr") is not None and given.get("variant") != "torch"
        return {"scale_parameter": False, "relative_step": False} if has_lr else {}

    def check_group(self, group: dict[str, Any]) -> None:
        variant = checks.one_of("variant", group["variant"], _VARIANTS)
        for name in ("scale_parameter", "relative_step", "warmup_init", "compat", "fold_conv"):
            checks.flag(name, group[name])
        if group["lr"] is not None:
            checks.nonnegative("lr", group["lr"])
        eps = group["eps"]
        if not isinstance(eps, (tuple, list)) or len(eps) != 2:
            raise ValueError(f"eps={eps!r} must be a pair; pass for example {_EPS}")
        if eps[0] is not None:
            checks.nonnegative("eps[0]", eps[0])
        elif variant != "torch":
            raise ValueError(f"eps={eps!r} has None, which only variant='torch' takes; pass for example {_EPS}")
        checks.nonnegative("eps[1]", eps[1])
        checks.nonnegative("weight_decay", group["weight_decay"])
        if not checks.nonnegative("clip_threshold", group["clip_threshold"]) > 0:
            raise ValueError("clip_threshold=0 would make every update zero; pass a number > 0, for example 1.0")
        decay_rate = checks.number("decay_rate", group["decay_rate"])
        if decay_rate > 0 or (decay_rate == 0 and variant != "torch"):
            raise ValueError(
                f"decay_rate={decay_rate!r} would not average squared gradients; pass a number < 0, for example -0.8"
            )
        if group["beta1"] is not None:
            checks.fraction("beta1", group["beta1"])
        if variant == "torch":
            check_switches(group)
        else:
            _check_lr(group)

    def checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        has_none = group["variant"] == "torch" and group["lr"] is None
        return super().checked_group({**group, "lr": _TORCHS_LR} if has_none else group)

    def with_any_lr(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "lr": None if group["relative_step"] and group["variant"] != "torch" else 1.0}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            variant = param_group.get("variant", self.defaults["variant"])
            if variant != self.defaults["variant"]:
                raise ValueError(
                    f"variant={variant!r} in a group of an optimizer with variant={self.defaults['variant']!r}, whose "
                    "defaults are others; make an optimizer for each"
                )
            param_group.update(renamed(param_group, variant))
            for key in TORCHS_NAMES:
                param_group.pop(key, None)
        super().add_param_group(param_group)

    # ---- states ----------------------------------------------------------------------------------

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        return list(dict.fromkeys(spec for specs in self.layouts(group).values() for spec in specs))

    def layouts(self, group: dict[str, Any]) -> dict[str, Sequence[StateSpec]]:
        first = () if group["beta1"] is None else (_FIRST,)
        factors = _FOLDED if group["fold_conv"] else (_ROW, _COL)
        return {"matrix": (*first, *factors), "vector": (*first, _VECTOR)}

    def layout_of(self, group: dict[str, Any], param: Tensor) -> str:
        return "matrix" if param.ndim > 1 else "vector"

    def row_dim(self, group: dict[str, Any], param: Tensor) -> int | None:
        dims = param.dim()
        if dims < 2:
            return None
        return 0 if group["fold_conv"] else dims - 2

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        if param.is_complex():
            return f"its dtype is {param.dtype}, for which Adafactor is not defined; step its real view instead"
        if group["fold_conv"] and param.dim() > 2 and sharding.is_dtensor(param):
            cut = [p.dim for p in param.placements if not p.is_replicate()]  # type: ignore[attr-defined]
            if any(dim != 0 for dim in cut):
                return (
                    f"it is a DTensor sharded along dimension {max(cut)}, which fold_conv=True folds into the columns; "
                    "shard it along dimension 0, or use fold_conv=False"
                )
        return None

    def translated_group(self, group: dict[str, Any]) -> dict[str, Any]:
        group = renamed(group, group["variant"])
        if group["relative_step"] and group["variant"] != "torch":
            group["lr"] = None  # transformers' schedule leaves there what it reports
        return group

    def translated(self, group: dict[str, Any], param: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        # RMS is transformers' memory of the parameter's; it is computed when it is needed.
        held = {key: value for key, value in held.items() if key != "RMS"}
        for name, spec, shape in (  # torch's names, which keep the dimension of 1
            ("row_var", _ROW, (*param.shape[:-1], 1)),
            ("col_var", _COL, (*param.shape[:-2], 1, *param.shape[-1:])),
            ("variance", _VECTOR, param.shape),
        ):
            value = held.get(name)
            if isinstance(value, Tensor) and value.shape == shape:
                del held[name]
                held[spec.name] = value.reshape(spec.shape_for(param.shape))
        return held

    def as_torchs_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return torchs_group(group) if is_torchs(group) else group

    def as_torchs_state(self, group: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        return torchs_state(held) if is_torchs(group) else held

    # ---- a step ----------------------------------------------------------------------------------

    def rule(self, group: dict[str, Any]) -> str:
        return "adafactor" if group["beta1"] is None else "adafactor_momentum"

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        eps1, eps2 = group["eps"]
        if group["relative_step"] and group["variant"] != "torch" and self._is_reported(group):
            group = {**group, "lr": None}
        lr = None if group["lr"] is None else checks.number("lr", group["lr"])
        if group["variant"] != "torch" and lr == 0.0:
            group = {**group, "relative_step": False}  # torch.distributed.checkpoint makes state by a step with lr 0
        elif group["variant"] != "torch":
            _check_lr(group)  # a scheduler may have written to it
        return {
            "lr": float("nan") if lr is None else lr,
            "eps1": -1.0 if eps1 is None else float(eps1),
            "eps2": float(eps2),
            "beta1": 0.0 if group["beta1"] is None else float(group["beta1"]),
            "is_torch": float(group["variant"] == "torch"),
            **{name: float(group[name]) for name in ("clip_threshold", "decay_rate", "weight_decay")},
            **{name: float(group[name]) for name in ("scale_parameter", "relative_step", "warmup_init", "compat")},
        }

    @torch.no_grad()
    def actual_lrs(self) -> list[float | None]:
        """The learning rate that each group stepped with last.

        It is that of the group's first parameter that was stepped. With scale_parameter it hangs on the RMS of the
        parameter, which is taken as the parameter is now, after the step.

        Returns:
            A number for each param group; None for one in which nothing was stepped yet.
        """
        return [self._actual_lr(group) for group in self.param_groups]

    def _actual_lr(self, group: dict[str, Any]) -> float | None:
        for param in group["params"]:
            step = int(self.state.get(param, {}).get("step", 0))
            if step > 0 and param.numel() > 0:
                weights = full_precision(self, group, param)
                knobs = Knobs(**self.hyper(group))
                if sharding.is_sharded(param):
                    return scaled_lr(knobs, step, float(self._rms_of(group, param)))
                rows = self.state[param].get(_ROW.name)
                shape = (-1,) if rows is None else (-1, rows.shape[-1], self.state[param][_COL.name].shape[-1])
                return actual_lr(knobs, step, weights.reshape(shape))
        return None

    # ---- as the AdafactorSchedule of transformers asks -----------------------------------------------

    def _is_reported(self, group: dict[str, Any]) -> bool:
        """Whether a group's lr is what the AdafactorSchedule of transformers last reported, which is not to be used.

        A torch scheduler notes in `_opt_called` that the optimizer steps, and only this one takes away the initial_lr.
        """
        return getattr(self, "_opt_called", False) and "initial_lr" not in group

    def _before_some(self) -> None:
        for index, group in enumerate(self.param_groups):
            param = group["params"][0] if group["params"] else None  # the only one that will be asked for
            if group["scale_parameter"] and self._is_reported(group) and param is not None and param.grad is not None:
                # The step's number as it is, on a device perhaps, since to read it is to wait for it.
                step = self.state.get(param, {}).get("step", 0) + 1
                self._rms_before[index] = step, self._rms_of(group, param)

    def _rms_of(self, group: dict[str, Any], param: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(full_precision(self, group, param), dtype=torch.float64)
        sums = shard_sums(self, group, param)
        if sums is not None:
            norm = sums.sums([(sums, "all", norm * norm)])[0].sqrt()
        return norm / param.numel() ** 0.5

    @torch.no_grad()
    def _get_lr(self, param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        """The learning rate of a parameter's last step, for which transformers takes the RMS before that step."""
        if param_group["variant"] == "torch":
            raise TypeError(
                "the AdafactorSchedule of transformers overwrites the lr of param groups, which variant='torch' needs; "
                "use fusedopt.AdafactorSchedule, which only reports"
            )
        if "step" not in param_state:  # nothing was stepped yet
            return float(param_group.get("initial_lr", param_group["lr"]) or 0.0)
        knobs, step = Knobs(**self.hyper(param_group)), int(param_state["step"])
        if not knobs.scale_parameter:
            return relative_lr(knobs, step)
        param = next(p for p in param_group["params"] if self.state.get(p) is param_state)
        index = next((i for i, group in enumerate(self.param_groups) if group is param_group), -1)
        number, rms = self._rms_before.get(index, (0, None))
        if rms is None or number != step or param is not param_group["params"][0]:
            # That step was compiled or skipped, or is of a state dict.
            rms = self._rms_of(param_group, param)
        return scaled_lr(knobs, step, float(rms))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rms_before = {}


def _check_lr(group: dict[str, Any]) -> None:
    if group["relative_step"] and group["lr"] is not None:
        raise ValueError(
            f"lr={group['lr']!r} together with relative_step=True, which takes the learning rate from the step's "
            "number; pass scale_parameter=False and relative_step=False with it, or no lr"
        )
    if not group["relative_step"] and group["lr"] is None:
        raise ValueError("lr=None with relative_step=False leaves no learning rate; pass lr, for example 1e-3")
    if group["warmup_init"] and not group["relative_step"]:
        raise ValueError(
            "warmup_init=True with relative_step=False has no learning rate to warm up; pass relative_step=True, or "
            "warmup_init=False and a scheduler"
        )
