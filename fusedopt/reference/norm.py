"""The sum of squares behind the gradient norm, in an order that no thread count changes.

A gradient is cut into chunks of 4,096 elements. A chunk is summed in 16 lanes, each in order, and the
lanes in pairs; the chunks of all gradients are then added in pairs, in list order. All in double.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096
LANES = 16


def square_sums(grad: Tensor) -> Tensor:
    """The sum of squares of every chunk of a gradient: float64, one element per chunk."""
    values = torch.view_as_real(grad) if grad.is_complex() else grad
    values = values.reshape(-1).double()
    chunks = -(-values.numel() // CHUNK)
    squares = torch.zeros(chunks * CHUNK, dtype=torch.float64, device=grad.device)
    squares[: values.numel()] = values * values  # the padding adds +0 and changes no sum
    squares = squares.reshape(chunks, CHUNK // LANES, LANES)
    lanes = torch.zeros(chunks, LANES, dtype=torch.float64, device=grad.device)
    for row in range(CHUNK // LANES):
        lanes = lanes + squares[:, row]
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    return lanes[:, 0]


def pairwise_sum(values: Tensor) -> Tensor:
    """Adds a 1-D tensor in pairs, an odd one out moving up unchanged; 0 if it is empty."""
    if values.numel() == 0:
        return values.new_zeros(())
    while values.numel() > 1:
        pairs = values[0 : values.numel() & ~1]
        summed = pairs[0::2] + pairs[1::2]
        values = torch.cat([summed, values[-1:]]) if values.numel() & 1 else summed
    return values[0]
