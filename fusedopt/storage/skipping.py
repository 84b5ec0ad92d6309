"""Weights that stay as they were, because their step would not be finite (nonfinite="skip_block").

With an 8-bit state, which such a number spoils for all of its block of 64, the block stays; else the single weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantization import BLOCK, TOO_LARGE, blocked, unblocked


def spoilt(results: Sequence[Tensor], *, has_blocks: bool, is_complex: bool) -> Tensor:
    """Where a step would not be finite.

    Args:
        results: The new weights and states, in the precision that is computed in, all of one shape; complex numbers as
            pairs.
        has_blocks: Whether there is an 8-bit state.
        is_complex: Whether the parameter is.

    Returns:
        Boolean tensor of the parameter's shape. float32 numbers that an 8-bit block cannot hold count as not finite.
    """
    found = torch.zeros(results[0].shape, dtype=torch.bool, device=results[0].device)
    for x in results:
        found |= x.view(torch.int32) & 0x7FFFFFFF >= TOO_LARGE if x.dtype == torch.float32 else ~x.isfinite()
    if is_complex:
        found = found.any(dim=-1)
    if has_blocks:
        found = unblocked(blocked(found).any(dim=-1, keepdim=True).expand(-1, -1, BLOCK), found.shape)
    return found


@dataclass(frozen=True)
class Stored:
    """What was stored of a parameter before a step, with the tensors that hold it."""

    numbers: list[tuple[Tensor, Tensor]]  # (held, copy), of each element
    scales: list[tuple[Tensor, Tensor]]  # of each block

    @classmethod
    def of(cls, param: Tensor, master: Tensor | None, states: Sequence[tuple[Tensor, ...]]) -> Stored:
        numbers = [param, *([] if master is None else [master]), *(held[0] for held in states)]
        return cls(
            [(held, held.clone()) for held in numbers], [(held[1], held[1].clone()) for held in states if len(held) > 1]
        )

    @property
    def has_blocks(self) -> bool:
        """Whether there is an 8-bit state."""
        return bool(self.scales)

    def put_back(self, where: Tensor) -> int:
        """Undoes the step of some weights. Returns of how many."""
        for held, copy in self.numbers:
            held[where] = copy[where]
        for held, copy in self.scales:
            blocks = blocked(where).any(dim=-1).reshape(held.shape)
            held[blocks] = copy[blocks]
        return int(where.sum())
