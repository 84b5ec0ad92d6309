from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

# The folder tests/triton is not the package, for which it would pass where that is not installed.
if (found := importlib.util.find_spec("triton")) is not None and found.origin is None:
    sys.modules["triton"] = None  # type: ignore[assignment]

import pytest
import torch

# Before anybody imports triton: where there is no GPU, its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Frameworks import torchvision where it is installed. On PyPI it is built for CUDA: beside a torch for the CPU it does
# not load, as its operators are missing. Frameworks use none of them here, so they are declared.
try:
    importlib.import_module("torchvision")
except ModuleNotFoundError:
    pass
except RuntimeError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from conversions import mesh as mesh  # fixtures
from emulated import emulated as emulated
from gpu import REASON
from gpu import kernels_at_hand as kernels_at_hand
from interpreted import _quick as _quick
from interpreted import interpreted as interpreted
from on_gpu import bench as bench

from fusedopt import _core

# What is only for a GPU is not looked at without one; test_dry.py of `cuda` runs it dry.
collect_ignore_glob = ["*/test_gpu*.py"] if REASON else []


def pytest_report_header() -> list[str]:
    return [f"tests/*/test_gpu*.py: {REASON}"] if REASON else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a minute come first, so that workers end at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Whatever a test does to the thread count or to flushing of subnormals ends with it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this machine runs."""
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", request.param)
    assert _core.selected_isa() == request.param
    return request.param
