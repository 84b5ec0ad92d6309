"""AnyPrecisionAdamW: AdamW under the names of torchdistX's optimizer of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..engine.options import Options
from ..storage.state import DTYPES, format_name
from .adamw import AdamW

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AnyPrecisionAdamW(AdamW):
    """AdamW with a dtype for each of its buffers, and Kahan summation for 16-bit parameters.

    The same settings as `AdamW(state_dtype={...}, master_weights="kahan")` under the names that users of
    torchdistX and transformers know. Everything is rounded to nearest, as there; weight decay goes
    through the compensation, unlike there.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, >= 0.
        betas: Decay of the first and the second moment per step, each in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: Decoupled weight decay, >= 0.
        use_kahan_summation: Keep what a bfloat16 parameter cannot hold in a compensation buffer.
        momentum_dtype: Of `exp_avg`: any that `state_dtype` takes.
        variance_dtype: Of `exp_avg_sq`.
        compensation_buffer_dtype: Of `compensation`: float32, bfloat16 or float16.
        **options: As for `FusedOptimizer`, except state_dtype and master_weights.

    Raises:
        ValueError: A value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """

    # The name is of transformers' Trainer, whose defaults are not torchdistX's.
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {
        "adamw_anyprecision": {"momentum_dtype": "float32", "variance_dtype": "float32"}
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_kahan_summation: bool = False,
        momentum_dtype: torch.dtype | str = torch.bfloat16,
        variance_dtype: torch.dtype | str = torch.bfloat16,
        compensation_buffer_dtype: torch.dtype | str = torch.bfloat16,
        **options: Unpack[Options],
    ) -> None:
        for name in ("state_dtype", "master_weights"):
            if name in options:
                raise TypeError(
                    f"{name} is set by momentum_dtype, variance_dtype and use_kahan_summation here; "
                    f"use AdamW to pass {name}"
                )
        checks.flag("use_kahan_summation", use_kahan_summation)
        self._compensation = compensation_buffer_dtype
        implied: dict[str, Any] = {
            "state_rounding": "nearest",
            **options,
            "state_dtype": {
                "exp_avg": format_name("momentum_dtype", momentum_dtype),
                "exp_avg_sq": format_name("variance_dtype", variance_dtype),
            },
            "master_weights": "kahan" if use_kahan_summation else None,
        }
        super().__init__(params, lr, betas, eps, weight_decay, **implied)

    def own_defaults(self) -> dict[str, Any]:
        return {"compensation_buffer_dtype": self._compensation}

    def checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        dtype = format_name("compensation_buffer_dtype", group["compensation_buffer_dtype"], tuple(DTYPES))
        return {**super().checked_group(group), "compensation_buffer_dtype": dtype}
