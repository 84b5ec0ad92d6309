"""The table of a step's tensors in device memory: what its words are, and how programs find their row."""

import triton
import triton.language as tl

# A row has these int64. The first ones are what csrc/python/tensor_table.cpp writes, in its order.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
MASTER = tl.constexpr(2)
STATES = tl.constexpr(3)  # four of them
SCALES = tl.constexpr(7)  # four, of 8-bit states
STEP = tl.constexpr(11)
NUMEL = tl.constexpr(12)
# Blocks of codes, and segments, do not cross multiples of this; without any, all elements are one row.
ROW = tl.constexpr(13)
FIRST_INDEX = tl.constexpr(14)
GROUP = tl.constexpr(15)
# From bit 0 on, the DTypes of parameter, gradient and master, and the Master, three bits each; 12 the parameter's
# Rounding; 13 states' DTypes, three bits each; 25 their Roundings. See csrc/core/tensors.h.
FORMATS = tl.constexpr(16)
ROW_AVERAGES = tl.constexpr(17)  # of a second moment that is factored
COLUMN_AVERAGES = tl.constexpr(18)
ROW_COUNT = tl.constexpr(19)  # of one of the tensor's matrices
COLUMN_COUNT = tl.constexpr(20)
SEGMENT = tl.constexpr(21)  # elements that follow each other in the global tensor, too; 0 if all do
FIRST_BLOCK_SUM = SEGMENT  # in its place: where the sums of the tensor's blocks begin (updates.py)
SEGMENT_STRIDE = tl.constexpr(22)
ROW_GAP = SEGMENT_STRIDE  # in its place: how much more the global tensor's index grows from row to row than the place
FIRST_PROGRAM = tl.constexpr(23)  # of the tensor, in the launch that steps it
IS_ALIGNED = tl.constexpr(24)  # every buffer lies on a multiple of 16 bytes
FIRST_SUM_PROGRAM = tl.constexpr(25)  # of the tensor, in the launch that adds squares
FIRST_CHUNK = tl.constexpr(26)  # where its sums go
FIRST_OF_BLOCK_CHUNKS = tl.constexpr(27)  # where the sums go of the chunks of its blocks' sums
WIDTH = tl.constexpr(28)  # so that rows lie on multiples of 16 bytes, as of the next tables

# A row of the table of param groups; their hyperparameters follow, as float64.
LR = tl.constexpr(0)  # a pointer, or 0
LR_IS_DOUBLE = tl.constexpr(1)
SEED = tl.constexpr(2)
SIGN = tl.constexpr(3)  # float64, of gradients
MAX_GRAD_NORM = tl.constexpr(4)  # float64
SKIP_ABOVE = tl.constexpr(5)  # float64, a norm; infinity takes every step
CONFIG = tl.constexpr(6)
GROUP_WIDTH = tl.constexpr(20)

# How a tensor is cut up for sums, and where these go: the table of rules that normalize. The first ones are what the
# core gives (csrc/core/matrices.h). Offsets are in the workspace of float64 or of float32.
MATRICES = tl.constexpr(0)
HEIGHT = tl.constexpr(1)  # rows of a slab; the last may be shorter
SLABS = tl.constexpr(2)  # of a matrix
PANELS = tl.constexpr(3)  # of a slab
UNITS = tl.constexpr(4)  # parts of slabs within panels; for a vector, chunks
WEIGHED = tl.constexpr(5)  # sums of updates, if those of matrices come from weighted sums of columns
ROW_SUMS = tl.constexpr(6)  # of a row's part in a panel: of squared gradients, later of squared updates
WEIGHT_SUMS = tl.constexpr(7)  # the same of squared weights
COLUMN_SUMS = tl.constexpr(8)  # of slabs
WEIGHTED_SUMS = tl.constexpr(9)  # the same, weighted by the averages of rows
PARAM_SUMS = tl.constexpr(10)  # of units
UPDATE_SUMS = tl.constexpr(11)  # of units or matrices
ROW_FACTORS = tl.constexpr(12)  # float32, as the next two
COLUMN_FACTORS = tl.constexpr(13)
MEANS = tl.constexpr(14)  # of a matrix's row averages
# The tensor's first program in launches over parts of rows, rows, strips of slabs, columns, matrices, units.
FIRST_OF_PARTS = tl.constexpr(15)
FIRST_OF_ROWS = tl.constexpr(16)
FIRST_OF_STRIPS = tl.constexpr(17)
FIRST_OF_COLUMNS = tl.constexpr(18)
FIRST_OF_MATRICES = tl.constexpr(19)
FIRST_OF_UNITS = tl.constexpr(20)
SECOND = tl.constexpr(21)  # where the second moment of a vector is
CUT_WIDTH = tl.constexpr(22)

# What is derived for a tensor, as int32; hyperparameters follow, as float32.
SKIPS = tl.constexpr(0)
MULTIPLIER = tl.constexpr(1)  # float32
KEYS = tl.constexpr(2)  # three
HYPER = tl.constexpr(5)
# For rules that normalize, after the hyperparameters: where the factors of rows and columns are (int64).
FACTORS = tl.constexpr(20)
DERIVED_WIDTH = tl.constexpr(24)  # so that rows lie on multiples of 16 bytes


@triton.jit
def find_row(table, count, program, WORD: tl.constexpr, WIDTH: tl.constexpr = WIDTH):
    """The last row whose first program is this one or an earlier one."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(table + middle * WIDTH + WORD) <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low
