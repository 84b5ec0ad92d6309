"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import checks
from ..backends.base import Reference
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options
from ..reference.adamw import adam
from ..storage.state import StateSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        amsgrad: Divide by the largest second moment so far; never stored in 8 bits.
        decoupled_weight_decay: Decay the parameter itself (AdamW) instead of an L2 penalty.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    STATES = (
        StateSpec("exp_avg"),
        StateSpec("exp_avg_sq", is_signed=False),
        StateSpec(
            "max_exp_avg_sq",
            is_signed=False,
            is_maximum=True,
            unquantized="a running maximum keeps every lucky draw",
        ),
    )
    REFERENCES: ClassVar[dict[str, Reference]] = {
        "adamw": partial(adam, decoupled_weight_decay=True),
        "adamw_amsgrad": partial(adam, decoupled_weight_decay=True),
        "adam": partial(adam, decoupled_weight_decay=False),
        "adam_amsgrad": partial(adam, decoupled_weight_decay=False),
    }
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {"adam": {}, "adam_8bit": {"state_dtype": "8bit"}}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
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
            **options,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        checks.nonnegative("lr", group["lr"])
        checks.betas(group["betas"], (0.9, 0.999))
        checks.nonnegative("eps", group["eps"])
        checks.nonnegative("weight_decay", group["weight_decay"])
        checks.switch("amsgrad", group["amsgrad"])
        checks.switch("decoupled_weight_decay", group["decoupled_weight_decay"])

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        return self.STATES if group["amsgrad"] else self.STATES[:2]

    def rule(self, group: dict[str, Any]) -> str:
        # Without weight decay the two are one; the decoupled one then multiplies by exactly 1.
        name = "adamw" if group["decoupled_weight_decay"] or group["weight_decay"] == 0 else "adam"
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


class AdamW(Adam):
    """AdamW, a drop-in for `torch.optim.AdamW`: Adam with decoupled weight decay.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101. Each step multiplies
    the parameter by (1 - lr * weight_decay) before the Adam update.

    Args:
        params: As for `Adam`, like every argument not listed here.
        weight_decay: Decoupled weight decay, >= 0.
        **options: As for `FusedOptimizer`; torch's `maximize`, `foreach` and so on are among them.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "adamw": {},
        "adamw_torch": {},
        "adamw_torch_fused": {"fused": True},
        "adamw_torch_npu_fused": {},
        "adamw_torch_xla": {},
        "adamw_torch_4bit": {"state_dtype": "8bit"},
        "adamw_torch_8bit": {"state_dtype": "8bit"},
        "adamw_bf16": {"state_dtype": "bfloat16"},
        "adamw_8bit": {"state_dtype": "8bit"},
        "adamw_bnb_8bit": {"state_dtype": "8bit"},
        "paged_adamw_32bit": {"state_device": "cpu"},
        "paged_adamw_8bit": {"state_dtype": "8bit", "state_device": "cpu"},
    }
    NOTES: ClassVar[dict[str, str]] = {
        "adamw_torch_4bit": "state is kept in 8 bits, not in 4: there is no smaller format here"
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            decoupled_weight_decay=True,
            **options,
        )

    def translated_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "decoupled_weight_decay": True}  # whatever saved it: the class says so
