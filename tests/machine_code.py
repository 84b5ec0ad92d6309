"""For tests that read machine code: bench/sass.py, which is on no path, and a skip where its tools are missing."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fusedopt

ROOT = Path(__file__).resolve().parents[1]
SOME = 32  # machine code is read for seconds, so of kernels that differ in their rules every 32nd one is looked at
USUAL = {"Adam<0,0>": "AdamW", "Lion": "Lion"}  # rules whose machine code is looked at closely


@functools.cache
def sass() -> Any:
    """The module."""
    spec = importlib.util.spec_from_file_location("sass", ROOT / "bench" / "sass.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def dump(path: Path, *arguments: str) -> str:
    """What cuobjdump prints of a file."""
    if sass().environment() is None:
        pytest.skip("needs cuobjdump and nvdisasm: of the CUDA toolkit, or of their packages")
    return sass().dump(path, *arguments)


@functools.cache
def installed() -> Path:
    """The installed kernels."""
    (folder,) = fusedopt.__path__
    found = list(Path(folder).glob("_cuda*.so"))
    if not found:
        pytest.skip("this build of fusedopt has no CUDA kernels; they are built where nvcc is")
    return found[0]


def is_for(path: Path, architecture: str) -> bool:
    """Whether there is machine code for it, as in sm_90."""
    return f".{architecture}." in dump(path, "--list-elf")


@functools.cache
def named(path: Path, architecture: str) -> list[Any]:
    """The kernels, without their instructions: in no time."""
    usage = dump(path, "--dump-resource-usage", "-arch", architecture)
    return [sass().Kernel(name) for name in re.findall(r"Function (\S+):", usage)]


@functools.cache
def kernels_of(path: Path, architecture: str, every: int = SOME) -> list[Any]:
    """With their instructions: every so many-th kernel, and sums of squares."""
    if every == 1:
        return sass().parse(dump(path, "-sass", "-arch", architecture))
    kernels = enumerate(named(path, architecture))
    return _taken_out(
        path, architecture, [k.name for number, k in kernels if number % every == 0 or "square_sum" in k.name]
    )


@functools.cache
def usual_kernels_of(path: Path, architecture: str) -> list[Any]:
    """With their instructions: those that have USUAL rules and formats."""
    chosen = [k.name for k in named(path, architecture) if k.rule in USUAL and k.formats is not None]
    return _taken_out(path, architecture, chosen)


def _taken_out(path: Path, architecture: str, chosen: list[str]) -> list[Any]:
    # One by one, which takes half a second for each, and so is less than all of them only if they are few.
    return sass().parse(dump(path, "-sass", "-arch", architecture, "-fun", ",".join(sorted(chosen))))
