"""Series of numbers as anomalies look at them: medians, and spreads that outliers do not move."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

# The standard deviation of a normal distribution over its median absolute deviation.
_MAD = 1.4826
_NINE_IN_TEN = 1.6449  # standard deviations within which nine in ten are


def median(values: Iterable[float]) -> float:
    """The middle of the numbers, or of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and 1.4826 times the median absolute deviation from it."""
    middle = median(values)
    return middle, _MAD * median([abs(value - middle) for value in values])


def alternation(values: Sequence[float]) -> float:
    """The autocorrelation at lag 1 around a straight line, in [-1, 1]: -1 if values go up and down by turns."""
    count = len(values)
    middle = (count - 1) / 2
    mean = sum(values) / count
    slope = sum((i - middle) * value for i, value in enumerate(values)) / sum((i - middle) ** 2 for i in range(count))
    left = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    squares = sum(value * value for value in left)
    return sum(a * b for a, b in pairwise(left)) / squares if squares > 0 else 0.0


class Series:
    """The latest numbers of a series, and what is remembered of all of it.

    Args:
        window: How many of the latest spreads are taken of.
        recent: How many of the latest the running median is of.

    Attributes:
        values: The latest numbers, at most `window`.
        count: How many there have been.
        median: The median of the `recent` latest; None before there are as many.
        first: The first such median; None before there is one.
        least: The least such median, and `most` the largest.
    """

    def __init__(self, window: int, recent: int) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self._logs: deque[float] = deque(maxlen=window)  # NaN of those that are not positive
        self._recent: deque[float] = deque(maxlen=recent)
        self.count = 0
        self.median: float | None = None
        self.first: float | None = None
        self.least = math.inf
        self.most = -math.inf

    def add(self, value: float) -> None:
        """Appends a finite number."""
        self.values.append(value)
        self._logs.append(math.log(value) if value > 0 else math.nan)
        self._recent.append(value)
        self.count += 1
        if len(self._recent) == self._recent.maxlen:
            self.median = median(self._recent)
            self.first = self.median if self.first is None else self.first
            self.least, self.most = min(self.least, self.median), max(self.most, self.median)

    @property
    def _is_positive(self) -> bool:
        return not any(map(math.isnan, self._logs))

    def rise(self, base: float, deviations: float, times: float) -> float:
        """What is unusual above `base`: some deviations of the latest numbers from their median, and times `base`.

        Args:
            base: What is compared with.
            deviations: Robust standard deviations; of logarithms, if all numbers are positive.
            times: A factor above 1.
        """
        if not self._is_positive or base <= 0:
            return base + max(deviations * spread(self.values)[1], (times - 1) * abs(base))
        return _exp(math.log(base) + max(deviations * spread(self._logs)[1], math.log(times)))

    def jump(self, deviations: float, times: float) -> float:
        """What is unusual as the next number: some deviations of differences, so that no trend hides a jump.

        Args:
            deviations: Robust standard deviations; of logarithms, if all numbers are positive.
            times: A factor above 1.
        """
        numbers = self._logs if self._is_positive else self.values
        ordered = list(numbers)
        differences = sorted(abs(b - a) for a, b in pairwise(ordered))
        # Nine in ten, not half of them: tails are heavy. Differences of independent numbers have twice their variance.
        sigma = differences[int(0.9 * len(differences))] / (_NINE_IN_TEN * math.sqrt(2))
        middle = median(ordered[-(self._recent.maxlen or 1) :])
        if self._is_positive:
            return _exp(middle + max(deviations * sigma, math.log(times)))
        return middle + max(deviations * sigma, (times - 1) * abs(middle))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
