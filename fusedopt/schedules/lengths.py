"""Lengths of phases: steps, or ratios of a total that is known later."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from .. import checks

Steps = int | float  # an int, or a float above 1 that is not whole
Length = int | float  # steps, or a float in (0, 1), which is a ratio


def length(name: str, value: Any) -> Length:
    """A length as it is kept: a number of steps, whole ones as an int, or a ratio.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not finite.
    """
    if not isinstance(value, bool):
        try:
            return checks.whole(name, operator.index(value))
        except TypeError:
            pass
    result = checks.nonnegative(name, value)
    return int(result) if result.is_integer() else result


def optional_length(name: str, value: Any) -> Length | None:
    """A length or None."""
    return None if value is None else length(name, value)


def steps(name: str, value: Any) -> Steps:
    """A number of steps, not a ratio."""
    result = length(name, value)
    if is_ratio(result):
        raise ValueError(f"{name}={result!r} is not a number of steps; pass 0, or 1 and more, the total has no ratio")
    return result


def is_ratio(value: Length | None) -> bool:
    """Whether a length hangs on the total."""
    return isinstance(value, float) and value < 1


def resolved(value: Length, total: Steps) -> Steps:
    """The steps of a length: ratios are rounded up, as in transformers."""
    return math.ceil(total * value) if is_ratio(value) else value


def resolved_all(values: Sequence[Length], total: Steps) -> list[Steps]:
    """The steps of lengths that follow one another.

    Ratios that fill the total exceed it after rounding up, by less than one step each; the last ones make up for that.
    """
    result = [resolved(value, total) for value in values]
    ratios = [i for i, value in enumerate(values) if is_ratio(value)]
    excess = -rest(total, result)
    if 0 < excess < len(ratios):
        for i in ratios[-math.ceil(excess) :]:
            result[i] -= 1
    return result


def rest(total: Steps, taken: Sequence[Steps]) -> Steps:
    """The steps that are left of a total; below 0 if more are taken than there are."""
    result = total
    for value in taken:
        result -= value
    # Parts of a total that fill it, such as 0.06 and 0.94 of 339 steps, miss it by what each subtraction rounds.
    return 0 if abs(result) <= len(taken) * math.ulp(total) else result
