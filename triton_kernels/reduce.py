"""Sums in a fixed order, with the additions of fusedopt/reference/norm.py, and the gradient norm.

Elements past the end count as 0, which changes no bit of a sum.
"""

import triton
import triton.language as tl

from fusedopt import _core

from . import table as words
from .formats import BFLOAT16, FLOAT16, FLOAT32, decode16
from .table import find_row
from .tiles import load

CHUNK = tl.constexpr(_core.reduction_chunk)  # elements
LANES = tl.constexpr(_core.sum_lanes)  # of a chunk, each summed in order
TERMS = tl.constexpr(_core.reduction_chunk // _core.sum_lanes)  # of a lane
CHUNKS = tl.constexpr(16)  # of a program
PAIRS = tl.constexpr(64)  # numbers that are added in pairs at a time
ROWS = tl.constexpr(16)  # of them, of a program
AT_ONCE = tl.constexpr(4)  # loads under way, one after the other
_LEVELS = tl.constexpr(24)  # of pairs of blocks


@triton.jit
def in_pairs(x, ROWS: tl.constexpr, LENGTH: tl.constexpr, LEVELS: tl.constexpr):
    """The sums of the rows of (ROWS, LENGTH = 2^LEVELS) numbers, in pairs."""
    for level in tl.static_range(LEVELS):
        a, b = tl.split(tl.reshape(x, (ROWS, LENGTH >> (level + 1), 2)))
        x = a + b
    return tl.reshape(x, (ROWS,))


@triton.jit
def in_halves(x, ROWS: tl.constexpr, LENGTH: tl.constexpr, LEVELS: tl.constexpr):
    """The same, by adding the upper half to the lower one until a single number is left."""
    for level in tl.static_range(LEVELS):
        # Of two numbers there is one sum, whatever the order in which a device reduces.
        x = tl.sum(tl.reshape(x, (ROWS, 2, LENGTH >> (level + 1))), 1)
    return tl.reshape(x, (ROWS,))


@triton.jit
def chunk_sums(TERM: tl.constexpr, source, begin, length, is_aligned, FORMATS: tl.constexpr):
    """The sums of CHUNKS chunks.

    TERM(source, place, FORMATS, WHOLE) gives float64 terms, `length` of each chunk from `begin` on, and 0 where none
    exists. `is_aligned`: each `begin` is a multiple of 16 in aligned memory.
    """
    total = tl.zeros((CHUNKS, LANES), tl.float64)
    lanes = tl.arange(0, LANES)[None, :]
    base = tl.min(begin, 0)
    begin = (begin - base)[:, None]
    whole = tl.where(is_aligned, tl.min(length, 0) // (LANES * AT_ONCE) * AT_ONCE, 0)
    multiple = begin // LANES * LANES  # now the compiler knows it
    for term in range(0, whole, AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            at = multiple + ((term + k) * LANES + lanes)
            total = total + TERM(source, (base, at, at >= 0), FORMATS, True)
    for term in range(whole, (tl.max(length, 0) + LANES - 1) // LANES, AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            lane = (term + k) * LANES + lanes
            total = total + TERM(source, (base, begin + lane, lane < length[:, None]), FORMATS, False)
    return in_pairs(total, CHUNKS, LANES, 4)


@triton.jit
def length_of_chunk(begin, numel):
    """How many elements there are of a chunk that begins there."""
    return tl.minimum(tl.maximum(numel - begin, 0), CHUNK)


@triton.jit
def squared(x):
    """In float64, exact."""
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def single(numbers, place, _: tl.constexpr, WHOLE: tl.constexpr):
    """A term: float32 numbers as they are."""
    return load(numbers, tl.float32, place, WHOLE).to(tl.float64)


# ---- any number of numbers in pairs ------------------------------------------------------------
#
# Blocks of 2^k numbers come one after the other. At each `level`, a stack has the sum of the last complete 2^level of
# them, if the number of blocks so far has that bit: sums are added as soon as they form a pair, and odd ones wait.


@triton.jit
def empty_stack(ROWS: tl.constexpr):
    """A stack for ROWS sums side by side."""
    stack = ()
    for _ in tl.static_range(_LEVELS):
        stack = stack + (tl.zeros((ROWS,), tl.float64),)
    return stack


@triton.jit
def pushed(stack, index, total):
    """The stack after adding the sums of block `index`, the next one."""
    after = ()
    carried = (index & 0) == 0
    for level in tl.static_range(_LEVELS):
        is_held = ((index >> level) & 1) == 1
        after = after + (tl.where(carried, total, stack[level]),)
        total = stack[level] + total
        carried = carried & is_held
    return after


@triton.jit
def popped(stack, count):
    """The sums of all `count` blocks."""
    total = tl.zeros_like(stack[0])
    for level in tl.static_range(_LEVELS):
        total = tl.where(((count >> level) & 1) == 1, stack[level] + total, total)
    return total


@triton.jit
def paired(numbers, begin, count, ROWS: tl.constexpr, LENGTH: tl.constexpr, LEVELS: tl.constexpr):
    """The sums in pairs of `count` numbers each, from `begin` on: ROWS of them, LENGTH = 2^LEVELS at a time."""
    stack = empty_stack(ROWS)
    blocks = (tl.max(count, 0) + LENGTH - 1) // LENGTH
    for block in range(blocks):
        at = block * LENGTH + tl.arange(0, LENGTH)[None, :]
        x = tl.load(numbers + begin[:, None] + at, mask=at < count[:, None], other=0.0)
        stack = pushed(stack, block, in_pairs(x, ROWS, LENGTH, LEVELS))
    return popped(stack, blocks)


# ---- the gradient norm -------------------------------------------------------------------------


@triton.jit
def _square_of_gradient(source, place, FORMATS: tl.constexpr, WHOLE: tl.constexpr):
    address, dtype = source
    if dtype == FLOAT32:
        x = load(address, tl.float32, place, WHOLE)
    else:
        codes = load(address, tl.uint16, place, WHOLE)
        x = tl.where(dtype == BFLOAT16, decode16(codes, BFLOAT16), decode16(codes, FLOAT16))
    return squared(x)


@triton.jit
def find_chunks(table, count):
    """A program's tensor, and the CHUNKS chunks of it that the program takes."""
    program = tl.program_id(0)
    row = table + find_row(table, count, program, words.FIRST_SUM_PROGRAM) * words.WIDTH
    return row, (program - tl.load(row + words.FIRST_SUM_PROGRAM)) * CHUNKS + tl.arange(0, CHUNKS)


@triton.jit(do_not_specialize=["count"])
def square_sum_kernel(table, sums, count):
    """The sum of the squares of each chunk."""
    row, chunk = find_chunks(table, count)
    source = (tl.load(row + words.GRAD), (tl.load(row + words.FORMATS) >> 3) & 7)
    begin = chunk * CHUNK
    length = length_of_chunk(begin, tl.load(row + words.NUMEL))
    is_aligned = tl.load(row + words.IS_ALIGNED) != 0
    total = chunk_sums(_square_of_gradient, source, begin, length, is_aligned, 0)
    tl.store(sums + tl.load(row + words.FIRST_CHUNK) + chunk, total, mask=length > 0)


@triton.jit(do_not_specialize=["count"])
def pairwise_kernel(numbers, sums, count):
    """Adds every 64 numbers in pairs, an odd one out moving up; repeated on the results, it adds all in pairs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    x = tl.load(numbers + at, mask=at < count, other=0.0)
    tl.store(sums + row, in_pairs(x, ROWS, PAIRS, 6), mask=row * PAIRS < count)
