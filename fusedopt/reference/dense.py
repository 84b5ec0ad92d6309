"""Dense storage in 16 bits with stochastic rounding, as csrc/storage/dense.h.

Rounding to nearest is torch's own cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_SIGN = -0x80000000


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds away from zero with a probability equal to the part that is cut off.

    Args:
        x: float32 tensor.
        dtype: torch.bfloat16 or torch.float16.
        bits: int32 tensor of x's shape, 16 random bits each.

    Returns:
        Tensor of that dtype. Inf and NaN stay as they are; a number that rounds past the largest one becomes inf.
    """
    code = x.view(torch.int32)
    if dtype == torch.bfloat16:
        # The upper half of the sum is the result; the cast is then exact.
        moved = ((code + bits) & ~0xFFFF).view(torch.float32)
    else:
        magnitude = code & _MAGNITUDE
        normal = ((magnitude + (bits >> 3)) & ~0x1FFF).view(torch.float32)
        # Below 2^-14 the spacing is 2^-24. In units of 2^-40 the lower 16 bits are cut.
        units = (magnitude.view(torch.float32) * 2.0**40).clamp(max=2.0**27).to(torch.int32)
        tiny = ((units + bits) >> 16).to(torch.float32) * 2.0**-24
        size = torch.where(magnitude < 0x38800000, tiny, normal)
        moved = (size.view(torch.int32) | (code & _SIGN)).view(torch.float32)
    return torch.where(torch.isfinite(x), moved, x).to(dtype)
