"""Runs in files: JSON lines, one a step, that survive a kill at any time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .anomalies import Anomaly, Detector, number

try:
    import fcntl
except ImportError:  # no POSIX: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

VERSION = 1
# What lines of the file have already and nobody else may write: names by which a reader tells lines apart, structures
# and what is taken together with them, and what is written after everything else.
_OWN = {
    "step", "time", "anomalies", "version", "ended", "lrs", "skipped", "groups", "worst", "dead", "update_norm",
    "weight_norm", "update_ratio", "tokens_per_second", "seconds_per_step",
}  # fmt: skip

# JSON has no words for them.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """A value in which JSON has words for everything: what is not finite is a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def check_names(more: Iterable[str], *, has_scale: bool) -> None:
    """Raises a ValueError for a name that a record has a value for already; with a scaler, "scale" is one."""
    for name in more:
        if name in _OWN or (has_scale and name == "scale"):
            raise ValueError(
                f"{name}= is a name that the file of a run uses itself; record it under another, such as my_{name}="
            )


def _numbers(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return value


def lock(file: int, *, wait: bool = False) -> bool:
    """Takes an open file until it is closed, or the process ends; tells whether it was free.

    Args:
        file: Its number.
        wait: Whether to wait until it is free.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
    return True


class Lines:
    """A file that lines are appended to: each with one call to the system, so that a kill cuts at most the last.

    Args:
        path: The file; made if it is not there. Of one that a kill has cut, the cut line is removed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        end = _end_of_lines(self._file)
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a line."""
        line = json.dumps(plain(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        written = os.write(self._file, line)
        while written < len(line):  # a disk that is nearly full
            written += os.write(self._file, line[written:])

    def hold(self) -> None:
        """Marks the file as being written, for who asks, until it is closed or the process ends."""
        with contextlib.suppress(OSError):  # a file system without locks
            lock(self._file)

    def close(self) -> None:
        """Closes the file; what was written is in the system's hands already."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _end_of_lines(file: int) -> int:
    """Where the last whole line ends."""
    end = os.fstat(file).st_size
    while end > 0:
        begin = max(0, end - 65_536)
        at = os.pread(file, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


class Run:
    """What was recorded of a training.

    Attributes:
        header: What was known when it began: "version", "started" (seconds since 1970), and what it was given.
        records: One dict a step, in their order; of steps that were taken twice, after a resume, the later.
        resumes: How often it was continued.
        is_cut: Whether the last line is not complete: it is being written, or was cut by a kill.
        ended: Whether the training is over: the monitor was closed, or `run` came to its end.
    """

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.resumes = 0
        self.is_cut = False
        self.ended = False

    def add(self, line: dict[str, Any]) -> None:
        """Takes the next line of a file."""
        if "version" in line:
            if line["version"] != VERSION:
                raise ValueError(f"version {line['version']!r} of run files is not known here; update fusedopt")
            self.resumes += bool(self.header)
            self.header = {**self.header, **line, "started": self.header.get("started", line.get("started"))}
            self.ended = False
        elif "ended" in line:
            self.ended = True
        else:
            while self.records and self.records[-1]["step"] >= line["step"]:
                self.records.pop()
            self.records.append(line)
            self.ended = False

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number, where it was recorded."""
        pairs = [(r["step"], number(r.get(name))) for r in self.records]
        return [step for step, value in pairs if value is not None], [value for _, value in pairs if value is not None]

    def names(self) -> list[str]:
        """The numbers that were recorded, "step" and "time" excepted, those that every training has first."""
        found = dict.fromkeys(key for r in self.records for key, value in r.items() if number(value) is not None)
        first = [name for name in ("loss", "lr", "grad_norm", "update_norm", "update_ratio") if name in found]
        return [*first, *(name for name in found if name not in (*first, "step", "time"))]

    @property
    def anomalies(self) -> list[Anomaly]:
        """All that were found while it ran; of a file that no Monitor has written, what its records show."""
        if "optimizer" not in self.header and not any("anomalies" in record for record in self.records):
            detector = Detector()
            return [found for record in self.records for found in detector.add(record)]
        return [
            Anomaly(**{**found, "step": record["step"]})
            for record in self.records
            for found in record.get("anomalies", ())
        ]


class Reader:
    """Reads a file that is still written to: each call reads what is new.

    Args:
        path: The file.

    Attributes:
        run: What was read so far.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.run = Path(path), Run()
        self._offset, self._line = 0, 0

    def read(self) -> Run:
        """Reads on to the end.

        Returns:
            The run.

        Raises:
            ValueError: A line is no record. A last line that is cut is left out.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole, _, rest = new.rpartition(b"\n")
        self.run.is_cut = bool(rest)
        for text in whole.split(b"\n") if whole else ():
            self._line += 1
            if text.strip():
                self.run.add(self._parsed(text))
        self._offset += len(new) - len(rest)
        return self.run

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            line = _numbers(json.loads(text))
        except ValueError:
            line = None
        if not isinstance(line, dict) or not ({"version", "ended"} & set(line) or isinstance(line.get("step"), int)):
            shown = text[:60].decode(errors="replace")
            raise ValueError(
                f"line {self._line} of {self.path} is no record of a run: {shown!r}; pass a file of Monitor's"
            )
        return line


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads what `Monitor` has written, also while it is still writing.

    Args:
        path: The file.

    Returns:
        The run; a last line that a kill has cut is left out.

    Raises:
        ValueError: A line is no record.
        OSError: There is no such file.
    """
    return Reader(path).read()


def replay(run: Run) -> Iterator[dict[str, Any]]:
    """The records of a run as they were before anomalies were looked for."""
    for record in run.records:
        yield {key: value for key, value in record.items() if key != "anomalies"}
