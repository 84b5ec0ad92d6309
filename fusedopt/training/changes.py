"""Differences of recipes: computed, printed, and applied to another recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_OPEN = ("options", "schedule")  # fields whose keys are compared one by one


class _Absent:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "(absent)"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        field: Its name, such as "lr" or "options.state_dtype".
        before: The value, or ABSENT.
        after: The value that it gets, or ABSENT.
    """

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.before)} -> {_shown(self.after)}"

    def to_dict(self) -> dict[str, Any]:
        """Field, before and after; what is absent has no key."""
        values = {"field": self.field, "before": self.before, "after": self.after}
        return {key: value for key, value in values.items() if value is not ABSENT}


@dataclass(frozen=True)
class Diff:
    """Changes of a recipe, in the order of its fields.

    Attributes:
        changes: Each of another field.
    """

    changes: tuple[Change, ...] = ()

    @classmethod
    def between(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Diff:
        """What differs between two recipes' `flat` forms."""
        pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in dict.fromkeys([*before, *after]))
        return cls(tuple(Change(*pair) for pair in pairs if not _same(pair[1], pair[2])))

    def applied_to(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's `flat` form with the changes. Raises a ValueError if it has other values to begin with."""
        result = dict(values)
        for change in self.changes:
            found = result.pop(change.field, ABSENT)
            if not _same(found, change.before):
                raise ValueError(
                    f"{change.field} is {_shown(found)} in this recipe, and the change is from "
                    f"{_shown(change.before)}; make the diff anew"
                )
            if change.after is not ABSENT:
                result[change.field] = change.after
        return result

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "no difference"


NOTHING = Diff()


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's dict with options and schedule key by key: {"options.state_dtype": "8bit"}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name in _OPEN:
            result.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            result[name] = value
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` flattened."""
    result: dict[str, Any] = {name: {} for name in _OPEN}
    for name, value in values.items():
        outer, _, key = name.partition(".")
        if outer in _OPEN:
            result[outer][key] = value
        else:
            result[name] = value
    return result


def _same(a: Any, b: Any) -> bool:
    return (type(a) is type(b) and a == b) or (_is_number(a) and _is_number(b) and a == b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, str) and (not value or "\n" in value):
        return repr(value)
    return "none" if value is None else str(value)
