"""Sums over tensors before the step of a rule that normalizes: of squared gradients along rows and columns, of squared
weights and updates. csrc/cuda/normalize.cuh in Triton, with the order of additions of fusedopt/reference/factored.py.

All kernels have the same arguments: tables of tensors, of how these are cut up, of groups and of what is derived, the
workspaces for float64 and for float32, and the number of tensors. EPS says which hyperparameter is added to squares.
"""

import triton
import triton.language as tl

from fusedopt import _core

from . import table as words
from .arithmetic import inverse_root
from .normalize import (
    column_factor,
    moments_of,
    moved_by_mean,
    row_factor,
    scaled,
)
from .reduce import (
    CHUNK,
    CHUNKS,
    LANES,
    chunk_sums,
    empty_stack,
    in_pairs,
    length_of_chunk,
    paired,
    popped,
    pushed,
    single,
    squared,
)
from .table import find_row
from .tiles import load_dense, load_param

AVERAGED_ROWS = tl.constexpr(128)  # of a program
STRIP = tl.constexpr(256)  # columns
AVERAGED_COLUMNS = tl.constexpr(32)
SUMMED_UNITS = tl.constexpr(16)
GROUP = tl.constexpr(_core.weighed_rows)  # whose weighted squares are added in float32
_SLABS = tl.constexpr(_core.max_slabs)


@triton.jit
def find(table, cuts, derived, count, FIRST: tl.constexpr):
    """A program's tensor: its rows of the tables, whether it is stepped at all, and the program's number within it."""
    program = tl.program_id(0)
    index = find_row(cuts, count, program, FIRST, words.CUT_WIDTH)
    cut = cuts + index * words.CUT_WIDTH
    derived = derived + index * words.DERIVED_WIDTH
    steps = tl.load(derived + words.SKIPS) == 0
    return table + index * words.WIDTH, cut, derived, steps, program - tl.load(cut + FIRST)


@triton.jit
def eps_of(row, groups, EPS: tl.constexpr):
    """What is added to squares, in float64."""
    group = groups + tl.load(row + words.GROUP) * words.GROUP_WIDTH
    return tl.load(group + words.CONFIG + EPS).to(tl.float64, bitcast=True)


@triton.jit
def _averages(row, WORD: tl.constexpr):
    return tl.load(row + WORD).to(tl.pointer_type(tl.float32))


@triton.jit
def multiplier_of(derived):
    """Of a tensor's gradients."""
    return tl.load(derived + words.MULTIPLIER).to(tl.float32, bitcast=True)


@triton.jit
def _parts(row, cut, program):
    """The parts of rows within panels: their numbers, rows, panels, first elements and lengths."""
    column_count = tl.load(row + words.COLUMN_COUNT)
    panels = tl.load(cut + words.PANELS)
    part = program * CHUNKS + tl.arange(0, CHUNKS)
    line = part // panels
    panel = part - line * panels
    left = tl.minimum(column_count - panel * CHUNK, CHUNK)
    length = tl.where(line < tl.load(cut + words.MATRICES) * tl.load(row + words.ROW_COUNT), left, 0)
    is_aligned = (tl.load(row + words.IS_ALIGNED) != 0) & (column_count % LANES == 0)
    return part, line, panel, line * column_count + panel * CHUNK, length, is_aligned


@triton.jit
def _rows_of(slab, row, cut):
    """The first row of a slab, counted through all matrices, and how many it has."""
    row_count = tl.load(row + words.ROW_COUNT)
    height = tl.load(cut + words.HEIGHT)
    slabs = tl.load(cut + words.SLABS)
    matrix = slab // slabs
    begin = (slab - matrix * slabs) * height
    return matrix * row_count + begin, tl.minimum(height, row_count - begin)


# ---- terms of sums: see reduce.chunk_sums ------------------------------------------------------


@triton.jit
def _square_of_gradient(source, place, GRAD: tl.constexpr, WHOLE: tl.constexpr):
    address, multiplier = source
    return squared(load_dense(address, GRAD, place, WHOLE) * multiplier)


@triton.jit
def square_of_weight(row, place, FORMATS: tl.constexpr, WHOLE: tl.constexpr):
    """A term."""
    return squared(load_param(row, FORMATS, place, WHOLE))


@triton.jit
def _square_of_matrix_update(source, place, GRAD: tl.constexpr, WHOLE: tl.constexpr):
    """Where there are floors. Factors of columns lie `ahead` elements before the gradients' places."""
    address, multiplier, of_rows, columns, ahead, least = source
    begin, offsets, mask = place
    g = load_dense(address, GRAD, place, WHOLE) * multiplier
    of_columns = tl.load(columns + (begin + offsets - ahead[:, None]), mask=mask, other=0.0)
    return squared(tl.where(mask, scaled(g, of_rows[:, None], of_columns, least, True), 0.0))


# ---- matrices: sums of rows and columns ----------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def row_sum_kernel(table, cuts, groups, derived, doubles, floats, count, GRAD: tl.constexpr):
    """The sum of the squares of each row's part in a panel."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_PARTS)
    if steps:
        part, _, _, begin, length, is_aligned = _parts(row, cut, program)
        source = (tl.load(row + words.GRAD), multiplier_of(derived))
        total = chunk_sums(_square_of_gradient, source, begin, length, is_aligned, GRAD)
        tl.store(doubles + tl.load(cut + words.ROW_SUMS) + part, total, mask=length > 0)


@triton.jit(do_not_specialize=["count"])
def row_average_kernel(table, cuts, groups, derived, doubles, floats, count, EPS: tl.constexpr):
    """Brings the averages of rows up to date. Their weights in sums of columns lie where their factors will be."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_ROWS)
    if steps:
        panels = tl.load(cut + words.PANELS)
        line = program * AVERAGED_ROWS + tl.arange(0, AVERAGED_ROWS)
        exists = line < tl.load(cut + words.MATRICES) * tl.load(row + words.ROW_COUNT)
        parts = tl.where(exists, panels, 0)
        square_sum = paired(doubles + tl.load(cut + words.ROW_SUMS), line * panels, parts, AVERAGED_ROWS, 1, 0)
        at = _averages(row, words.ROW_AVERAGES) + line
        eps = eps_of(row, groups, EPS)
        column_count = tl.load(row + words.COLUMN_COUNT)
        average = moved_by_mean(tl.load(at, mask=exists), square_sum, column_count, eps, moments_of(derived))
        tl.store(at, average, mask=exists)
        tl.store(floats + tl.load(cut + words.ROW_FACTORS) + line, inverse_root(average), mask=exists)


@triton.jit
def _add_rows(sums, weighted, source, line, left, columns, GRAD: tl.constexpr, WHOLE: tl.constexpr):
    """The sums of squares of columns, and the weighted ones, after one more group of rows, of which `left` exist."""
    address, multiplier, weights, column_count = source
    t = ()
    for k in tl.static_range(GROUP):
        place = ((line + k) * column_count, columns, columns < tl.where(left > k, column_count, 0))
        g = load_dense(address, GRAD, place, WHOLE) * multiplier
        x = g * tl.load(weights + line + k, mask=left > k, other=0.0)
        sums = sums + squared(g)
        t = t + (x * x,)
    return sums, weighted + ((t[0] + t[1]) + (t[2] + t[3])).to(tl.float64)


@triton.jit(do_not_specialize=["count"])
def column_sum_kernel(table, cuts, groups, derived, doubles, floats, count, GRAD: tl.constexpr):
    """Both sums of each column of a slab: a program takes a strip of columns of a slab."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_STRIPS)
    if steps:
        column_count = tl.load(row + words.COLUMN_COUNT)
        strips = (column_count + STRIP - 1) // STRIP
        slab = program // strips
        begin = (program - slab * strips) * STRIP
        columns = begin + tl.arange(0, STRIP)
        exists = columns < column_count
        line, rows = _rows_of(slab, row, cut)
        weights = floats + tl.load(cut + words.ROW_FACTORS)
        source = (tl.load(row + words.GRAD), multiplier_of(derived), weights, column_count)
        sums = tl.zeros((STRIP,), tl.float64)
        weighted = tl.zeros((STRIP,), tl.float64)
        is_whole = (tl.load(row + words.IS_ALIGNED) != 0) & (column_count % LANES == 0)
        is_whole = is_whole & (begin + STRIP <= column_count)
        whole = tl.where(is_whole, rows // GROUP * GROUP, 0)
        for at in range(0, whole, GROUP):
            sums, weighted = _add_rows(sums, weighted, source, line + at, rows - at, columns, GRAD, True)
        for at in range(whole, rows, GROUP):
            sums, weighted = _add_rows(sums, weighted, source, line + at, rows - at, columns, GRAD, False)
        place = doubles + slab * column_count + columns
        tl.store(place + tl.load(cut + words.COLUMN_SUMS), sums, mask=exists)
        tl.store(place + tl.load(cut + words.WEIGHTED_SUMS), weighted, mask=exists)


# ---- matrices: averages and factors --------------------------------------------------------------


@triton.jit
def _sum_of_slabs(sums, begin, exists, slabs, stride):
    order = tl.arange(0, _SLABS)[None, :]
    x = tl.load(sums + begin[:, None] + order * stride, mask=exists[:, None] & (order < slabs), other=0.0)
    return in_pairs(x, AVERAGED_COLUMNS, _SLABS, 6)


@triton.jit(do_not_specialize=["count"])
def column_average_kernel(table, cuts, groups, derived, doubles, floats, count, EPS: tl.constexpr):
    """Brings the averages of columns up to date. Stores their factors, and the part of each in squared updates."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_COLUMNS)
    if steps:
        row_count = tl.load(row + words.ROW_COUNT)
        column_count = tl.load(row + words.COLUMN_COUNT)
        slabs = tl.load(cut + words.SLABS)
        column = program * AVERAGED_COLUMNS + tl.arange(0, AVERAGED_COLUMNS)  # counted through all matrices
        matrix = column // column_count
        exists = matrix < tl.load(cut + words.MATRICES)
        begin = matrix * slabs * column_count + (column - matrix * column_count)
        square_sum = _sum_of_slabs(doubles + tl.load(cut + words.COLUMN_SUMS), begin, exists, slabs, column_count)
        moments = moments_of(derived)
        at = _averages(row, words.COLUMN_AVERAGES) + column
        average = moved_by_mean(tl.load(at, mask=exists), square_sum, row_count, eps_of(row, groups, EPS), moments)
        tl.store(at, average, mask=exists)
        factor = column_factor(average, moments)
        tl.store(floats + tl.load(cut + words.COLUMN_FACTORS) + column, factor, mask=exists)
        sums = doubles + tl.load(cut + words.WEIGHTED_SUMS)
        weighted = _sum_of_slabs(sums, begin, exists, slabs, column_count)
        # In place of the first slab's sum, which the value depends on, so that has been read by then.
        tl.store(sums + begin, weighted / average.to(tl.float64), mask=exists)


@triton.jit(do_not_specialize=["count"])
def mean_kernel(table, cuts, groups, derived, doubles, floats, count):
    """A program per matrix: the mean of its row averages and, from weighted sums, the sum of its squared updates."""
    row, cut, derived, steps, matrix = find(table, cuts, derived, count, words.FIRST_OF_MATRICES)
    if steps:
        row_count = tl.load(row + words.ROW_COUNT)
        column_count = tl.load(row + words.COLUMN_COUNT)
        averages = tl.load(row + words.ROW_AVERAGES)
        stack = empty_stack(1)
        blocks = (row_count + CHUNKS * CHUNK - 1) // (CHUNKS * CHUNK)
        for block in range(blocks):
            begin = (block * CHUNKS + tl.arange(0, CHUNKS)) * CHUNK
            length = length_of_chunk(begin, row_count)
            total = chunk_sums(single, averages, matrix * row_count + begin, length, False, 0)
            stack = pushed(stack, block, in_pairs(total[None, :], 1, CHUNKS, 4))
        mean = (popped(stack, blocks) / row_count.to(tl.float64)).to(tl.float32)
        own = matrix + tl.arange(0, 1)
        tl.store(floats + tl.load(cut + words.MEANS) + own, mean)
        begin = own * tl.load(cut + words.SLABS) * column_count
        weighted = paired(doubles + tl.load(cut + words.WEIGHTED_SUMS), begin, column_count + own * 0, 1, 256, 8)
        # If there are floors, unit_sum_kernel overwrites these.
        tl.store(doubles + tl.load(cut + words.UPDATE_SUMS) + own, weighted * mean.to(tl.float64))


@triton.jit(do_not_specialize=["count"])
def row_factor_kernel(table, cuts, groups, derived, doubles, floats, count):
    """The factors of rows, from their averages and the means of these."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_ROWS)
    if steps:
        row_count = tl.load(row + words.ROW_COUNT)
        line = program * AVERAGED_ROWS + tl.arange(0, AVERAGED_ROWS)
        exists = line < tl.load(cut + words.MATRICES) * row_count
        average = tl.load(_averages(row, words.ROW_AVERAGES) + line, mask=exists, other=1.0)
        mean = tl.load(floats + tl.load(cut + words.MEANS) + line // row_count, mask=exists, other=1.0)
        factor = row_factor(average, mean, moments_of(derived))
        tl.store(floats + tl.load(cut + words.ROW_FACTORS) + line, factor, mask=exists)


# ---- sums of units -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def part_sum_kernel(table, cuts, groups, derived, doubles, floats, count, FORMATS: tl.constexpr):
    """The sums of squared weights and of squared updates of each row's part in a panel, where they are wanted."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_PARTS)
    moments = moments_of(derived)
    if steps & (moments[4] | moments[5]):
        part, line, panel, begin, length, is_aligned = _parts(row, cut, program)
        if moments[5]:
            weights = chunk_sums(square_of_weight, row, begin, length, is_aligned, FORMATS)
            tl.store(doubles + tl.load(cut + words.WEIGHT_SUMS) + part, weights, mask=length > 0)
        if moments[4]:
            exists = length > 0
            of_rows = tl.load(floats + tl.load(cut + words.ROW_FACTORS) + line, mask=exists, other=0.0)
            columns = floats + tl.load(cut + words.COLUMN_FACTORS)
            matrix = line // tl.load(row + words.ROW_COUNT)
            ahead = begin - (matrix * tl.load(row + words.COLUMN_COUNT) + panel * CHUNK)
            source = (tl.load(row + words.GRAD), multiplier_of(derived), of_rows, columns, ahead, moments[3])
            GRAD: tl.constexpr = (FORMATS >> 3) & 7
            updates = chunk_sums(_square_of_matrix_update, source, begin, length, is_aligned, GRAD)
            tl.store(doubles + tl.load(cut + words.ROW_SUMS) + part, updates, mask=exists)


@triton.jit
def _in_order(numbers, first, count, stride, height):
    """The sums of `count` numbers each, added one after the other; no count exceeds `height`."""
    total = tl.zeros((SUMMED_UNITS,), tl.float64)
    for begin in range(0, height, 8):
        for k in tl.static_range(8):
            total = total + tl.load(numbers + first + (begin + k) * stride, mask=begin + k < count, other=0.0)
    return total


@triton.jit(do_not_specialize=["count"])
def unit_sum_kernel(table, cuts, groups, derived, doubles, floats, count):
    """Adds the rows of units in order, where the rows have been summed."""
    row, cut, derived, steps, program = find(table, cuts, derived, count, words.FIRST_OF_UNITS)
    moments = moments_of(derived)
    if steps & (moments[4] | moments[5]):
        height = tl.load(cut + words.HEIGHT)
        panels = tl.load(cut + words.PANELS)
        unit = program * SUMMED_UNITS + tl.arange(0, SUMMED_UNITS)
        exists = unit < tl.load(cut + words.UNITS)
        slab = unit // panels
        line, rows = _rows_of(slab, row, cut)
        first = line * panels + (unit - slab * panels)
        rows = tl.where(exists, rows, 0)
        if moments[5]:
            weights = _in_order(doubles + tl.load(cut + words.WEIGHT_SUMS), first, rows, panels, height)
            tl.store(doubles + tl.load(cut + words.PARAM_SUMS) + unit, weights, mask=exists)
        if moments[4]:
            updates = _in_order(doubles + tl.load(cut + words.ROW_SUMS), first, rows, panels, height)
            tl.store(doubles + tl.load(cut + words.UPDATE_SUMS) + unit, updates, mask=exists)
