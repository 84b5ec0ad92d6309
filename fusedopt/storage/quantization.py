"""8-bit blockwise states in plain torch: the truth for csrc/storage/blockwise8.h, which explains the format.

A parameter is seen as (first dimension, rest); blocks of 64 elements run along a row, the last of a row may
be short. Codes have the parameter's shape, scales the shape (first dimension, blocks of a row). A vector is one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64

_MAGNITUDE = 0x7FFFFFFF
TOO_LARGE = 0x7F7D0000  # magnitudes from here on spoil their block


def scales_shape(shape: torch.Size) -> torch.Size:
    """The shape of the scales of a parameter, or of the shard of one, of at least one dimension."""
    return torch.Size([*shape[: _row_dim(shape)], -(-row_length(shape) // BLOCK)])


def row_length(shape: torch.Size) -> int:
    """Elements of a row of a parameter, which blocks do not cross."""
    return shape[_row_dim(shape) :].numel()


def _row_dim(shape: torch.Size) -> int:
    """The dimension that rows begin with: a vector is one row."""
    return min(1, len(shape) - 1)


def encode(values: Tensor, *, is_signed: bool, bits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Stores numbers in 8 bits.

    Args:
        values: float32 tensor of at least one dimension.
        is_signed: Whether there are negative ones.
        bits: int32 tensor of the same shape, 16 random bits each, to round stochastically; None rounds to
            nearest.

    Returns:
        Codes of the same shape and their scales, both uint8.
    """
    shift, ceiling = (13, 0x3FBFF) if is_signed else (15, 0x1FEFF)
    blocks = blocked(values)
    code = blocks.view(torch.int32)
    largest = (code & _MAGNITUDE).amax(dim=-1, keepdim=True)
    is_plain = (largest > 0) & (largest < TOO_LARGE)

    exponent = ((largest.long() + ceiling) >> 23).clamp(min=32)
    scale = exponent - shift
    # The definition. In float64 all of it is exact but for the root, and that is exact once it is cut to an integer.
    size = torch.where(is_plain, blocks, 0.0).double().abs()
    steps = size * _float_of((254 - scale) << 23).double()
    q = steps.sqrt().floor()
    threshold = 0.5 if bits is None else ((blocked(bits).long() >> 1) | 1) * 2.0**-15
    q = (q + (steps - q * q > threshold * (2.0 * q + 1.0))).long()
    # Unsigned, a variance never becomes zero while its mean is alive.
    changed, to = ((q != 0) & (code < 0), q | 0x80) if is_signed else ((q == 0) & (size != 0), torch.ones_like(q))
    q = torch.where(is_plain, torch.where(changed, to, q), 0)
    scale = torch.where(is_plain, scale, torch.where(largest > 0, 255, 0))
    return unblocked(q.to(torch.uint8), values.shape), scale.to(torch.uint8).reshape(scales_shape(values.shape))


def decode(codes: Tensor, scales: Tensor, *, is_signed: bool) -> Tensor:
    """The float32 numbers that `encode` stored, of the shape of the codes."""
    blocks = blocked(codes).int()
    q = (blocks & 0x7F if is_signed else blocks).float()
    sizes = (q * q) * _float_of(scales.long() << 23).reshape(*blocks.shape[:2], 1)
    if is_signed:
        sizes = (sizes.view(torch.int32) | ((blocks & 0x80) << 24)).view(torch.float32)
    return unblocked(sizes, codes.shape)


def blocked(values: Tensor) -> Tensor:
    """A parameter's numbers as (rows, blocks, BLOCK), short blocks filled up with zeros."""
    shape = values.shape
    rows = values.reshape(shape[: _row_dim(shape)].numel(), row_length(shape))
    blocks = -(-rows.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(rows, (0, blocks * BLOCK - rows.shape[1]))
    return padded.reshape(rows.shape[0], blocks, BLOCK)


def unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, of a parameter's shape."""
    return blocks.flatten(1)[:, : row_length(shape)].reshape(shape)


def _float_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
