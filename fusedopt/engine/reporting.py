"""Reporting: what an optimizer tells about itself."""

from __future__ import annotations

from . import reports
from .contract import Contract


class Reporting(Contract):
    """The reports of an optimizer."""

    _health: reports.HealthRecord | None = None

    def memory_report(self) -> reports.MemoryReport:
        """What the optimizer's state takes, by kind, beside what torch's would; print it for a table.

        State that is not made yet counts as what it will take.
        """
        return reports.memory_report(self)

    def record_health(self, enabled: bool = True) -> None:
        """Counts from now on, in every step, what goes wrong quietly; `health_report` tells.

        Counting reads every tile once more, so switch it on for some steps. Compiled steps are not counted.
        """
        self._health = reports.HealthRecord(self) if enabled else None

    def health_report(self) -> reports.HealthReport:
        """What was counted since `record_health`; print it for a table.

        Raises:
            ValueError: Nothing is being counted.
        """
        if self._health is None:
            raise ValueError("nothing was counted; call record_health() before the steps that are to be counted")
        return self._health.report()
