"""Counter-based random bits, f(seed, step, element index), as csrc/storage/random.h.

uint32 arithmetic is done in int64 and masked: the low 32 bits of a wrapped product are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B1
_MASK = 0xFFFFFFFF


def _fmix(h: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def random_bits(
    shape: torch.Size, device: torch.device, *, seed: int, step: int, first_index: int, state: int
) -> Tensor:
    """The 16 random bits of every element of one state at one step.

    Args:
        shape: Shape of the state; bits run over it in row-major order.
        device: Where to make them.
        seed: The optimizer's seed, a uint32.
        step: This step's number, from 1.
        first_index: Index of the first element in the global tensor, for a shard.
        state: Which state of the rule, from 0. Two states share one hash, a half each.

    Returns:
        int32 tensor of that shape, values 0 to 65535.
    """
    index = torch.arange(first_index, first_index + shape.numel(), dtype=torch.int64, device=device)
    return bits_at(index, seed=seed, step=step, state=state).reshape(shape)


def bits_at(index: Tensor, *, seed: int, step: int, state: int) -> Tensor:
    """The same for elements of the global tensor at any indices, int64."""
    key = torch.tensor((seed * _GOLDEN + step) & _MASK, dtype=torch.int64, device=index.device)
    key = _fmix((_fmix(key) + state // 2) & _MASK)
    high = index >> 32
    keys = torch.where(high == 0, key, _fmix(key ^ high))
    low = index & _MASK
    # One hash for each aligned run of 64 elements, and a Weyl sequence within it.
    bits = (_fmix(((low >> 6) * _GOLDEN + keys) & _MASK) + (low & 63) * _GOLDEN) & _MASK
    half = bits & 0xFFFF if state % 2 else bits >> 16
    return half.to(torch.int32)
