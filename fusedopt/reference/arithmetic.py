"""Arithmetic that gives the same bits as the compiled core.

Only separate add, sub, mul, div with IEEE rounding: no torch operation that may fuse or approximate
(lerp, addcmul, addcdiv, add with alpha, rsqrt).
"""

from __future__ import annotations

import torch
from torch import Tensor


def power(base: float, exponent: int) -> float:
    """base**exponent by repeated squaring: the multiplications of the core, hence the same double."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def rounded(value: float, like: Tensor) -> float:
    """A derived scalar, rounded once to the precision of ``like``."""
    return torch.tensor(value, dtype=torch.float64).to(like.dtype).item()


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root. torch.sqrt of a float32 tensor on the CPU is sometimes off by 1 ulp."""
    return x.double().sqrt().to(x.dtype)


def sign(x: Tensor) -> Tensor:
    """-1, 1, or x itself where it is zero or NaN."""
    one = torch.ones_like(x)
    return torch.where(x > 0, one, torch.where(x < 0, -one, x))


def decayed(param: Tensor, grad: Tensor, weight_decay: float) -> Tensor:
    """The gradient plus that of an L2 penalty."""
    return grad + rounded(weight_decay, param) * param if rounded(weight_decay, param) != 0.0 else grad
