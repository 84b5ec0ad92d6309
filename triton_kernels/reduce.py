"""Sums of squares of gradients for their norm: the additions of fusedopt/reference/norm.py in the same order.

A sum has the bits of one that leaves out what is past the end, because adding 0 to it changes none.
"""

import triton
import triton.language as tl

from . import table as words
from .formats import BFLOAT16, FLOAT16, decode16
from .table import find_row

LANES = tl.constexpr(16)  # of a chunk, each summed in order
TERMS = tl.constexpr(256)  # of a lane
CHUNKS = tl.constexpr(8)  # of a program
PAIRS = tl.constexpr(64)  # numbers that are added in pairs at a time
ROWS = tl.constexpr(16)  # of them, of a program


@triton.jit
def in_pairs(x, ROWS: tl.constexpr, LENGTH: tl.constexpr, LEVELS: tl.constexpr):
    """The sums of the rows of (ROWS, LENGTH = 2^LEVELS) numbers, in pairs."""
    for level in tl.static_range(LEVELS):
        a, b = tl.split(tl.reshape(x, (ROWS, LENGTH >> (level + 1), 2)))
        x = a + b
    return tl.reshape(x, (ROWS,))


@triton.jit(do_not_specialize=["count"])
def square_sum_kernel(table, sums, count):
    """The sum of the squares of each chunk of 4,096 elements; programs of 8 chunks of one tensor."""
    program = tl.program_id(0)
    row = table + find_row(table, count, program, words.FIRST_SUM_PROGRAM) * words.WIDTH
    numel = tl.load(row + words.NUMEL)
    dtype = (tl.load(row + words.FORMATS) >> 3) & 7
    grad = tl.load(row + words.GRAD)
    chunk = (program - tl.load(row + words.FIRST_SUM_PROGRAM)) * CHUNKS + tl.arange(0, CHUNKS)
    at = (chunk * (LANES * TERMS))[:, None] + tl.arange(0, LANES)[None, :]
    total = tl.zeros((CHUNKS, LANES), tl.float64)
    for _ in range(TERMS):
        mask = at < numel
        if dtype == 0:
            x = tl.load(grad.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
        else:
            codes = tl.load(grad.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
            x = tl.where(dtype == 1, decode16(codes, BFLOAT16), decode16(codes, FLOAT16))
        wide = x.to(tl.float64)
        total = total + wide * wide  # the product is exact
        at += LANES
    exists = chunk * (LANES * TERMS) < numel
    tl.store(sums + tl.load(row + words.FIRST_CHUNK) + chunk, in_pairs(total, CHUNKS, LANES, 4), mask=exists)


@triton.jit(do_not_specialize=["count"])
def pairwise_kernel(numbers, sums, count):
    """Adds each 64 numbers in pairs, an odd one out moving up; the same to the results gives pairs over all."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    x = tl.load(numbers + at, mask=at < count, other=0.0)
    tl.store(sums + row, in_pairs(x, ROWS, PAIRS, 6), mask=row * PAIRS < count)
