"""For tests that read machine code: bench/sass.py, which is on no path, and a skip where its tools are missing."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
