"""THE kernel: a tile is decoded to float32, the rule applied, and the result encoded; many tensors in one launch.

A tile is (blocks, 64) elements. It is whole if it is full, every buffer lies on multiples of 16 bytes, and blocks
follow each other without gaps. Whole tiles are read and written in unmasked vectors, all others element by element.
"""

import triton
import triton.language as tl

from . import table as words
from .arithmetic import float_of
from .codes import BLOCK, is_too_large
from .formats import CODES, draw
from .table import find_row
from .tiles import extents_of, load_dense, load_param, load_state, place_of, store_param, store_state
from .updates import store_block_sums

BLOCKS = tl.constexpr(16)  # of a tile
PART = tl.constexpr(4)  # blocks taken at a time if a tile is not whole: less code to compile
TILES = tl.constexpr(4)  # of a program, one after the other


@triton.jit
def draw_for(row, derived, STREAM: tl.constexpr, firsts):
    """The random bits of a tile's elements in a stream; `firsts` are where its blocks begin."""
    key = tl.load(derived + words.KEYS + STREAM).to(tl.uint32, bitcast=True)
    firsts = tl.load(row + words.FIRST_INDEX) + firsts
    return draw(key, firsts[:, None], tl.arange(0, BLOCK)[None, :])


@triton.jit
def unspoilt(p, s, STATES: tl.constexpr, FORMATS: tl.constexpr, place, scales):
    """Where a tile's numbers and scales are stored if what is not finite is left as it was: csrc/cpu/undo.inl."""
    begin, offsets, mask = place
    first, order, exists = scales
    is_spoilt = is_too_large(p)
    HAS_CODES: tl.constexpr = (
        (((FORMATS >> 13) & 7) == CODES)
        or (((FORMATS >> 16) & 7) == CODES)
        or (((FORMATS >> 19) & 7) == CODES)
        or (((FORMATS >> 22) & 7) == CODES)
    )
    for k in tl.static_range(STATES):
        is_spoilt = is_spoilt | is_too_large(s[k])
    if HAS_CODES:
        of_blocks = tl.max((is_spoilt & mask).to(tl.int32), 1) != 0
        return (begin, offsets, mask & (of_blocks[:, None] == 0)), (first, order, exists & (of_blocks == 0))
    else:
        return (begin, offsets, mask & (is_spoilt == 0)), scales


@triton.jit
def step_tile(
    row,
    derived,
    block_sums,
    hyper,
    begin,
    extents,
    UPDATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STATES: tl.constexpr,
    SIGNS: tl.constexpr,
    ROOTED: tl.constexpr,
    FORMATS: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """COUNT blocks from `begin` on, of a tensor of these extents (tiles.py)."""
    place, scales, drawn = place_of(row, begin, extents, COUNT, WHOLE)
    summed = scales  # all blocks are, also those that `unspoilt` leaves as they were

    before = load_param(row, FORMATS, place, WHOLE)
    p = before
    g = load_dense(tl.load(row + words.GRAD), (FORMATS >> 3) & 7, place, WHOLE)
    s = ()
    for k in tl.static_range(STATES):
        s = s + (load_state(row, k, SIGNS, FORMATS, place, scales, WHOLE),)

    g = g * float_of(tl.load(derived + words.MULTIPLIER))
    if NORMALIZE is not None:
        g = NORMALIZE(row, derived, g, s, hyper, place, COUNT, WHOLE)
    p, s, rooted = UPDATE(p, g, s, hyper)

    STORES_WHOLE: tl.constexpr = WHOLE and ((FORMATS >> 29) & 1) == 0
    if ((FORMATS >> 29) & 1) == 1:
        place, scales = unspoilt(p, s, STATES, FORMATS, place, scales)

    random = tl.zeros((COUNT, BLOCK), tl.uint32)  # where nothing is drawn
    for k in tl.static_range(STATES):
        # States 2 k and 2 k + 1 share a stream, which is drawn for the first of them that is rounded stochastically.
        if ((FORMATS >> (25 + k)) & 1) == 1 and not (k % 2 == 1 and ((FORMATS >> (24 + k)) & 1) == 1):
            random = draw_for(row, derived, k // 2, drawn)
        store_state(row, s[k], rooted, random, k, SIGNS, ROOTED, FORMATS, place, scales, STORES_WHOLE)
    if ((FORMATS >> 12) & 1) == 1:
        random = draw_for(row, derived, 2, drawn)
    after = store_param(row, p, random, FORMATS, place, STORES_WHOLE)

    if block_sums is not None:
        if not STORES_WHOLE:
            after = tl.where(place[2], after, before)  # past the ends of blocks, that is 0
        store_block_sums(block_sums, row, summed, extents[0], after - before, after, COUNT)


@triton.jit
def tiles_of(row, program, extents):
    """The tiles that a program takes of its tensor: the first one, and the one after the last."""
    first = (program - tl.load(row + words.FIRST_PROGRAM)) * TILES
    return first, tl.minimum(first + TILES, (extents[0] + BLOCKS - 1) // BLOCKS)


@triton.jit
def sum_tile(row, block_sums, begin, extents, FORMATS: tl.constexpr):
    """The sums of BLOCKS blocks that are not stepped."""
    place, scales, _ = place_of(row, begin, extents, BLOCKS, False)
    p = load_param(row, FORMATS, place, False)
    store_block_sums(block_sums, row, scales, extents[0], tl.zeros((BLOCKS, BLOCK), tl.float32), p, BLOCKS)


@triton.jit(do_not_specialize=["count"])
def step_kernel(
    table,
    derived,
    block_sums,
    count,
    UPDATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STATES: tl.constexpr,
    SIGNS: tl.constexpr,
    ROOTED: tl.constexpr,
    HYPER: tl.constexpr,
    FORMATS: tl.constexpr,
):
    """Steps `count` tensors, the rows of `table`, all with the same rule and FORMATS; `derived` is theirs.

    `block_sums` takes the sums of squares of their blocks (updates.py); None, for which the kernel is compiled without
    them, if nobody wants them.
    """
    program = tl.program_id(0)
    index = find_row(table, count, program, words.FIRST_PROGRAM)
    row = table + index * words.WIDTH
    derived = derived + index * words.DERIVED_WIDTH
    if tl.load(derived + words.SKIPS) == 0:
        hyper = ()
        for k in tl.static_range(HYPER):
            hyper = hyper + (float_of(tl.load(derived + words.HYPER + k)),)
        numel, extents = extents_of(row)
        can_be_whole = (tl.load(row + words.IS_ALIGNED) != 0) & (extents[2] == numel)
        first, last = tiles_of(row, program, extents)
        for tile in range(first, last):
            begin = tile * BLOCKS
            end = begin + BLOCKS
            if can_be_whole & (end * BLOCK <= numel):
                step_tile(
                    row,
                    derived,
                    block_sums,
                    hyper,
                    begin,
                    extents,
                    UPDATE,
                    NORMALIZE,
                    STATES,
                    SIGNS,
                    ROOTED,
                    FORMATS,
                    BLOCKS,
                    True,
                )
            else:
                for part in range(begin, tl.minimum(end, extents[0]), PART):
                    step_tile(
                        row,
                        derived,
                        block_sums,
                        hyper,
                        part,
                        extents,
                        UPDATE,
                        NORMALIZE,
                        STATES,
                        SIGNS,
                        ROOTED,
                        FORMATS,
                        PART,
                        False,
                    )
    elif block_sums is not None:
        _, extents = extents_of(row)
        first, last = tiles_of(row, program, extents)
        for tile in range(first, last):
            sum_tile(row, block_sums, tile * BLOCKS, extents, FORMATS)
