"""Building blocks of schedules: warmup, constant and decay, sequences of schedules, and products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from .. import checks
from . import lengths, shapes
from .curve import AnyCurve, Flat, Phase, ProductCurve, Ramp
from .lengths import Length, Steps
from .schedule import Schedule, checked_total, fill


@dataclass(frozen=True)
class Constant(Schedule):
    """One multiplier throughout.

    Args:
        steps: How long. Without it, for ever if nothing follows, else the steps that the others leave of the total.
        value: The multiplier; by default where the schedule before it ended, or 1 if it is the first.
    """

    name: ClassVar[str] = "constant"
    steps: Length | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        fill(self, steps=lengths.optional_length("steps", self.steps), value=_level("value", self.value))

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        level = _first(self.value, before, 1.0)
        return [Phase(self.steps, Flat(level), level)]

    def resolve(self, total: Steps) -> Constant:
        return _resolved_steps(self, total)

    @property
    def is_resolved(self) -> bool:
        return not lengths.is_ratio(self.steps)


@dataclass(frozen=True)
class Warmup(Schedule):
    """A way up: ``start + (end - start) r(k / steps)``.

    Args:
        steps: How long.
        shape: If q is the part that has passed, r is "linear" q, "cosine" (1 - cos pi q) / 2, "1-sqrt" 1 - sqrt(1 - q),
            or "exponential" (1 - e^-5q) / (1 - e^-5), the saturating warmup of Ma and Yarats, "On the adequacy of
            untuned warmup for adaptive optimization" (arXiv:1910.04209), with a time constant of a fifth of the phase
            and scaled so that it arrives.
        end: The multiplier it arrives at.
        start: The multiplier it starts from; by default where the schedule before it ended, or 0 if it is the first.
    """

    name: ClassVar[str] = "warmup"
    steps: Length
    shape: str = "linear"
    end: float = 1.0
    start: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("shape", self.shape, shapes.RISES)
        fill(
            self,
            steps=lengths.length("steps", self.steps),
            end=_level("end", self.end),
            start=_level("start", self.start),
        )
        if self.start is not None and self.start > self.end:
            raise ValueError(f"start={self.start!r} is above end={self.end!r}, which is no warmup; use a decay")

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        start = _first(self.start, before, 0.0)
        if start > self.end:
            raise ValueError(
                f"warmup begins where the schedule before it ended, at {start!r}, above end={self.end!r}; "
                "pass start, or an end above it"
            )
        return [Phase(self.steps, Ramp(shapes.rise(self.shape), start, self.end, self.steps), self.end)]

    def resolve(self, total: Steps) -> Warmup:
        return _resolved_steps(self, total)

    @property
    def is_resolved(self) -> bool:
        return not lengths.is_ratio(self.steps)


@dataclass(frozen=True)
class Decay(Schedule):
    """A way down: ``end + (start - end) f(k / steps)``.

    Args:
        shape: If q is the part that has passed, f is "linear" 1 - q, "cosine" (1 + cos 2 pi num_cycles q) / 2,
            "1-sqrt" 1 - sqrt(q), "exponential" 1 - (1 - e^-5q) / (1 - e^-5), "polynomial" (1 - q)^power, or
            "cosine_with_restarts" (1 + cos pi (num_cycles q mod 1)) / 2.
        steps: How long.
        end: The lowest multiplier, at which it arrives, except for cosines with other than half a cycle.
        start: The multiplier it starts from; by default where the schedule before it ended, or 1 if it is the first.
        num_cycles: For the two cosines only: 0.5 and 1 by default.
        power: For the polynomial only, which needs it; above 0.
    """

    name: ClassVar[str] = "decay"
    shape: str
    steps: Length
    end: float = 0.0
    start: float | None = None
    num_cycles: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("shape", self.shape, shapes.FALLS)
        cycles, power = self.num_cycles, self.power
        if self.shape in ("cosine", "cosine_with_restarts"):
            default = 0.5 if self.shape == "cosine" else 1.0
            cycles = checks.nonnegative("num_cycles", default if cycles is None else cycles)
        elif cycles is not None:
            raise ValueError(f"num_cycles={cycles!r} means nothing to shape={self.shape!r}; leave it out")
        if self.shape == "polynomial":
            if power is None:
                raise ValueError("shape='polynomial' lacks its power; pass power, a number above 0")
            power = checks.positive("power", power)
        elif power is not None:
            raise ValueError(f"power={power!r} means nothing to shape={self.shape!r}; leave it out")
        fill(
            self,
            steps=lengths.length("steps", self.steps),
            end=_level("end", self.end),
            start=_level("start", self.start),
            num_cycles=cycles,
            power=power,
        )
        if self.start is not None and self.start < self.end:
            raise ValueError(f"start={self.start!r} is below end={self.end!r}, which is no decay; use a warmup")

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        start = _first(self.start, before, 1.0)
        if start < self.end:
            raise ValueError(
                f"decay begins where the schedule before it ended, at {start!r}, below end={self.end!r}; "
                "pass start, or an end below it"
            )
        cycles = 0.5 if self.num_cycles is None else self.num_cycles
        shape = shapes.fall(self.shape, cycles, 1.0 if self.power is None else self.power)
        return [falling(shape, self.end, start, self.steps, arrives=self.shape != "cosine")]

    def resolve(self, total: Steps) -> Decay:
        return _resolved_steps(self, total)

    @property
    def is_resolved(self) -> bool:
        return not lengths.is_ratio(self.steps)


def falling(shape: shapes.Shape, low: float, high: float, steps: Steps, *, arrives: bool, offset: Steps = 0) -> Phase:
    """A way down as a phase.

    Args:
        shape: Of the way, from 1.
        low: The lower level.
        high: The upper level, where it begins.
        steps: How long.
        arrives: Whether it ends at the lower level, or else at what its formula gives there.
        offset: How many steps are left out at the beginning of the way.
    """
    ramp = Ramp(shape, low, high, max(1, steps), offset)
    return Phase(max(0, steps - offset), ramp, low if arrives else ramp.arrival())


@dataclass(frozen=True)
class Sequence(Schedule):
    """Schedules one after the other, as ``a >> b >> c`` makes them.

    A phase without a start of its own starts where the one before it ended, and the end of the last one holds.

    Args:
        parts: The schedules, in order. At most one before the last may have no length: it gets the steps that the
            others leave of the total.
    """

    name: ClassVar[str] = "sequence"
    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        flat: list[Schedule] = []
        for part in _schedules("parts", self.parts):
            flat += part.parts if isinstance(part, Sequence) else [part]
        fill(self, parts=tuple(flat))
        open_ones = [part for part in flat[:-1] if part.is_resolved and part.length is None]
        if len(open_ones) > 1 or any(not isinstance(part, Constant) for part in open_ones):
            raise ValueError(
                f"{open_ones[-1]!r} has no end, so what follows it would never come; give it a length "
                "(one constant may go without)"
            )
        if self.is_resolved:
            self.phases(None, float("inf"))  # raises if a phase cannot start where the one before it ends

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        result: list[Phase] = []
        for part in self.parts:
            result += part.phases(before, base_lr)
            before = result[-1].end
        return result

    def resolve(self, total: Steps) -> Sequence:
        total = checked_total(total)
        own = [part.steps if isinstance(part, (Constant, Warmup, Decay)) else None for part in self.parts]
        ratios = [i for i, steps in enumerate(own) if lengths.is_ratio(steps)]
        parts = [part if i in ratios else part.resolve(total) for i, part in enumerate(self.parts)]
        # What is given in steps is taken as it is; only ratios have rounding to give back.
        known = {i: part.exact_length for i, part in enumerate(parts) if i not in ratios}
        fixed = [own[i] if i in ratios else known[i] or 0 for i in range(len(parts))]
        steps = lengths.resolved_all(fixed, total)  # type: ignore[arg-type]
        for i in ratios:
            parts[i] = replace(parts[i], steps=steps[i])  # type: ignore[type-var]
        rest = lengths.rest(total, steps)
        if rest < 0:
            raise ValueError(
                f"the phases take {sum(steps)} steps, more than total={total}; make them shorter, or train for longer"
            )
        for i, part in enumerate(parts[:-1]):
            if known.get(i, 0) is None:
                parts[i] = replace(part, steps=rest)  # type: ignore[type-var]
        return Sequence(tuple(parts))

    @property
    def is_resolved(self) -> bool:
        closed = all(not isinstance(part, Constant) or part.steps is not None for part in self.parts[:-1])
        return closed and all(part.is_resolved for part in self.parts)

    @property
    def needs_base_lr(self) -> bool:
        return any(part.needs_base_lr for part in self.parts)

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.parts))


@dataclass(frozen=True)
class Product(Schedule):
    """Schedules multiplied with one another, as ``a * b`` and ``0.1 * a`` make them.

    Args:
        factors: The schedules.
    """

    name: ClassVar[str] = "product"
    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        flat: list[Schedule] = []
        for factor in _schedules("factors", self.factors):
            flat += factor.factors if isinstance(factor, Product) else [factor]
        fill(self, factors=tuple(flat))

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        lengths_ = [factor.exact_length for factor in self.factors if not isinstance(factor, Constant)] or [0]
        steps = None if None in lengths_ else max(lengths_)  # type: ignore[type-var]
        curve = self._curve(base_lr)
        return [Phase(steps, _Evaluated(curve), curve(0 if steps is None else steps))]

    def _curve(self, base_lr: float | None) -> AnyCurve:
        return ProductCurve([factor.curve(base_lr) for factor in self.factors])

    def resolve(self, total: Steps) -> Product:
        return Product(tuple(factor.resolve(total) for factor in self.factors))

    @property
    def is_resolved(self) -> bool:
        return all(factor.is_resolved for factor in self.factors)

    @property
    def needs_base_lr(self) -> bool:
        return any(factor.needs_base_lr for factor in self.factors)

    def __repr__(self) -> str:
        return " * ".join(f"({f!r})" if isinstance(f, Sequence) else repr(f) for f in self.factors)


class _Evaluated:
    """A curve as the value of a phase."""

    def __init__(self, curve: AnyCurve) -> None:
        self.curve = curve

    def __call__(self, k: Any) -> Any:
        return self.curve.at(k) if isinstance(k, np.ndarray) else self.curve(k)


def _resolved_steps(schedule: Any, total: Steps) -> Any:
    total = checked_total(total)
    if not lengths.is_ratio(schedule.steps):
        return schedule
    return replace(schedule, steps=lengths.resolved(schedule.steps, total))


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _level(name: str, value: Any) -> float | None:
    return None if value is None else checks.nonnegative(name, value)


def _schedules(name: str, values: Any) -> tuple[Schedule, ...]:
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"{name}={values!r} is no sequence of schedules; pass a tuple of at least one")
    for value in values:
        if not isinstance(value, Schedule):
            raise TypeError(f"{name} has {value!r}, a {type(value).__name__}; pass schedules only")
    return tuple(values)


def constant(steps: Length | None = None, value: float | None = None) -> Constant:
    """The class `Constant`, by a name that reads well between arrows."""
    return Constant(steps, value)


def warmup(steps: Length, shape: str = "linear", *, end: float = 1.0, start: float | None = None) -> Warmup:
    """The class `Warmup`, by a name that reads well between arrows."""
    return Warmup(steps, shape, end, start)


def decay(
    shape: str,
    steps: Length,
    *,
    end: float = 0.0,
    start: float | None = None,
    num_cycles: float | None = None,
    power: float | None = None,
) -> Decay:
    """The class `Decay`, by a name that reads well between arrows."""
    return Decay(shape, steps, end, start, num_cycles, power)
