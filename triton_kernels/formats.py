"""How numbers are stored, element by element: csrc/storage/dense.h, master.h and random.h in Triton.

All integer or exact arithmetic. Triton's casts are not used for rounding, because its interpreter truncates bfloat16.
"""

import triton
import triton.language as tl

from fusedopt import _core

from .arithmetic import bits_of, float_of

# DType and Master of csrc/core/tensors.h
FLOAT32 = tl.constexpr(_core.dtypes.index("float32"))
BFLOAT16 = tl.constexpr(_core.dtypes.index("bfloat16"))
FLOAT16 = tl.constexpr(_core.dtypes.index("float16"))
CODES = tl.constexpr(_core.dtypes.index("uint8"))

NO_MASTER = tl.constexpr(_core.masters.index(None))
KAHAN = tl.constexpr(_core.masters.index("kahan"))
SPLIT24 = tl.constexpr(_core.masters.index("split24"))
SPLIT32 = tl.constexpr(_core.masters.index("split32"))
FLOAT32_MASTER = tl.constexpr(_core.masters.index("float32"))

_SIZE_BITS = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_GOLDEN = tl.constexpr(0x9E3779B1)


# ---- random bits -------------------------------------------------------------------------------


@triton.jit
def fmix(h):
    """MurmurHash3's finalizer, of uint32."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def stream_key(seed, step, stream):
    """The key of a stream at a step; all uint32."""
    return fmix(fmix(seed * _GOLDEN + step) + stream)


@triton.jit
def key_at(key, high):
    """The key for the elements whose index has this upper half."""
    return tl.where(high != 0, fmix(key ^ high), key)


@triton.jit
def _run_hash(key, index):
    """What the elements have in common of the run of 64 that begins at an index, or that it is in."""
    high = (index >> 32).to(tl.uint32)
    return fmix((index.to(tl.uint32) >> 6) * _GOLDEN + key_at(key, high))


@triton.jit
def draw(key, firsts, lanes):
    """Random bits of the elements of blocks.

    Args:
        key: Of the stream.
        firsts: Where the blocks begin in the global tensor, int64, (blocks, 1). A block that begins in the middle of a
            run of 64 ends in the next one.
        lanes: The places within a block, (1, 64).
    """
    place = (firsts & 63).to(tl.uint32) + lanes.to(tl.uint32)
    hashed = tl.where(place < 64, _run_hash(key, firsts), _run_hash(key, (firsts | 63) + 1))
    return hashed + (place & 63) * _GOLDEN


@triton.jit
def half_of(bits, STATE: tl.constexpr):
    """The 16 bits of a state out of its stream's 32."""
    if STATE % 2 == 1:
        return bits & 0xFFFF
    else:
        return bits >> 16


# ---- 16 bits -----------------------------------------------------------------------------------


@triton.jit
def decode16(codes, DTYPE: tl.constexpr):
    """The float32 of a code (uint16); exact."""
    if DTYPE == BFLOAT16:
        return float_of(codes.to(tl.uint32) << 16)
    else:
        return codes.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def encode16(x, random, DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """The code of a float32: to nearest even, or up with the chance that 16 random bits give if it ROUNDS so."""
    u = bits_of(x)
    size = u & _SIZE_BITS
    if DTYPE == BFLOAT16:
        if ROUNDS:
            rounded = (u + random) >> 16
        else:
            rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        # NaN would round to inf or wrap to zero: it is cut short instead, with the quiet bit set.
        code = tl.where(size > _INFINITY, (u >> 16) | 0x40, rounded)
    else:
        is_tiny = size < 0x38800000
        if ROUNDS:
            # In units of 2^-40 a subnormal result has 26 bits, of which the lower 16 are cut.
            scaled = float_of(tl.where(is_tiny, size, 0)) * 1099511627776.0
            tiny = (scaled.to(tl.int32).to(tl.uint32) + random) >> 16
            normal = (size - 0x38000000 + (random >> 3)) >> 13
        else:
            # Adding 0.5, whose spacing is 2^-24, rounds a subnormal result in the add itself.
            tiny = bits_of(float_of(size) + 0.5) - 0x3F000000
            normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
        rounded = tl.where(is_tiny, tiny, normal)
        # From 2^16 on, and wherever rounding carried, the result is inf.
        code = tl.where((size >= 0x47800000) | (rounded > 0x7C00), 0x7C00, rounded)
        code = tl.where(size > _INFINITY, 0x7E00, code) | ((u & 0x80000000) >> 16)
    return code.to(tl.uint16)


# ---- parameters with a master ------------------------------------------------------------------


@triton.jit
def adopt_written(codes, kept, DTYPE: tl.constexpr):
    """A float32 master; or the parameter, where that is no rounding of the master, as something else has written it."""
    down = encode16(kept, bits_of(kept) * 0, DTYPE, True)
    up = encode16(kept, bits_of(kept) * 0 + 0xFFFF, DTYPE, True)
    return tl.where((codes == down) | (codes == up), kept, decode16(codes, DTYPE))


@triton.jit
def join(codes, low):
    """A weight whose upper half (uint16) and the rest below it (int32) are kept apart.

    The upper half alone if that is NaN: what was split has none, so that something else has written the parameter.
    """
    upper = codes.to(tl.uint32) << 16
    u = upper + low.to(tl.uint32)
    return float_of(tl.where((u & 0x7FFFFFFF) > _INFINITY, upper, u))


@triton.jit
def split(u):
    """The upper half of a weight's pattern, rounded with ties away, and what is left (int32)."""
    high = (u + 0x8000) >> 16
    return high.to(tl.uint16), (u - (high << 16)).to(tl.int32)


@triton.jit
def canonical(w):
    """The pattern of a weight; NaN as a single pattern, since others would become -0 or inf by the carry."""
    u = bits_of(w)
    return tl.where((u & _SIZE_BITS) > _INFINITY, 0x7FC00000, u)


@triton.jit
def remainder_of(w, p):
    """What p lacks of w; 0 for a parameter that is inf or NaN."""
    return tl.where((bits_of(p) & _INFINITY) == _INFINITY, 0.0, w - p)
