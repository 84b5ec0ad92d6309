"""What tests of `make gpu-check` share: its modules, and its results as they lie in the file."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of bench/ for a dry run; what was installed is on the path before the sources."""
    monkeypatch.setenv("FUSEDOPT_GPU_DRY", "1")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    yield lambda name: importlib.import_module(f"bench.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]


def parsed(data: bytes) -> list[dict[str, Any]]:
    """Lines of a file that may have been cut: only the last one can be less than a whole one."""
    *lines, last = data.split(b"\n")
    found = [json.loads(line) for line in lines if line]
    try:
        return [*found, json.loads(last)] if last else found
    except ValueError:
        return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return parsed(path.read_bytes())


def stages_of(found: list[dict[str, Any]]) -> dict[str, str]:
    """How each stage ended."""
    return {line["name"]: line["outcome"] for line in found if line["kind"] == "stage"}
