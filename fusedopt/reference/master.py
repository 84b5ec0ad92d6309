"""Weights with more precision than a 16-bit parameter, as csrc/storage/master.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import round_stochastic

_CANONICAL_NAN = 0x7FC00000


def join(kind: str, param: Tensor, master: Tensor) -> Tensor:
    """The float32 weights that a parameter and its master stand for."""
    if kind == "kahan":
        return param.float() + master.float()
    if kind == "float32":
        # A parameter that is no rounding of the master was written by something else, and counts.
        down, up = (
            round_stochastic(master, param.dtype, torch.full_like(master, bits, dtype=torch.int32)).view(torch.int16)
            for bits in (0, 0xFFFF)
        )
        code = param.view(torch.int16)
        return torch.where((code == down) | (code == up), master, param.float())
    high = param.view(torch.int16).int() << 16
    low = master.int() << 8 if kind == "split24" else master.view(torch.int16).int()
    joined = (high + low).view(torch.float32)
    # What was split has a remainder of 0 where it is NaN. Any other NaN means that something else has written the
    # parameter, a zero for example, which has no negative remainder: the written value counts.
    return torch.where(joined.isnan(), param.float(), joined)


def split(kind: str, weights: Tensor, param: Tensor, master: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `join` joins: the parameter and its master.

    Args:
        kind: "kahan", "split24", "split32" or "float32".
        weights: float32 tensor.
        param: Of the dtype to store in.
        master: Of the dtype to store in.
        bits: int32 tensor, 16 random bits each, for stochastic rounding; None rounds to nearest.

    Returns:
        New tensors of those dtypes.
    """
    if kind == "float32":
        return _cast(weights, param.dtype, bits), weights
    if kind == "kahan":
        shown = weights.to(param.dtype)
        rest = torch.where(shown.isfinite(), weights - shown.float(), 0.0)
        return shown, rest if master.dtype == torch.float32 else _cast(rest, master.dtype, bits)
    code = torch.where(weights.isnan(), _CANONICAL_NAN, weights.view(torch.int32))
    if kind == "split24":
        code = (code + (0x80 if bits is None else bits >> 8)) & ~0xFF
    high = (code + 0x8000) >> 16
    low = code - (high << 16)
    shown = high.to(torch.int16).view(torch.bfloat16)
    return shown, (low >> 8).to(torch.int8) if kind == "split24" else low.to(torch.int16).view(master.dtype)


def _cast(values: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    return values.to(dtype) if bits is None else round_stochastic(values, dtype, bits)
