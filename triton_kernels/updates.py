"""Sums of squares of updates and weights, which a step takes on its way: fusedopt/reference/norm.py in Triton.

A step stores two float32 of each block. Those of a tensor's updates lie from its FIRST_BLOCK_SUM on, those of its
weights `room_of` its blocks further. A kernel of its own then adds them as any row of numbers.
"""

import triton
import triton.language as tl

from . import table as words
from .codes import BLOCK
from .reduce import CHUNK, LANES, chunk_sums, find_chunks, in_halves, length_of_chunk, single
from .tiles import extents_of


@triton.jit
def room_of(blocks):
    """Numbers that are set aside for one sum of each block: both rows of sums begin where vectors can be read."""
    return (blocks + LANES - 1) // LANES * LANES


@triton.jit
def store_block_sums(block_sums, row, scales, blocks, update, weight, COUNT: tl.constexpr):
    """Stores both sums of COUNT blocks of a tensor that has `blocks`; `scales` says which, as of their scales."""
    first, order, exists = scales
    at = block_sums + tl.load(row + words.FIRST_BLOCK_SUM) + first + order
    tl.store(at, in_halves(update * update, COUNT, BLOCK, 6), mask=exists)
    tl.store(at + room_of(blocks), in_halves(weight * weight, COUNT, BLOCK, 6), mask=exists)


@triton.jit(do_not_specialize=["count", "chunks"])
def update_sum_kernel(table, block_sums, sums, count, chunks):
    """The sum of each of `chunks` chunks of blocks' sums: first of updates, then of weights, by another program each.

    Programs are those of `square_sum_kernel`: a tensor has no more blocks than elements, so some have nothing to do.
    """
    row, chunk = find_chunks(table, count)
    kind = tl.program_id(1)
    _, extents = extents_of(row)
    blocks = extents[0]
    begin = chunk * CHUNK
    length = length_of_chunk(begin, blocks)
    first = tl.load(row + words.FIRST_BLOCK_SUM) + kind * room_of(blocks)
    total = chunk_sums(single, block_sums, first + begin, length, True, 0)
    tl.store(sums + kind * chunks + tl.load(row + words.FIRST_OF_BLOCK_CHUNKS) + chunk, total, mask=length > 0)
