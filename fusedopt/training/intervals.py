"""Student's t distribution, and intervals of paired differences, without SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def t_inside(t: float, degrees: int) -> float:
    """The probability that Student's t is within [-t, t].

    Exact finite sums: equations 26.7.3 and 26.7.4 of Abramowitz and Stegun, "Handbook of mathematical functions",
    1964.

    Args:
        t: A number >= 0.
        degrees: Degrees of freedom, at least 1.

    Returns:
        A number in [0, 1].
    """
    theta = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0  # of the sum below, which begins at 1 (even) or at cos theta (odd)
    total = 0.0
    for k in range(1 if not odd else 2, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def t_outside(t: float, degrees: int) -> float:
    """The probability that Student's t is beyond -t or t: the two-sided p of a t test."""
    return max(0.0, 1.0 - t_inside(t, degrees))


def t_bound(level: float, degrees: int) -> float:
    """The t for which Student's t is within [-t, t] with probability `level`, by bisection."""
    low, high = 0.0, 1.0
    while t_inside(high, degrees) < level:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_inside(middle, degrees) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, and where it is with some confidence.

    Attributes:
        mean: Of the differences.
        low: The lower end; None if one difference says nothing of chance.
        high: The upper end.
        level: With what probability such an interval has the true mean in it.
        p: The probability of a mean at least this far from 0 if there were no difference: a paired t test's, two-sided.
        count: How many differences there are.
    """

    mean: float
    low: float | None
    high: float | None
    level: float
    p: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether there is a difference, at this level."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**vars(self), "excludes_zero": self.excludes_zero}


def paired(differences: Sequence[float], level: float) -> Interval:
    """Student's interval of the mean of paired differences: mean ± t s / sqrt(n).

    It takes differences to be normal, which a handful cannot show; means over a tenth of a training nearly are.

    Args:
        differences: One for each pair.
        level: The confidence, in (0, 1).

    Returns:
        The interval.
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Interval(mean, None, None, level, None, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    half = t_bound(level, count - 1) * error
    p = t_outside(abs(mean) / error, count - 1) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, level, p, count)
