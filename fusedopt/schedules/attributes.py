"""Attributes by which torch's and transformers' schedulers are read and set, for a scheduler that keeps them elsewhere.

An attribute that the scheduler's rule does not have is an AttributeError, as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .. import checks
from .feedback import Feedback, State, for_groups


class Measured(Protocol):
    """What attributes ask of a scheduler."""

    rule: Feedback
    state: State
    bounds: dict[str, list[float]]  # those that were handed out, by the name of the argument
    _is_ready: bool

    def change(self, **arguments: Any) -> None:
        """Replaces arguments of the rule."""


def setting(argument: str) -> Any:
    """An argument of the rule, which is another one once this has been set."""

    def read(scheduler: Measured) -> Any:
        return getattr(scheduler.rule, argument)

    def write(scheduler: Measured, value: Any) -> None:
        # Before that, in its constructor, torch 2.6 sets the `verbose` that its schedulers had.
        if scheduler._is_ready:
            read(scheduler)
            scheduler.change(**{argument: value})

    return property(read, write)


def bounds(argument: str) -> Any:
    """A bound of the lr for each group: a list whose elements may be set, too."""

    def read(scheduler: Measured) -> list[float]:
        value = getattr(scheduler.rule, argument)
        return scheduler.bounds.setdefault(argument, list(for_groups(argument, value, len(scheduler.state["lrs"]))))

    def write(scheduler: Measured, value: Any) -> None:
        read(scheduler)
        scheduler.change(**{argument: for_groups(argument, tuple(value), len(scheduler.state["lrs"]))})

    return property(read, write)


def counted(name: str, check: Callable[[str, Any], float] = checks.whole) -> Any:
    """A number in what has been measured."""

    def read(scheduler: Measured) -> Any:
        try:
            return scheduler.state[name]
        except KeyError:
            raise AttributeError(f"{type(scheduler.rule).__name__} does not count {name!r}") from None

    def write(scheduler: Measured, value: Any) -> None:
        read(scheduler)
        scheduler.state[name] = check(name, value)

    return property(read, write)


def measurement(name: str, value: Any) -> float:
    """A measurement that is set: any number, infinite ones and NaN included."""
    return float(value)
