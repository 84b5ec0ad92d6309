"""Blockwise 8 bits: csrc/storage/blockwise8.h in Triton. Blocks are the rows of a tile of (blocks, 64) elements."""

import triton
import triton.language as tl

from .arithmetic import bits_of, float_of

BLOCK = tl.constexpr(64)
_TOO_LARGE = tl.constexpr(0x7F7D0000)  # magnitudes from here on spoil their block


@triton.jit
def is_too_large(x):
    """Whether a number would spoil its block, inf and NaN included."""
    return (bits_of(x) & 0x7FFFFFFF).to(tl.int32) >= _TOO_LARGE


@triton.jit
def unit_of(scales):
    """The units of blocks, given their scales (uint8)."""
    return float_of(scales.to(tl.uint32) << 23)


@triton.jit
def decode_unsigned(codes, units):
    """The numbers of codes that have no sign, given the unit of each."""
    q = codes.to(tl.float32)
    return q * q * units


@triton.jit
def decode_codes(codes, scales, SIGNED: tl.constexpr):
    """The numbers of codes, given the scale of each block (both uint8)."""
    unit = unit_of(scales)
    if SIGNED:
        q = (codes & 0x7F).to(tl.float32)
        size = q * q * unit[:, None]
        return float_of(bits_of(size) | ((codes.to(tl.uint32) & 0x80) << 24))
    else:
        return decode_unsigned(codes, unit[:, None])


@triton.jit
def fraction_of(bits):
    """R of stochastic rounding, from 16 random bits."""
    return float_of(0x3F800100 | ((bits >> 2) << 9)) - 1.0


@triton.jit
def encode_codes(x, roots, threshold, SIGNED: tl.constexpr):
    """Codes and scales of numbers; `roots` are those of their magnitudes, `threshold` R. Elements past the end of a
    block are 0.
    """
    SHIFT: tl.constexpr = 13 if SIGNED else 15
    CEILING: tl.constexpr = 0x3FBFF if SIGNED else 0x1FEFF
    u = bits_of(x)
    size = u & 0x7FFFFFFF
    # As signed integers: magnitudes fit, and comparisons of unsigned ones are slower on some devices.
    largest = tl.max(size.to(tl.int32), 1)
    is_special = (largest == 0) | (largest >= _TOO_LARGE)
    exponent = (largest + CEILING) >> 23
    exponent = tl.where(exponent < 32, 32, exponent)
    exponent = tl.where(is_special, 32, exponent)
    scale = exponent - SHIFT
    to_steps = float_of(((254 - scale) << 23).to(tl.uint32))
    # 2^((127 - scale) / 2): the exponent halved, and root 2 where it was odd. 0x3504F3 are root 2's bits.
    twice = 381 - scale
    root_units = float_of((((twice >> 1) << 23) + (twice & 1) * 0x3504F3).to(tl.uint32))

    spoils = is_special[:, None]
    steps = float_of(size) * to_steps[:, None]
    q = tl.where(spoils, 0.0, roots * root_units[:, None]).to(tl.int32)
    below = q.to(tl.float32)
    q = q + tl.where(steps - below * below > threshold * (below + below + 1.0), 1, 0)
    if SIGNED:
        code = q | tl.where(q != 0, ((u >> 24) & 0x80).to(tl.int32), 0)
    else:
        # A variance never becomes zero while its mean is alive.
        code = tl.where((q == 0) & (size != 0), 1, q)
    code = tl.where(spoils, 0, code)
    scale = tl.where(largest == 0, 0, tl.where(is_special, 255, scale))
    return code.to(tl.uint8), scale.to(tl.uint8)
