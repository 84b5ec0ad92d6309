"""What trainings leave on disk: run files of JSON lines, results written at once, and who works in a folder."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import checks
from ..backends.info import info
from .files import replacing
from .monitor_runs import VERSION, Lines, lock, read_run
from .recipe import LABELS, Recipe


def write_json(path: Path, values: Any) -> None:
    """Writes a file at once: after a kill or a power cut there is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises a ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); pass a folder that has it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it was written by something else") from error


class RunFile:
    """Writes a run file, a line per step, so that a kill loses nothing that was written before it.

    Args:
        path: The file.
        append: Whether records that are there already stay, up to the first step that is written.
        header: The file's first line, if it is to have one; the last then says that it has ended. With `append` it is
            written before the first step, after the records of a file that has none.
    """

    def __init__(self, path: Path, *, append: bool = False, header: Mapping[str, Any] | None = None) -> None:
        self.path, self.append, self._header = path, append, header
        self.kept: list[dict[str, Any]] = []
        self._file: Lines | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes the record of a step."""
        if self._file is None:
            self._open(record["step"])
        assert self._file is not None
        self._file.write(record)

    def begin(self, step: int) -> list[dict[str, Any]]:
        """Makes the file, with those records of before that come before a step, and returns these."""
        if self._file is None:
            self._open(step)
        return self.kept

    def _open(self, step: int) -> None:
        if self._header is not None:
            check_free(self.path)
        # Of steps that are taken twice, a reader takes the later: what was written before may stay in the file.
        if self.append and self.path.exists():
            self.kept = [record for record in read_run(self.path).records if record["step"] < step]
        else:
            self.path.unlink(missing_ok=True)
            self._write_header()
        self._file = Lines(self.path)
        if self._header is not None:
            self._file.hold()

    def _write_header(self) -> None:
        if self._header is not None:
            file = Lines(self.path)
            file.write(self._header)
            file.close()

    def __enter__(self) -> RunFile:
        # A loop may write checkpoints, and be killed, before it yields its first step.
        # What is there without a header is an empty file, or one of a version that wrote none.
        if self.append and self._header is not None and not (self.path.exists() and read_run(self.path).header):
            self._write_header()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        # As a Monitor notes it: who watches the file of a training that is over waits for no more.
        if kind is None and self._header is not None and not read_run(self.path).ended:
            self._file.write({"ended": time.time()})
        self._file.close()


def check_free(path: Path) -> None:
    """Raises a ValueError if another training, of whatever process, writes a file at this time."""
    with contextlib.suppress(OSError), path.open("rb+") as file:  # not there; or a file system without locks
        if not lock(file.fileno()):
            raise ValueError(f"{path} is being written by another training; pass another path, or wait for it")


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock that ends with the process, however it ends; yields whether it was free.

    Args:
        path: A file that stands for what is locked.
        wait: Whether to wait until it is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        yield lock(file.fileno(), wait=wait)


def environment() -> dict[str, Any]:
    """What a result was measured with: versions, processor, threads, devices; plain values."""
    found = info()
    return {
        "fusedopt": found["fusedopt"],
        "torch": found["torch"],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction set": found["cpu"]["selected"],
        "devices": [device["name"] for device in found["cuda"]["devices"]],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def finite(value: Any) -> Any:
    """A value for JSON, which has neither infinities nor NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a ValueError if a folder holds results of something else."""
    _check_same(path, before, now, "continue it with the same, or pass another folder")


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    for key in now:
        if before.get(key) != now[key]:
            told = f"{_short(before.get(key))}, now {_short(now[key])}"
            raise ValueError(f"{path} was begun with another {key} ({told}); {remedy}")


def run_header(recipe: Recipe, loop: str | None) -> dict[str, Any]:
    """The first line of a file of `run`, by which `check_run` knows it."""
    values = {"recipe": recipe.to_dict(), "fingerprint": recipe.fingerprint, "loop": loop}
    return {"version": VERSION, "started": time.time(), **values}


def check_run(path: Path, folder: Path | None, recipe: Recipe, loop: str | None, budget: int) -> None:
    """Raises a ValueError if a run file, or the folder of its checkpoints, is of something else, or in use.

    Args:
        path: The run file, which need not be there.
        folder: That of the checkpoints, if the loop keeps any.
        recipe: What is to be trained.
        loop: The loop's name.
        budget: Steps. What was trained beyond them is no training of so many.
    """
    check_free(path)
    if path.exists() and path.stat().st_size:
        try:
            found = read_run(path)
        except ValueError as error:
            told = str(error).rpartition("; ")[0]
            raise ValueError(f"{path} is there already, and no run file ({told}); pass another path") from error
        beside = "" if folder is None else f" and {folder}"
        if "loop" in found.header:
            remedy = f"continue it with the same, pass another path, or remove {path}{beside}"
            before = {**_recipe_of(path, found.header), "loop": found.header["loop"]}
            _check_same(path, before, {**_without_labels(recipe.to_dict()), "loop": loop}, remedy)
        elif found.header or not found.records or not all("seconds" in record for record in found.records):
            raise ValueError(
                f"{path} is there already, and `run` has not written it, so it does not say what was trained; pass "
                f"another path, or remove {path}{beside}"
            )
        else:
            told = "has no header, as the version before wrote it, and is taken to be of this recipe and loop"
            warnings.warn(f"{path} {told}", stacklevel=checks.callers_level())
        if folder is not None and found.records and found.records[-1]["step"] > budget:
            step = found.records[-1]["step"]
            raise ValueError(
                f"{path} was trained to step {step} already, and budget={budget!r}; pass budget={step} or more, or "
                "another path"
            )
    elif folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} has checkpoints, and {path}, which says of what, is missing; pass another path, or remove the "
            "folder"
        )


def _without_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in LABELS}


def _recipe_of(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    # A version that had fewer fields trained with the defaults of the others.
    try:
        return _without_labels(Recipe.from_dict(_without_labels(header["recipe"])).to_dict())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a recipe that cannot be read here ({error}); pass another path") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
