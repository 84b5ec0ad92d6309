"""The CUDA kernels on the CPU: the backend as it is, but for the kernels' module and where tensors lie."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fusedopt import _core, backends
from fusedopt.backends.cuda import CudaBackend
from fusedopt.backends.table import PARAM_DTYPES

FOLDER = os.environ.get("FUSEDOPT_EMULATED", "")  # where `make` built them (CMake's FUSEDOPT_CUDA_ON_CPU)

# Not fusedopt._cuda: pybind11 gives the module that was imported by a name to whoever loads another one by it.
NAME = "fusedopt_emulated._cuda"


@functools.cache
def module() -> ModuleType:
    (path,) = Path(FOLDER).rglob("_cuda*.so")
    spec = importlib.util.spec_from_loader(NAME, importlib.machinery.ExtensionFileLoader(NAME, str(path)))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.layout == _core.layout
    return loaded


class EmulatedBackend(CudaBackend):
    def module(self) -> ModuleType:
        return module()

    def device_of(self, tensor: Tensor) -> torch.device:
        return torch.device("cpu")

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[int]:
        yield 0

    def unusable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, param: Tensor) -> str | None:
        return None if param.dtype in PARAM_DTYPES else f"its dtype is {param.dtype}"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" steps CPU tensors by the kernels."""
    if not FOLDER:
        pytest.skip("FUSEDOPT_EMULATED does not say where the kernels for the CPU are; `make test` builds them")
    monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedBackend())
