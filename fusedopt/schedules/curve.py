"""A schedule made ready to be evaluated: phases one after the other, at one step or at a whole array of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .elementary import Array, Real, sqrt
from .lengths import Steps
from .shapes import Shape

_BLOCK = 16_384  # steps evaluated together: the intermediate values of a formula stay in cache


@dataclass(frozen=True)
class Phase:
    """A stretch of a schedule.

    Attributes:
        steps: Its length; None if it has no end. It need not be whole: the steps before its end are in the phase.
        value: Multiplier k steps after its beginning, a number or an array of float64; k is whole if that is.
        end: The multiplier that it arrives at, `steps` steps after its beginning; it holds if nothing follows.
    """

    steps: Steps | None
    value: Callable[[Any], Any]
    end: float


class Flat:
    """The same multiplier throughout."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, k: Any) -> float:
        return self.level


class Ramp:
    """From one level to another: ``low + (high - low) shape((k + offset) / steps)``."""

    def __init__(self, shape: Shape, low: float, high: float, steps: Steps, offset: Steps = 0) -> None:
        self.shape, self.low, self.difference = shape, low, high - low
        self.steps, self.offset = steps, offset

    def __call__(self, k: Real) -> Real:
        k = k + self.offset
        return self.low + self.difference * self.shape(k / self.steps, (self.steps - k) / self.steps)

    def arrival(self) -> float:
        """The value at the end of the way."""
        return self.low + self.difference * self.shape(1.0, 0.0)


class InverseRoot:
    """``1 / sqrt((k + timescale) / timescale)``."""

    def __init__(self, timescale: float) -> None:
        self.timescale = timescale

    def __call__(self, k: Real) -> Real:
        return 1.0 / sqrt((k + self.timescale) / self.timescale)


class Curve:
    """Phases one after the other; afterwards the end of the last one holds.

    Both forms of a call pass through the same functions with the same operations, so they give the same bits.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        start: Steps | None = 0
        starts, values = [], []
        end = 1.0
        for phase in phases:
            if start is not None and phase.steps != 0:
                starts.append(start)
                values.append(phase.value)
                start = None if phase.steps is None else start + phase.steps
            end = phase.end
        if start is not None:
            starts.append(start)
            values.append(Flat(end))
        self._starts, self._values = starts, values

    def __call__(self, step: Steps) -> float:
        """The multiplier at one step."""
        phase = bisect_right(self._starts, step) - 1
        return self._values[phase](step - self._starts[phase])

    def at(self, steps: Array) -> Array:
        """The multipliers at an array of steps, which are whole numbers in float64."""
        result = np.empty(steps.shape)
        flat, out = steps.reshape(-1), result.reshape(-1)
        for begin in range(0, flat.size, _BLOCK):
            self._fill(flat[begin : begin + _BLOCK], out[begin : begin + _BLOCK])
        return result

    def _fill(self, steps: Array, out: Array) -> None:
        phases = np.searchsorted(self._starts, steps, side="right") - 1
        for phase in range(phases.min(), phases.max() + 1):
            here = phases == phase
            if here.any():
                out[here] = self._values[phase](steps[here] - self._starts[phase])


class ProductCurve:
    """The product of several curves."""

    def __init__(self, curves: Sequence[AnyCurve]) -> None:
        self._curves = tuple(curves)

    def __call__(self, step: Steps) -> float:
        """The multiplier at one step."""
        result = 1.0
        for curve in self._curves:
            result *= curve(step)
        return result

    def at(self, steps: Array) -> Array:
        """The multipliers at an array of steps."""
        result = np.ones(steps.shape)
        for curve in self._curves:
            result *= curve.at(steps)
        return result


AnyCurve = Curve | ProductCurve
