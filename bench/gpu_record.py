"""The file that every result is appended to, one JSON object a line; what was measured before a cut is in it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "FUSEDOPT_GPU_RESULTS"  # the file
STAGE = "FUSEDOPT_GPU_STAGE"  # the stage that a process belongs to
SHARD = "FUSEDOPT_GPU_SHARD"  # its share of the work, as in 0/8
RUNNING = "FUSEDOPT_GPU_RUNNING"  # folder with the name of the test that runs, for whoever has to end it
ABSENT = 77  # exit status of what does not exist on this machine, as automake's tests have it

KEPT_LINES = 60
KEPT_WIDTH = 200
# Results stay below what the caller may get back. Beyond this size, texts of several lines keep their end only.
ROOMY_BYTES = 8 * 2**20


class Results:
    """Appends to a file. Several processes may do so at once."""

    def __init__(self, path: Path, stage: str = "") -> None:
        self.path = path
        self.stage = stage

    @classmethod
    def of_environment(cls, otherwise: Path | None = None) -> Results:
        """The file that the environment names; `otherwise`, or nowhere, if it names none."""
        named = os.environ.get(RESULTS)
        path = Path(named) if named else otherwise or Path(os.devnull)
        return cls(path, os.environ.get(STAGE, ""))

    def add(self, kind: str, **fields: Any) -> None:
        """Writes a line, which is on the disk when this returns."""
        found = {"kind": kind, "stage": self.stage, "at": round(time.time(), 3), **fields}
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            lines = KEPT_LINES if size < ROOMY_BYTES else 5
            data = (json.dumps(_plain(found, lines), allow_nan=False) + "\n").encode()
            if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data  # somebody was killed within a line
            while data:
                data = data[os.write(descriptor, data) :]
            if self.path != Path(os.devnull):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def tail(text: str, lines: int = KEPT_LINES) -> str:
    """The last lines, each of a readable length."""
    return "\n".join(line[:KEPT_WIDTH] for line in text.splitlines()[-lines:])


def _plain(value: Any, lines: int) -> Any:
    """What JSON can hold: numbers that are not finite as text, and long texts shortened."""
    if isinstance(value, dict):
        return {str(key): _plain(each, lines) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, lines) for each in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return tail(str(value), lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The results of a file, but for a line that was cut."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_run(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a file that several runs were appended to, the results of the last one."""
    begins = [at for at, each in enumerate(found) if each["kind"] == "run"]
    return found[begins[-1] :] if begins else found


def share() -> tuple[int, int]:
    """This process's number, and how many there are, among those that share a stage."""
    number, _, count = os.environ.get(SHARD, "0/1").partition("/")
    return int(number), int(count)
