"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from . import checks
from .backends.base import Reference
from .optimizer import FusedOptimizer
from .reference.adamw import adam
from .state import StateDtype, StateRounding, StateSpec


class Adam(FusedOptimizer):
    """Adam, a drop-in for `torch.optim.Adam`.

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980; AMSGrad: arXiv:1904.09237.
    State per parameter: `step` (float32, 0-d), `exp_avg`, `exp_avg_sq` and, with amsgrad,
    `max_exp_avg_sq`, of the parameter's shape. Everything is computed in float32 whatever is stored;
    float64 and complex parameters are computed and stored in their own precision.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0; a number or a one-element tensor.
        betas: Decay of the first and the second moment per step, each in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        amsgrad: Divide by the largest second moment so far.
        foreach: Accepted for torch's sake; every step is fused.
        maximize: Ascend instead of descend.
        capturable: Accepted for torch's sake.
        differentiable: Must be False.
        fused: Accepted for torch's sake; every step is fused.
        decoupled_weight_decay: Decay the parameter itself (AdamW) instead of an L2 penalty.
        state_dtype: How states are stored: "float32", "bfloat16" or "float16", a torch.dtype, or a dict
            {state: dtype} whose missing states are float32.
        state_rounding: How 16-bit states are rounded: "stochastic", "nearest", or a dict {state: rounding}.
            Default: stochastic, because a rounded-to-nearest second moment stops moving at beta2 = .999;
            `max_exp_avg_sq`, which only grows, to nearest.
        seed: Seed of stochastic rounding, an int in [0, 2**32).
        max_grad_norm: Clip gradients to this global norm (over all groups) inside the step; None does
            not. Gradients are not written to; the norm is left in `last_grad_norm`.
        backend: "auto", or the name of one: "cpu" (compiled), "eager" (plain torch, any device).

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (StateSpec("exp_avg"), StateSpec("exp_avg_sq"), StateSpec("max_exp_avg_sq", is_maximum=True))
    REFERENCES: ClassVar[dict[str, Reference]] = {
        "adamw": partial(adam, decoupled_weight_decay=True),
        "adamw_amsgrad": partial(adam, decoupled_weight_decay=True),
        "adam": partial(adam, decoupled_weight_decay=False),
        "adam_amsgrad": partial(adam, decoupled_weight_decay=False),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype = "float32",
        state_rounding: StateRounding = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params,
            defaults,
            state_dtype=state_dtype,
            state_rounding=state_rounding,
            seed=seed,
            max_grad_norm=max_grad_norm,
            backend=backend,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be a pair; pass for example (0.9, 0.999)")
        for i, beta in enumerate(betas):
            checks.fraction(f"betas[{i}]", beta)
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        return self.STATES if group["amsgrad"] else self.STATES[:2]

    def rule(self, group: dict[str, Any]) -> str:
        # Without weight decay the two are one; the decoupled one then multiplies by exactly 1.
        name = "adamw" if self._is_decoupled(group) else "adam"
        return name + "_amsgrad" if group["amsgrad"] else name

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {
            "lr": checks.number("lr", group["lr"]),
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }

    @staticmethod
    def _is_decoupled(group: dict[str, Any]) -> bool:
        return group["decoupled_weight_decay"] or group["weight_decay"] == 0


class AdamW(Adam):
    """AdamW, a drop-in for `torch.optim.AdamW`: Adam with decoupled weight decay.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101. Each step multiplies
    the parameter by (1 - lr * weight_decay) before the Adam update.

    Args:
        params: As for `Adam`, like every argument not listed here.
        weight_decay: Decoupled weight decay, >= 0.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = "float32",
        state_rounding: StateRounding = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            state_rounding=state_rounding,
            seed=seed,
            max_grad_norm=max_grad_norm,
            backend=backend,
        )
