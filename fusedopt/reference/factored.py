"""Sums over the rows, the columns and the whole of matrices, in an order that no thread count changes.

All in double. A matrix is cut into slabs of rows, so that several threads can sum one, and a slab into panels of
4,096 columns, the chunks of `norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import CHUNK, chunk_sums, in_lanes, lane_total, ordered_sum, pairwise_sum

_MAX_SLABS = 64
_MIN_ROWS = 320  # of a slab, unless the matrix has fewer
_WEIGHED_ROWS = 4


def row_sums(values: Tensor) -> Tensor:
    """The sum of every row of float64 matrices (..., rows, columns): chunks of 4,096 columns, added in pairs."""
    return pairwise_sum(chunk_sums(values))


def column_sums(values: Tensor) -> Tensor:
    """The sum of every column of float64 matrices (..., rows, columns): in order within slabs, which are paired."""
    return pairwise_sum(ordered_sum(_slabs(values)).movedim(-2, -1))


def weighted_column_sums(values: Tensor, weights: Tensor) -> Tensor:
    """The sums over columns, in double, of (weight of the row * value)^2 of matrices (..., rows, columns).

    Within slabs, the squares of every four rows are added in pairs in the precision of the values, and these sums in
    order in double; then the slabs are added in pairs.
    """
    slabs = _slabs(values * weights.unsqueeze(-1))
    slabs = torch.nn.functional.pad(slabs, (0, 0, 0, -slabs.shape[-2] % _WEIGHED_ROWS))
    groups = slabs.reshape(*slabs.shape[:-2], slabs.shape[-2] // _WEIGHED_ROWS, _WEIGHED_ROWS, slabs.shape[-1])
    first, second, third, fourth = (groups * groups).unbind(-2)
    return pairwise_sum(ordered_sum(((first + second) + (third + fourth)).double()).movedim(-2, -1))


def unit_sums(values: Tensor) -> Tensor:
    """The sums of all units of float64 matrices (batch, rows, columns), one after the other: 1-D.

    A unit is the part of a slab within a panel. Each of its rows is summed as a chunk, and these sums are added in
    order. The panels of a matrix's first slab come first.
    """
    slabs = _slabs(values)
    columns = slabs.shape[-1]
    if columns == 0:  # as a shard may have none
        return values.new_zeros(0)
    whole = columns - columns % CHUNK
    parts = []
    if whole:  # (batch, slabs, panels, rows, columns of a panel)
        parts.append(slabs[..., :whole].reshape(*slabs.shape[:-1], whole // CHUNK, CHUNK).movedim(-2, 2))
    if whole < columns:
        parts.append(slabs[..., whole:].unsqueeze(2))
    rows = [lane_total(ordered_sum(in_lanes(part))) for part in parts]
    return torch.cat([ordered_sum(sums.unsqueeze(-1)).squeeze(-1) for sums in rows], dim=-1).reshape(-1)


def _slabs(values: Tensor) -> Tensor:
    """Matrices (..., rows, columns) as (..., slabs, rows of one, columns), filled up with rows of zeros."""
    rows = values.shape[-2]
    if rows == 0:  # a shard of a matrix may have none
        return values.reshape(*values.shape[:-2], 1, 0, values.shape[-1])
    height = -(-rows // max(1, min(_MAX_SLABS, rows // _MIN_ROWS)))
    padded = torch.nn.functional.pad(values, (0, 0, 0, -rows % height))
    return padded.reshape(*padded.shape[:-2], padded.shape[-2] // height, height, padded.shape[-1])
