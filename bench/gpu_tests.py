"""Runs a file of tests under pytest and records each outcome as it comes, with why and where.

    python -m bench.gpu_tests tests/cuda/test_gpu_bits.py -k "adamw and bf16"

FUSEDOPT_GPU_SHARD=i/n runs every n-th test, so that several processes share a file. Those that `make test` leaves out
come last: a cut takes them first.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_record import ABSENT, RUNNING, Results, share, tail

ROOT = Path(__file__).resolve().parents[1]


class Recorder:
    """A plugin."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.counts: dict[str, int] = {}
        self.collected = 0
        self.number, self.count = share()
        folder = os.environ.get(RUNNING)
        self._running = Path(folder) / f"{results.stage}-{self.number}" if folder else Path(os.devnull)
        self._current = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.collected = len(items)
        items.sort(key=lambda item: item.get_closest_marker("thorough") is not None)
        kept = items[self.number :: self.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._current = nodeid
        self._running.write_text(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        fields: dict[str, Any] = {}
        if report.outcome == "skipped":
            longrepr = report.longrepr
            fields["reason"] = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        elif report.outcome == "failed":
            fields["lines"] = tail("\n".join([report.longreprtext, *(text for _, text in report.sections)]))
        self._add(report.nodeid, report.outcome, seconds=round(report.duration, 2), **fields)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self._add(report.nodeid, "failed", lines=tail(report.longreprtext))
        elif report.outcome == "skipped":
            self._add(report.nodeid, "skipped", reason=str(report.longrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo) -> None:
        self._add(self._current, "cut off", lines=tail(str(excinfo.getrepr(style="short"))))

    def pytest_sessionfinish(self) -> None:
        if self._running != Path(os.devnull):
            self._running.unlink(missing_ok=True)

    def _add(self, test: str, outcome: str, **fields: Any) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        self.results.add("test", test=test.rpartition("tests/")[2], outcome=outcome, **fields)


def main(arguments: list[str]) -> int:
    """0 if every test of this share passed or was skipped."""
    # Where a test hangs in a kernel, an interrupt still says where; to what is standard error before pytest takes it.
    with open(os.dup(2), "w") as log:
        faulthandler.register(signal.SIGINT, file=log, all_threads=False, chain=True)
        recorder = Recorder(Results.of_environment())
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", "-c", str(ROOT / "pyproject.toml")]
        status = pytest.main([*options, "--rootdir", str(ROOT), *arguments], plugins=[recorder])
        faulthandler.unregister(signal.SIGINT)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and recorder.collected > 0:
        status = pytest.ExitCode.OK  # the other shares have them
    if status == pytest.ExitCode.OK and set(recorder.counts) == {"skipped"}:
        print("every test was skipped")
        return ABSENT
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
