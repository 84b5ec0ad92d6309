"""The transcendental functions that schedules need, from ``+ - * /`` and exact operations alone.

``math.cos`` and ``np.cos``, ``**`` and ``np.power`` differ in their last bits, from one another and between machines
and versions, because numpy picks vector code by instruction set. The functions here give the same bits for a Python
float and for every element of an array, everywhere. So a dumped schedule is the one that training saw, and a resumed
run is the one that was interrupted.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Real = TypeVar("Real", float, Array)

_LN2 = math.log(2.0)
_LN2_HIGH = 0.693147180369123816490  # its upper 32 bits, so that a product with a whole number below 2^21 is exact
_LN2_LOW = 1.90821492927058770002e-10
# sin(pi w / 2) / w in powers of w^2; w <= 1/2, so nine terms leave less than 1e-19.
_SINE = [(-1) ** i * (math.pi / 2) ** (2 * i + 1) / math.factorial(2 * i + 1) for i in range(9)][::-1]
_EXP = [1 / math.factorial(i) for i in range(14)][::-1]  # |r| <= ln(2)/2 leaves less than 1e-17
_ATANH = [2 / (2 * i + 1) for i in range(11)][::-1]  # |z| <= 0.172 leaves less than 1e-18


def _polynomial(coefficients: list[float], x: Real) -> Real:
    result: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def half_wave(x: Real) -> Real:
    """``(1 + cos(pi x)) / 2`` for x >= 0: exactly 1 at even x, 0 at odd x, never outside [0, 1]."""
    height = abs(x % 2.0 - 1.0)  # 1 on a crest, 0 in a trough; exact
    upper = (height > 0.5) * 1.0
    sign = 1.0 - 2.0 * upper
    w = upper + sign * height  # the distance to the nearer of the two
    sine = w * _polynomial(_SINE, w * w)
    return upper + sign * (sine * sine)


def exp(x: Real) -> Real:
    """``e ** x`` for x <= 0, to a few units in the last place."""
    k = (x * (1 / _LN2) + 0.5) // 1.0
    mantissa = _polynomial(_EXP, (x - k * _LN2_HIGH) - k * _LN2_LOW)
    if isinstance(x, float):
        return math.ldexp(mantissa, int(k))
    return np.ldexp(mantissa, k.astype(np.int64))


def power(x: Real, exponent: float) -> Real:
    """``x ** exponent`` for x in (0, 1] and an exponent >= 0. Its absolute error is at most about 1e-16."""
    if exponent == 1.0:
        return x
    mantissa, k = math.frexp(x) if isinstance(x, float) else np.frexp(x)
    lower = (mantissa < 0.7071067811865476) * 1.0  # brings the mantissa from [1/2, 1) to [0.707, 1.414)
    mantissa = mantissa * (1.0 + lower)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    return exp(exponent * (z * _polynomial(_ATANH, z * z) + (k - lower) * _LN2))


def sqrt(x: Real) -> Real:
    """The square root, which IEEE 754 rounds correctly in both forms."""
    return math.sqrt(x) if isinstance(x, float) else np.sqrt(x)
