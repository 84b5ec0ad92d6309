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
def kernels_of(path: Path, architecture: str, every: int = 4) -> list[Any]:
    """With their instructions; of step kernels some, and all that have USUAL rules and formats."""
    steps = [kernel for kernel in named(path, architecture) if kernel.rule]
    usual = {kernel.name for kernel in steps if kernel.formats is not None and kernel.rule in USUAL}
    left_out = {kernel.name for number, kernel in enumerate(steps) if number % every != 0} - usual
    mark = "Function : "
    listings = dump(path, "-sass", "-arch", architecture).split(mark)[1:]
    return sass().parse("\n".join(mark + text for text in listings if text.split(None, 1)[0] not in left_out))
