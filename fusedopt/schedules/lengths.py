"""Lengths of phases: steps, or ratios of a total that is known later."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from .. import checks

Length = int | float  # an int is steps, a float in [0, 1) a ratio


def length(name: str, value: Any) -> Length:
    """A length as it is kept: an int of steps or a float in (0, 1).

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative, not finite, or above 1 and not whole.
    """
    if not isinstance(value, bool):
        try:
            return checks.whole(name, operator.index(value))
        except TypeError:
            pass
    result = checks.nonnegative(name, value)
    if result >= 1 and not result.is_integer():
        raise ValueError(
            f"{name}={result!r} is neither steps nor a ratio; pass a whole number of steps, or a ratio of the total "
            "in [0, 1)"
        )
    return result if 0 < result < 1 else int(result)


def optional_length(name: str, value: Any) -> Length | None:
    """A length or None."""
    return None if value is None else length(name, value)


def steps(name: str, value: Any) -> int:
    """A number of steps, not a ratio."""
    result = length(name, value)
    if isinstance(result, float):
        raise ValueError(f"{name}={result!r} is not a number of steps; pass a whole number, the total has no ratio")
    return result


def resolved(value: Length, total: int) -> int:
    """The steps of a length: ratios are rounded up, as in transformers."""
    return value if isinstance(value, int) else math.ceil(total * value)


def resolved_all(values: Sequence[Length], total: int) -> list[int]:
    """The steps of lengths that follow one another.

    Ratios that fill the total exceed it after rounding up, by less than one step each; the last ones make up for that.
    """
    result = [resolved(value, total) for value in values]
    ratios = [i for i, value in enumerate(values) if isinstance(value, float)]
    excess = sum(result) - total
    if 0 < excess < len(ratios):
        for i in ratios[-excess:]:
            result[i] -= 1
    return result
