"""Sums over tensors that have a second moment for each element, before the step of a rule that normalizes.

Kernels have the arguments of those of sums.py.
"""

import triton
import triton.language as tl

from . import table as words
from .codes import BLOCK, decode_unsigned, unit_of
from .formats import CODES
from .normalize import moments_of, moved, over_root
from .reduce import CHUNK, CHUNKS, chunk_sums, length_of_chunk, squared
from .sums import eps_of, find, multiplier_of, square_of_weight
from .tiles import load, load_dense, store

# ---- terms of sums: see reduce.chunk_sums ------------------------------------------------------


@triton.jit
def _square_of_quotient(source, place, FORMATS: tl.constexpr, WHOLE: tl.constexpr):
    """Where the step brings second moments up to date. FORMATS: of the gradient, and of the second moment in bits 3."""
    address, multiplier, second, scales, length, moments = source
    begin, offsets, mask = place
    g = load_dense(address, FORMATS & 7, place, WHOLE) * multiplier
    if FORMATS >> 3 == CODES:
        at = begin + offsets
        line = at // length
        block = line * ((length + BLOCK - 1) // BLOCK) + (at - line * length) // BLOCK
        units = unit_of(tl.load(scales.to(tl.pointer_type(tl.uint8)) + block, mask=mask, other=0))
        held = decode_unsigned(load(second, tl.uint8, place, WHOLE), units)
    else:
        held = load_dense(second, FORMATS >> 3, place, WHOLE)
    average = moved(held, g * g, moments)
    return squared(tl.where(mask, over_root(g, average, moments[3], True), 0.0))


@triton.jit
def _square_of_vector_update(source, place, GRAD: tl.constexpr, WHOLE: tl.constexpr):
    """Brings second moments up to date on the way."""
    address, multiplier, second, eps, moments = source
    g = load_dense(address, GRAD, place, WHOLE) * multiplier
    square = g * g
    square = tl.where(moments[4], square, square + eps)
    average = moved(load(second, tl.float32, place, WHOLE), square, moments)
    store(second, average, tl.float32, place, WHOLE)
    return squared(tl.where(place[2], over_root(g, average, moments[3], moments[4]), 0.0))


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def quotient_kernel(
    table,
    cuts,
    groups,
    derived,
    doubles,
    floats,
    count,
    GRAD: tl.constexpr,
    SECOND: tl.constexpr,
    STATE: tl.constexpr,
):
    """Sums squared updates by chunk, where the step brings second moments up to date."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_PARTS)
    if steps:
        chunk = program * CHUNKS + tl.arange(0, CHUNKS)
        begin = chunk * CHUNK
        length = length_of_chunk(begin, tl.load(row + words.NUMEL))
        is_aligned = tl.load(row + words.IS_ALIGNED) != 0
        second, scales = tl.load(row + words.STATES + STATE), tl.load(row + words.SCALES + STATE)
        source = (
            tl.load(row + words.GRAD),
            multiplier_of(derived),
            second,
            scales,
            tl.load(row + words.ROW),
            moments_of(derived),
        )
        updates = chunk_sums(_square_of_quotient, source, begin, length, is_aligned, GRAD | (SECOND << 3))
        tl.store(doubles + tl.load(cut + words.UPDATE_SUMS) + chunk, updates, mask=length > 0)


@triton.jit(do_not_specialize=["count"])
def vector_kernel(table, cuts, groups, derived, doubles, floats, count, EPS: tl.constexpr, FORMATS: tl.constexpr):
    """Brings second moments up to date. Sums squared updates by chunk and, where wanted, squared weights."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_PARTS)
    if steps:
        moments = moments_of(derived)
        chunk = program * CHUNKS + tl.arange(0, CHUNKS)
        begin = chunk * CHUNK
        length = length_of_chunk(begin, tl.load(row + words.NUMEL))
        is_aligned = tl.load(row + words.IS_ALIGNED) != 0
        eps = eps_of(row, groups, EPS).to(tl.float32)
        source = (tl.load(row + words.GRAD), multiplier_of(derived), tl.load(cut + words.SECOND), eps, moments)
        GRAD: tl.constexpr = (FORMATS >> 3) & 7
        updates = chunk_sums(_square_of_vector_update, source, begin, length, is_aligned, GRAD)
        tl.store(doubles + tl.load(cut + words.UPDATE_SUMS) + chunk, updates, mask=length > 0)
        if moments[5]:
            weights = chunk_sums(square_of_weight, row, begin, length, is_aligned, FORMATS)
            tl.store(doubles + tl.load(cut + words.PARAM_SUMS) + chunk, weights, mask=length > 0)
