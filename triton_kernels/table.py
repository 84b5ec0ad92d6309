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
ROW = tl.constexpr(13)  # blocks of codes do not cross multiples of this; where there are none, all elements are one
FIRST_INDEX = tl.constexpr(14)
GROUP = tl.constexpr(15)
FORMATS = tl.constexpr(16)
FIRST_PROGRAM = tl.constexpr(17)  # of the tensor, in the launch that steps it
IS_ALIGNED = tl.constexpr(18)  # every buffer lies on a multiple of 16 bytes
FIRST_SUM_PROGRAM = tl.constexpr(19)  # of the tensor, in the launch that adds squares
FIRST_CHUNK = tl.constexpr(20)  # where its sums go
WIDTH = tl.constexpr(22)  # even, so that rows lie on multiples of 16 bytes

# A row of the table of param groups; their hyperparameters follow, as float64.
LR = tl.constexpr(0)  # a pointer, or 0
LR_IS_DOUBLE = tl.constexpr(1)
SEED = tl.constexpr(2)
SIGN = tl.constexpr(3)  # float64, of gradients
MAX_GRAD_NORM = tl.constexpr(4)  # float64
CONFIG = tl.constexpr(5)
GROUP_WIDTH = tl.constexpr(18)

# What is derived for a tensor, as int32; hyperparameters follow, as float32.
SKIPS = tl.constexpr(0)
MULTIPLIER = tl.constexpr(1)  # float32
KEYS = tl.constexpr(2)  # three
HYPER = tl.constexpr(5)
DERIVED_WIDTH = tl.constexpr(20)


@triton.jit
def find_row(table, count, program, WORD: tl.constexpr):
    """The last of the rows whose first program is this one or one before it."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(table + middle * WIDTH + WORD) <= program
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low
