"""Tiles between memory and float32: gradients, parameters with what they keep beside them, states.

A place is (begin, offsets, mask): where the elements of a tile lie in their buffers, and which exist. In a WHOLE tile
all exist, `begin` has an address on a multiple of 16 bytes, and `offsets` are known to follow each other.
"""

import triton
import triton.language as tl

from . import table as words
from .arithmetic import float_of, root
from .codes import BLOCK, decode_codes, encode_codes, fraction_of
from .formats import (
    CODES,
    FLOAT32,
    FLOAT32_MASTER,
    KAHAN,
    NO_MASTER,
    SPLIT24,
    SPLIT32,
    adopt_written,
    canonical,
    decode16,
    encode16,
    half_of,
    join,
    remainder_of,
    split,
)


@triton.jit
def extents_of(row):
    """A tensor's elements, and its extents: its blocks, those of one of its rows, and the elements of a row."""
    numel = tl.load(row + words.NUMEL)
    length = tl.load(row + words.ROW)
    row_blocks = (length + BLOCK - 1) // BLOCK
    return numel, (numel // length * row_blocks, row_blocks, length)


@triton.jit
def place_of(row, begin, extents, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """COUNT blocks from `begin` on: their place, that of their scales, and where they begin in the global tensor."""
    blocks, row_blocks, length = extents
    lanes = tl.arange(0, BLOCK)[None, :]
    order = tl.arange(0, COUNT)
    # Where numbers and scales lie: the first one, offsets from there, and which exist.
    if WHOLE:
        offsets = order[:, None] * BLOCK + lanes
        return (begin * BLOCK, offsets, offsets >= 0), (begin, order, order >= 0), (begin + order) * BLOCK
    else:
        block = begin + order
        row_of = block // row_blocks
        column = (block - row_of * row_blocks) * BLOCK
        exists = block < blocks
        mask = exists[:, None] & (column[:, None] + lanes < length)
        firsts = row_of * length + column
        drawn = firsts + row_of * tl.load(row + words.ROW_GAP)
        return (begin * 0, firsts[:, None] + lanes, mask), (begin * 0, block, exists), drawn


@triton.jit
def load(address, NUMBER: tl.constexpr, place, WHOLE: tl.constexpr):
    """A tile of a buffer as it lies in memory, with 0 past the ends of blocks."""
    begin, offsets, mask = place
    numbers = address.to(tl.pointer_type(NUMBER)) + begin
    if WHOLE:
        return tl.load(tl.multiple_of(numbers, 16) + offsets)
    else:
        return tl.load(numbers + offsets, mask=mask, other=0)


@triton.jit
def store(address, numbers, NUMBER: tl.constexpr, place, WHOLE: tl.constexpr):
    """The inverse."""
    begin, offsets, mask = place
    target = address.to(tl.pointer_type(NUMBER)) + begin
    if WHOLE:
        tl.store(tl.multiple_of(target, 16) + offsets, numbers)
    else:
        tl.store(target + offsets, numbers, mask=mask)


@triton.jit
def load_dense(address, DTYPE: tl.constexpr, place, WHOLE: tl.constexpr):
    """Decoded."""
    if DTYPE == FLOAT32:
        return load(address, tl.float32, place, WHOLE)
    else:
        return decode16(load(address, tl.uint16, place, WHOLE), DTYPE)


@triton.jit
def store_dense(address, x, random, DTYPE: tl.constexpr, ROUNDS: tl.constexpr, place, WHOLE: tl.constexpr):
    """Encoded. Returns what `load_dense` will read, where it is stored."""
    if DTYPE == FLOAT32:
        store(address, x, tl.float32, place, WHOLE)
        return x
    else:
        codes = encode16(x, random, DTYPE, ROUNDS)
        store(address, codes, tl.uint16, place, WHOLE)
        return decode16(codes, DTYPE)


@triton.jit
def load_param(row, FORMATS: tl.constexpr, place, WHOLE: tl.constexpr):
    """A parameter in full precision, including what its master keeps."""
    DTYPE: tl.constexpr = FORMATS & 7
    KEPT: tl.constexpr = (FORMATS >> 6) & 7
    KIND: tl.constexpr = (FORMATS >> 9) & 7
    param = tl.load(row + words.PARAM)
    master = tl.load(row + words.MASTER)
    if KIND == NO_MASTER:
        return load_dense(param, DTYPE, place, WHOLE)
    elif KIND == KAHAN:
        return load_dense(param, DTYPE, place, WHOLE) + load_dense(master, KEPT, place, WHOLE)
    else:
        codes = load(param, tl.uint16, place, WHOLE)
        if KIND == SPLIT24:
            return join(codes, load(master, tl.int8, place, WHOLE).to(tl.int32) * 256)
        elif KIND == SPLIT32:
            return join(codes, load(master, tl.int16, place, WHOLE).to(tl.int32))
        else:
            return adopt_written(codes, load(master, tl.float32, place, WHOLE), DTYPE)


@triton.jit
def store_param(row, w, random, FORMATS: tl.constexpr, place, WHOLE: tl.constexpr):
    """The inverse; `random` are the 32 bits of the parameter's stream.

    Returns what `load_param` will read, where it is stored; nobody pays for it who does not use it.
    """
    DTYPE: tl.constexpr = FORMATS & 7
    KEPT: tl.constexpr = (FORMATS >> 6) & 7
    KIND: tl.constexpr = (FORMATS >> 9) & 7
    ROUNDS: tl.constexpr = ((FORMATS >> 12) & 1) == 1
    param = tl.load(row + words.PARAM)
    master = tl.load(row + words.MASTER)
    if KIND == NO_MASTER:
        return store_dense(param, w, half_of(random, 0), DTYPE, ROUNDS, place, WHOLE)
    elif KIND == FLOAT32_MASTER:
        store_dense(param, w, half_of(random, 0), DTYPE, ROUNDS, place, WHOLE)
        return store_dense(master, w, random, FLOAT32, False, place, WHOLE)
    elif KIND == KAHAN:
        rounded = store_dense(param, w, random, DTYPE, False, place, WHOLE)
        rest = remainder_of(w, rounded)
        return rounded + store_dense(master, rest, half_of(random, 0), KEPT, ROUNDS, place, WHOLE)
    elif KIND == SPLIT24:
        # To 24 bits first; 0x80 rounds to nearest.
        cut = random >> 24 if ROUNDS else 0x80
        kept = (canonical(w) + cut) & 0xFFFFFF00
        codes, low = split(kept)
        store(param, codes, tl.uint16, place, WHOLE)
        store(master, (low >> 8).to(tl.int8), tl.int8, place, WHOLE)
        return float_of(kept)
    else:
        kept = canonical(w)
        codes, low = split(kept)
        store(param, codes, tl.uint16, place, WHOLE)
        store(master, low.to(tl.int16), tl.int16, place, WHOLE)
        return float_of(kept)


@triton.jit
def load_state(
    row, STATE: tl.constexpr, SIGNS: tl.constexpr, FORMATS: tl.constexpr, place, scales, WHOLE: tl.constexpr
):
    """A state, decoded."""
    DTYPE: tl.constexpr = (FORMATS >> (13 + 3 * STATE)) & 7
    address = tl.load(row + words.STATES + STATE)
    if DTYPE == CODES:
        first, offsets, mask = scales
        at = tl.load(row + words.SCALES + STATE).to(tl.pointer_type(tl.uint8)) + first + offsets
        scale = tl.load(at, mask=mask, other=0)
        return decode_codes(load(address, tl.uint8, place, WHOLE), scale, ((SIGNS >> STATE) & 1) == 1)
    else:
        return load_dense(address, DTYPE, place, WHOLE)


@triton.jit
def store_state(
    row,
    x,
    rooted,
    random,
    STATE: tl.constexpr,
    SIGNS: tl.constexpr,
    ROOTED: tl.constexpr,
    FORMATS: tl.constexpr,
    place,
    scales,
    WHOLE: tl.constexpr,
):
    """The inverse; `random` are the 32 bits of the state's stream."""
    DTYPE: tl.constexpr = (FORMATS >> (13 + 3 * STATE)) & 7
    ROUNDS: tl.constexpr = ((FORMATS >> (25 + STATE)) & 1) == 1
    address = tl.load(row + words.STATES + STATE)
    if DTYPE == CODES:
        if STATE == ROOTED:
            roots = rooted
        else:
            roots = root(tl.abs(x))
        if ROUNDS:
            threshold = fraction_of(half_of(random, STATE))
        else:
            threshold = 0.5
        if not WHOLE:
            x = tl.where(place[2], x, 0.0)  # for the scale
        codes, scale = encode_codes(x, roots, threshold, ((SIGNS >> STATE) & 1) == 1)
        store(address, codes, tl.uint8, place, WHOLE)
        first, at_scales, exists = scales
        at = tl.load(row + words.SCALES + STATE).to(tl.pointer_type(tl.uint8)) + first + at_scales
        tl.store(at, scale, mask=exists)
    else:
        store_dense(address, x, half_of(random, STATE), DTYPE, ROUNDS, place, WHOLE)
