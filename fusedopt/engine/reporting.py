"""Reporting: what an optimizer tells about itself."""

from __future__ import annotations

from typing import Any

import torch

from . import norms, reports
from .contract import Contract


def is_captured() -> bool:
    """Whether a CUDA graph records this step, whose numbers nobody can look at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Reporting(Contract):
    """The reports of an optimizer."""

    _health: reports.HealthRecord | None = None
    _norms: norms.NormsRecord | None = None

    def memory_report(self) -> reports.MemoryReport:
        """What the optimizer's state takes, by kind, beside what torch's would; print it for a table.

        State that is not made yet counts as what it will take.
        """
        return reports.memory_report(self)

    def record_health(self, enabled: bool = True) -> None:
        """Counts from now on, in every step, what goes wrong quietly; `health_report` tells.

        Counting reads every tile once more, so switch it on for some steps. Compiled steps are counted, too; the
        replays of a CUDA graph are not.
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

    def record_norms(self, enabled: bool = True) -> None:
        """Takes, in every step from now on, the norms of updates and weights; `norms_report` tells.

        The step's own loops and kernels take them. Where states are streamed to a device, and in the reference path,
        the weights before the step are kept for its length instead, which takes as much memory as they do. Ranks that
        share DTensors meet once more in such a step, to add what each of them holds, so switch this on and off on all
        of them alike. Compiled steps are measured, too; the replays of a CUDA graph are not.
        """
        self._norms = norms.NormsRecord(self) if enabled else None

    @property
    def records_norms(self) -> bool:
        """Whether `record_norms` is on."""
        return self._norms is not None

    def norms_report(self) -> norms.NormsReport:
        """The norms of the last step since `record_norms` that was taken; print it for a table.

        A step that `skip_step_above` or GradScaler leaves out has none.

        Raises:
            ValueError: None were taken.
        """
        if self._norms is None or self._norms.report is None:
            raise ValueError("no norms were taken; call record_norms() before the step whose norms are to be taken")
        return self._norms.report

    def _forget_recorded(self) -> None:
        """Forgets what was measured of a step that did not come to its end, or was left out."""
        if self._norms is not None:
            self._norms.sums = {}

    def _recorded(self) -> dict[str, Any]:
        """What steps are told to count and measure, as keyword arguments."""
        # Most steps record nothing, and are not to ask a device.
        if (self._health is None and self._norms is None) or is_captured():
            return {"counts_health": False, "square_sums": None}
        sums = None if self._norms is None else self._norms.sums
        return {"counts_health": self._health is not None, "square_sums": sums}
