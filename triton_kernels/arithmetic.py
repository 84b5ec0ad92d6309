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


@triton.jit
def root(x):
    """The correctly rounded square root of a float32."""
    return tl.sqrt_rn(x)


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
