"""What validation finds: how bad, where, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .changes import NOTHING, Diff

# The worst first; a command's exit status is the position from the end.
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        severity: "error": it fails, or cannot train; "warning": it rarely is what one wants; "note": worth knowing.
        field: The field of the recipe, or where in a model or optimizer.
        value: Its value.
        reason: What goes wrong, as a clause or sentence.
        remedy: What to do.
        change: The remedy as changes of the recipe; empty if there is no single one.
    """

    severity: str
    field: str
    value: Any
    reason: str
    remedy: str
    change: Diff = NOTHING

    def __str__(self) -> str:
        shown = "" if self.value is None else f"={self.value!r}"
        return f"{self.severity}: {self.field}{shown}: {self.reason}; {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        value = (
            self.value if isinstance(self.value, (str, int, float, bool, list, dict, type(None))) else str(self.value)
        )
        return {
            "severity": self.severity,
            "field": self.field,
            "value": value,
            "reason": self.reason,
            "remedy": self.remedy,
            "change": [change.to_dict() for change in self.change],
        }


class Findings:
    """All findings of a validation, the worst first.

    Args:
        findings: In any order; that of those of one severity stays.
    """

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        self._all = tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Finding:
        return self._all[index]

    def of(self, severity: str) -> list[Finding]:
        """Those of a severity."""
        return [finding for finding in self._all if finding.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        """What fails or cannot train."""
        return self.of("error")

    @property
    def warnings(self) -> list[Finding]:
        """What rarely is what one wants."""
        return self.of("warning")

    @property
    def exit_status(self) -> int:
        """Of `fusedopt validate`: 2 with errors, 1 with warnings, else 0."""
        return 2 if self.errors else 1 if self.warnings else 0

    def raise_errors(self) -> None:
        """Raises a ValueError with all errors in it, if there are any."""
        if self.errors:
            raise ValueError("\n".join(map(str, self.errors)))

    def __str__(self) -> str:
        return "\n".join(map(str, self._all)) or "nothing found"

    def __repr__(self) -> str:
        return f"Findings({list(self._all)!r})"
