"""The ways up and down: at which fraction of the way between two levels a schedule is.

A shape takes the part of a phase that has passed and the part that is left, both in [0, 1] (each rounded once: 1 - q
would round twice), and returns the height above the lower level, in units of the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .elementary import Real, exp, half_wave, power, sqrt

Shape = Callable[[Real, Real], Real]

# An exponential ramp covers 1 - e^-5 = 99.3 % of what an endless one would, then is scaled to arrive.
EXPONENTIAL_RATE = 5.0


def _relaxation(q: Real) -> Real:
    """``(1 - exp(-5 q)) / (1 - exp(-5))``: a quick rise, from 0 to 1."""
    return (1.0 - exp(-EXPONENTIAL_RATE * q)) / (1.0 - exp(-EXPONENTIAL_RATE))


def _one_minus_sqrt(q: Real) -> Real:
    return 1.0 - sqrt(q)


def _linear_rise(passed: Real, left: Real) -> Real:
    return passed


def _cosine_rise(passed: Real, left: Real) -> Real:
    return half_wave(left)


def _one_minus_sqrt_rise(passed: Real, left: Real) -> Real:
    return _one_minus_sqrt(left)


def _exponential_rise(passed: Real, left: Real) -> Real:
    return _relaxation(passed)


def _cosine_fall(passed: Real, left: Real, *, num_cycles: float) -> Real:
    return half_wave(2.0 * num_cycles * passed)


def _restarting_fall(passed: Real, left: Real, *, num_cycles: float) -> Real:
    # The remainder is taken of exactly this product: it decides between 0 and 1 where that is a whole number.
    return half_wave((num_cycles * passed) % 1.0)


def _linear_fall(passed: Real, left: Real) -> Real:
    return left


def _polynomial_fall(passed: Real, left: Real, *, power_: float) -> Real:
    return power(left, power_)


def _one_minus_sqrt_fall(passed: Real, left: Real) -> Real:
    return _one_minus_sqrt(passed)


def _exponential_fall(passed: Real, left: Real) -> Real:
    return 1.0 - _relaxation(passed)


RISES: dict[str, Shape] = {
    "linear": _linear_rise,
    "exponential": _exponential_rise,
    "cosine": _cosine_rise,
    "1-sqrt": _one_minus_sqrt_rise,
}
FALLS = ("linear", "exponential", "cosine", "1-sqrt", "polynomial", "cosine_with_restarts")


def rise(shape: str) -> Shape:
    """The way up of that name, from 0 to 1."""
    return RISES[shape]


def fall(shape: str, num_cycles: float = 0.5, power: float = 1.0) -> Shape:
    """The way down of that name, from 1; all end at 0, except a cosine with other than half a cycle."""
    shapes: dict[str, Shape] = {
        "linear": _linear_fall,
        "exponential": _exponential_fall,
        "cosine": partial(_cosine_fall, num_cycles=num_cycles),
        "1-sqrt": _one_minus_sqrt_fall,
        "polynomial": partial(_polynomial_fall, power_=power),
        "cosine_with_restarts": partial(_restarting_fall, num_cycles=num_cycles),
    }
    return shapes[shape]
