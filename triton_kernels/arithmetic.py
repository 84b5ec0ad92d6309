"""Arithmetic with the bits of csrc/rules/rule.h and core/portable.h: IEEE operations in the order they are written.

Kernels are launched with enable_fp_fusion=False. For float32, `/` and `tl.sqrt` are approximations, so rules use
tl.div_rn and `root`; for float64, both are correctly rounded.
"""

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    """The pattern of a float32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(u):
    """The float32 of a pattern."""
    return u.to(tl.float32, bitcast=True)


# Below it, numbers are on the way to the subnormal ones. 2^96 and its root, by which they are scaled, are exact.
_SMALL = tl.constexpr(2.0**-96)
_SCALE = tl.constexpr(2.0**96)
_INVERSE_ROOT_OF_SCALE = tl.constexpr(2.0**-48)


@triton.jit
def root(x):
    """The correctly rounded square root of a float32.

    On AMD, Triton 3.6 makes NaN of subnormal numbers: its first estimate takes them for 0. A power of four changes the
    exponent only, before the root and after it.
    """
    is_small = x < _SMALL
    rooted = tl.sqrt_rn(tl.where(is_small, x * _SCALE, x))
    return tl.where(is_small, rooted * _INVERSE_ROOT_OF_SCALE, rooted)


@triton.jit
def inverse_root(x):
    """1 over the root of a float32; both operations round."""
    return tl.div_rn(1.0, root(x))


@triton.jit
def sign(x):
    """-1, 1, or x itself where it is zero or NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def maximum(a, b):
    """The larger of two, NaN if either is."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def decayed(g, p, weight_decay):
    """The gradient plus that of an L2 penalty, if there is one."""
    return tl.where(weight_decay != 0.0, g + weight_decay * p, g)


@triton.jit
def power(base, exponent):
    """base**exponent in float64, for each element of vectors, by the multiplications of the core."""
    result = base * 0.0 + 1.0
    while tl.max(exponent, 0) > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result
