"""Sums in an order that no thread count changes.

A row of numbers is cut into chunks of 4,096. A chunk is summed in double, in 16 lanes, each in order, and the lanes in
pairs; the chunks are then added in pairs. The gradient norm adds the chunks of all gradients, in list order.

The norms of updates and weights are taken on the way of a step, which has little time for them. So squares are added
in their own precision within blocks of 64, in halves, and only the sums of blocks are added as above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 4096
LANES = 16
BLOCK = 64

# Added to the gradient norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does.
_CLIP_EPS = 1e-6


def coefficient(norm: float, max_grad_norm: float) -> float:
    """What gradients of a norm are multiplied by to clip them."""
    found = max_grad_norm / (norm + _CLIP_EPS)
    return 1.0 if found > 1.0 else found  # NaN stays NaN


def clip(square_sum: float, multiplier: float, max_grad_norm: float) -> tuple[float, float]:
    """The multiplier that also clips, and the norm found; both of gradients already times `multiplier`."""
    norm = math.sqrt(square_sum) * multiplier
    return multiplier * coefficient(norm, max_grad_norm), norm


def square_sums(grad: Tensor) -> Tensor:
    """The sum of squares of every chunk of a gradient: float64, one element per chunk."""
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    values = values.reshape(-1).double()
    return chunk_sums(values * values)


def block_square_sums(values: Tensor, row: int) -> Tensor:
    """The sums of squares of blocks of 64, by row; the last block of a row may be short.

    Args:
        values: Real numbers, in whose precision they are squared and added.
        row: How many of them a row has.

    Returns:
        One number for each block.
    """
    if values.numel() == 0:
        return values.new_zeros(0)
    rows = values.reshape(-1, row)
    blocks = torch.nn.functional.pad(rows, (0, -row % BLOCK)).reshape(-1, BLOCK)
    sums = blocks * blocks
    while sums.shape[-1] > 1:  # the upper half is added to the lower
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def block_chunks(numel: int, row: int) -> int:
    """How many chunks the sums of the blocks of rows come in."""
    return 0 if numel == 0 else -(-(numel // row * -(-row // BLOCK)) // CHUNK)


def chunk_sums(values: Tensor) -> Tensor:
    """The sum of every chunk along the last dimension of a float64 tensor, in that dimension."""
    numel = values.shape[-1]
    whole = numel - numel % CHUNK
    chunks = _lane_sums(values[..., :whole].reshape(*values.shape[:-1], whole // CHUNK, CHUNK))
    if whole == numel:
        return chunks
    return torch.cat([chunks, _lane_sums(values[..., whole:].unsqueeze(-2))], dim=-1)


def _lane_sums(values: Tensor) -> Tensor:
    """The sum along the last dimension, in lanes."""
    return lane_total(ordered_sum(in_lanes(values)))


def in_lanes(values: Tensor) -> Tensor:
    """The last dimension as (steps, lanes), filled up with zeros: +0 changes no sum that begins with 0."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // LANES, LANES)


def ordered_sum(values: Tensor) -> Tensor:
    """The sum along the last but one dimension, added one after the other, starting from 0."""
    if values.device.type == "cpu" and values.shape[-2] > 0:
        return values.cumsum(-2)[..., -1, :]  # in order there; elsewhere it need not be
    total = values.new_zeros(values.shape[:-2] + values.shape[-1:])
    for value in values.unbind(-2):
        total = total + value
    return total


def lane_total(lanes: Tensor) -> Tensor:
    """The sum along the last dimension, which is of 16 lanes: in pairs."""
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return lanes[..., 0]


def pairwise_sum(values: Tensor) -> Tensor:
    """Adds along the last dimension in pairs, an odd one out moving up unchanged; 0 if there is nothing."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    while values.shape[-1] > 1:
        pairs = values[..., 0 : values.shape[-1] & ~1]
        summed = pairs[..., 0::2] + pairs[..., 1::2]
        values = torch.cat([summed, values[..., -1:]], dim=-1) if values.shape[-1] & 1 else summed
    return values[..., 0]


def numbers(grad: Tensor) -> Tensor:
    """The numbers that a gradient has: all of a dense one; of a sparse one those that it holds, one for an element."""
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
