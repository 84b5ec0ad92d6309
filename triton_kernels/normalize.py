"""What is shared by rules that divide a gradient by the root of its second moment before the update, and must know the
RMS of the quotient before they can take the step: csrc/rules/normalize.h in Triton.

Such a rule's hyperparameters begin with the moments, none of which depends on a sum: (what averages keep, what they
take, floor of the mean of row averages, floor under the root, whether there are floors, whether squared weights are
wanted).
"""

import triton
import triton.language as tl

from . import table as words
from .arithmetic import float_of, inverse_root, maximum, root
from .codes import BLOCK

MOMENTS = tl.constexpr(6)
_FAR = tl.constexpr(1 << 30)  # farther than a tile reaches


@triton.jit
def moments_of(derived):
    """See above; the last two as booleans."""
    keep = float_of(tl.load(derived + words.HYPER))
    take = float_of(tl.load(derived + words.HYPER + 1))
    least_mean = float_of(tl.load(derived + words.HYPER + 2))
    least = float_of(tl.load(derived + words.HYPER + 3))
    is_clamped = float_of(tl.load(derived + words.HYPER + 4)) != 0.0
    reads_weights = float_of(tl.load(derived + words.HYPER + 5)) != 0.0
    return keep, take, least_mean, least, is_clamped, reads_weights


@triton.jit
def moved(held, value, moments):
    """An average that has taken in one more value."""
    return moments[0] * held + moments[1] * value


@triton.jit
def moved_by_mean(held, square_sum, count, eps, moments):
    """The new average of a row or column of `count` elements with this sum of squares; `eps` in float64."""
    mean = square_sum / count.to(tl.float64)
    return moved(held, tl.where(moments[4], mean, mean + eps).to(tl.float32), moments)


@triton.jit
def floored(x, least):
    """The maximum with a single number: the interpreter does not mix booleans of scalars with those of vectors."""
    return maximum(x, tl.zeros_like(x) + least)


@triton.jit
def row_factor(average, mean, moments):
    """The factor of a row, by which its elements are multiplied; `mean` is the mean of the row averages."""
    if moments[4]:
        factor = tl.div_rn(average, floored(mean, moments[2]))
    else:
        factor = inverse_root(tl.div_rn(average, mean))
    return factor


@triton.jit
def column_factor(average, moments):
    """The same for a column."""
    factor = average
    if not moments[4]:
        factor = inverse_root(average)
    return factor


@triton.jit
def over_root(g, second, least, is_clamped):
    """A gradient over the root of its second moment."""
    if is_clamped:
        second = floored(second, least)
    return tl.div_rn(g, root(second))


@triton.jit
def scaled(g, row, column, least, is_clamped):
    """The same, with the product of two factors as the second moment; or the gradient times these factors."""
    if is_clamped:
        u = over_root(g, row * column, least, True)
    else:
        u = (row * column) * g
    return u


# ---- in a step ---------------------------------------------------------------------------------


@triton.jit
def by_second_moment(g, second, hyper):
    """What takes the gradient's place; the second moment is up to date already."""
    return over_root(g, second, hyper[3], hyper[4] != 0.0)


@triton.jit
def _walk(place, offsets, count):
    """Elements `offsets` (int32) after `place`, where places wrap at `count`: turns (int32) and places (int64)."""
    period = tl.minimum(count, _FAR).to(tl.int32)
    beyond = offsets - tl.minimum(count - place, _FAR).to(tl.int32)
    turns = tl.where(beyond < 0, 0, tl.maximum(beyond, 0) // period + 1)
    return turns, tl.where(beyond < 0, place + offsets, beyond - (turns - 1) * period)


@triton.jit
def _places_of(begin, offsets, extents):
    """The rows and columns of elements `offsets` after `begin`, both counted through all matrices.

    There is no 64-bit division for each element.
    """
    row_count, column_count = extents
    line = begin // column_count
    matrix = line // row_count
    lines, column = _walk(begin - line * column_count, offsets, column_count)
    matrices, _ = _walk(line - matrix * row_count, lines, row_count)
    return line + lines, (matrix + matrices) * column_count + column


@triton.jit
def _factors_of_blocks(rows, columns, begin, extents, COUNT: tl.constexpr):
    """For whole blocks, each within one row: the factors of their columns lie in aligned memory."""
    line, column = _places_of(begin, tl.arange(0, COUNT) * BLOCK, extents)
    of_rows = tl.broadcast_to(tl.load(rows + line)[:, None], (COUNT, BLOCK))
    return of_rows, tl.load((columns + column // BLOCK * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :])


@triton.jit
def _factors_of_elements(rows, columns, begin, offsets, extents):
    line, column = _places_of(begin, offsets, extents)
    return tl.load(rows + line), tl.load(columns + column)


@triton.jit
def by_factors(row, derived, g, hyper, place, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """The same for one matrix or several, from the factors of rows and columns."""
    begin, offsets, mask = place
    row_count = tl.load(row + words.ROW_COUNT)
    column_count = tl.load(row + words.COLUMN_COUNT)
    factors = (derived + words.FACTORS).to(tl.pointer_type(tl.int64))
    rows = tl.load(factors).to(tl.pointer_type(tl.float32))
    columns = tl.load(factors + 1).to(tl.pointer_type(tl.float32))
    if WHOLE:
        extents = (row_count, column_count)
        if column_count % BLOCK == 0:
            of_rows, of_columns = _factors_of_blocks(rows, tl.multiple_of(columns, 16), begin, extents, COUNT)
        else:
            of_rows, of_columns = _factors_of_elements(rows, columns, begin, offsets, extents)
    else:
        line = (begin + offsets) // column_count
        column = begin + offsets - line * column_count
        of_rows = tl.load(rows + line, mask=mask, other=0.0)
        of_columns = tl.load(columns + line // row_count * column_count + column, mask=mask, other=0.0)
    return scaled(g, of_rows, of_columns, hyper[3], hyper[4] != 0.0)
