"""The space of a search: which fields of a recipe vary, and over what."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import checks
from .recipe import Recipe

_OPEN = ("options", "schedule")  # fields with keys of their own
_RANGE_KEYS = ("low", "high", "log", "step", "count")


@dataclass(frozen=True)
class Choice:
    """A field that takes one of some values.

    Args:
        values: Of any kind that a recipe's file can hold.
    """

    values: tuple[Any, ...]

    @property
    def labels(self) -> dict[Any, Any]:
        """The values by what a storage can hold: themselves, or as JSON."""
        is_plain = all(isinstance(value, (str, int, float, bool, type(None))) for value in self.values)
        return {value if is_plain else json.dumps(value): value for value in self.values}

    def points(self) -> list[Any]:
        """All values."""
        return list(self.values)

    def to_plain(self) -> Any:
        """As in a file."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A field that takes any number between two.

    Args:
        low: The lowest.
        high: The highest; whole numbers make whole numbers.
        log: Whether ratios count, as for a learning rate.
        step: The distance of numbers that may be taken, from `low` on.
        count: How many numbers a grid takes, evenly spread.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    count: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it takes whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def points(self) -> list[Any]:
        """The numbers of a grid. Raises a ValueError if nothing says how many."""
        if self.count is not None:
            at = [i / max(1, self.count - 1) for i in range(self.count)]
            if self.log:
                found = [self.low * (self.high / self.low) ** q for q in at]
            else:
                found = [self.low + (self.high - self.low) * q for q in at]
            return list(dict.fromkeys(round(value) for value in found)) if self.is_whole else found
        step = self.step if self.step is not None else 1 if self.is_whole else None
        if step is None:
            raise ValueError(f"{self} is endless for a grid; give it a count, or list values")
        return [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]

    def to_plain(self) -> Any:
        """As in a file."""
        return {key: value for key, value in vars(self).items() if value is not None and value is not False}


class Space:
    """Fields of a recipe and what they may be.

    Args:
        fields: By name, such as "lr" or "options.state_dtype": a list of values, or {"low": 1e-5, "high": 1e-2,
            "log": True}, with "step" or, for grids, "count" if need be.

    Raises:
        ValueError: A name is no field, or a range is empty.
        TypeError: Something is of the wrong type.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        if not isinstance(fields, Mapping) or not fields:
            raise TypeError(f"space={fields!r} has no fields; pass a mapping such as {{'lr': [1e-4, 1e-3]}}")
        known = [f.name for f in dataclasses.fields(Recipe)]
        self.dimensions: dict[str, Choice | Range] = {}
        for name, given in fields.items():
            outer, dot, inner = str(name).partition(".")
            if outer not in known:
                raise ValueError(f"space has {name!r}, which is no field of a recipe{checks.closest(outer, known)}")
            if dot and (outer not in _OPEN or not inner):
                raise ValueError(f"space has {name!r}, but {outer} has no keys; only {' and '.join(_OPEN)} do")
            self.dimensions[str(name)] = _dimension(str(name), given)

    def __iter__(self) -> Iterator[str]:
        return iter(self.dimensions)

    def __len__(self) -> int:
        return len(self.dimensions)

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, in order; the last field changes first."""
        points = [dimension.points() for dimension in self.dimensions.values()]
        return [dict(zip(self.dimensions, combination)) for combination in itertools.product(*points)]

    def recipe(self, base: Recipe, values: Mapping[str, Any]) -> Recipe:
        """A recipe with values of the space.

        Args:
            base: What all else is from. Another optimizer gets its own defaults, as `Recipe.replaced` gives them.
            values: By field.

        Raises:
            ValueError: They do not go together.
            TypeError: Likewise.
        """
        if "optimizer" in values:
            base = base.replaced(optimizer=values["optimizer"])
        result = base.to_dict()
        if "schedule.name" in values and values["schedule.name"] != base.schedule["name"]:
            result["schedule"] = {}
        for name in sorted(values, key=lambda name: "." in name):  # a whole field before its keys
            outer, dot, inner = name.partition(".")
            result[outer] = {**result[outer], inner: values[name]} if dot else values[name]
        return Recipe.from_dict(result)

    def to_dict(self) -> dict[str, Any]:
        """As in a file; `Space(...)` reads it back."""
        return {name: dimension.to_plain() for name, dimension in self.dimensions.items()}


def _dimension(name: str, given: Any) -> Choice | Range:
    if isinstance(given, (Choice, Range)):
        given = given.to_plain()
    if isinstance(given, Mapping):
        return _range(name, given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        values = tuple(given)
        if not values:
            raise ValueError(f"space.{name}=[] has no values; list at least one")
        keys = [json.dumps(value) for value in values]
        if len(set(keys)) < len(keys):
            raise ValueError(f"space.{name}={list(values)!r} has a value twice; keep one")
        return Choice(values)
    raise TypeError(f"space.{name}={given!r} is a {type(given).__name__}; pass a list of values, or low and high")


def _range(name: str, given: Mapping[str, Any]) -> Range:
    for key in given:
        if key not in _RANGE_KEYS:
            raise ValueError(f"space.{name}.{key} is not known; a range has {', '.join(_RANGE_KEYS)}")
    for key in ("low", "high"):
        if key not in given:
            raise ValueError(f"space.{name} has no {key}; a range has both ends, or else list values")
        checks.number(f"space.{name}.{key}", given[key])
    found = Range(**given)
    checks.flag(f"space.{name}.log", found.log)
    if found.low >= found.high:
        raise ValueError(f"space.{name} goes from {found.low!r} to {found.high!r}; low has to be below high")
    if found.log and found.low <= 0:
        raise ValueError(f"space.{name}.low={found.low!r} has no logarithm; pass a number above 0, or log: false")
    if found.step is not None:
        checks.positive(f"space.{name}.step", found.step)
        if found.log:
            raise ValueError(f"space.{name} has log and step={found.step!r}, which do not go together; leave one out")
    if found.count is not None and checks.whole(f"space.{name}.count", found.count) < 2:
        raise ValueError(f"space.{name}.count={found.count!r} is below 2; a range has two ends at least")
    return found
