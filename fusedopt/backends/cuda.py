"""The CUDA kernels: a step is a few launches and waits for nothing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import _core
from . import triton
from .device import DeviceSession, Scalars, guard, pointer
from .table import PARAM_DTYPES

NOT_BUILT = (
    "this build of fusedopt has no CUDA kernels; reinstall it where nvcc 12 or later is on the PATH: "
    "pip install --no-binary fusedopt --force-reinstall --no-deps fusedopt, or install Triton, whose kernels are the "
    "next best: pip install 'fusedopt[triton]'"
)


@functools.cache
def kernels() -> Any | None:
    """The module of the kernels, imported when a CUDA tensor is first met; None if it was not built."""
    if importlib.util.find_spec("fusedopt._cuda") is None:
        return None
    module = importlib.import_module("fusedopt._cuda")
    if module.layout != _core.layout:
        raise ImportError("fusedopt._cuda and fusedopt._core come from different builds; reinstall fusedopt")
    return module


@functools.cache
def _warn_not_built() -> None:
    warnings.warn(f"CUDA parameters are stepped by plain torch, slowly: {NOT_BUILT}", stacklevel=2)


class CudaSession(DeviceSession):
    """See DeviceSession."""

    def __init__(self, backend: CudaBackend) -> None:
        super().__init__(backend)
        self._kernels = backend.module

    def launch_square_sums(self, device: torch.device, stream: int, table: _core.TensorTable) -> Tensor:
        batch = table.batch(grad_multipliers=[1.0] * len(self._groups))
        module = self._kernels()
        sums = torch.empty(module.count_square_sums(batch=batch), dtype=torch.float64, device=device)
        module.square_sums(batch=batch, sums=sums.data_ptr(), stream=stream)
        return sums

    def launch(self, device: torch.device, stream: int, table: _core.TensorTable, scalars: Scalars) -> None:
        batch = table.batch(grad_multipliers=scalars.grad_multipliers)
        module = self._kernels()
        # New memory in every step: the allocator knows streams and graphs, and keeps it as long as they need it.
        size = module.workspace_bytes(batch=batch, clips=scalars.norm is not None)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        module.step(
            batch=batch,
            lrs=[(pointer(lr), lr is not None and lr.dtype == torch.float64) for lr in scalars.lrs],
            grad_scale=pointer(scalars.scaling.grad_scale),
            found_inf=pointer(scalars.scaling.found_inf),
            max_grad_norm=scalars.scaling.max_grad_norm,
            grad_norm=pointer(scalars.norm),
            workspace=workspace.data_ptr(),
            stream=stream,
        )


class CudaBackend:
    """See Backend."""

    name = "cuda"

    def module(self) -> Any:
        """The kernels."""
        return kernels()

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def guard(self, device: torch.device) -> AbstractContextManager[int]:
        return guard(device)

    def refusal(self, param: Tensor) -> str | None:
        if param.device.type != "cuda" or torch.version.hip is not None:
            return f"it is on {param.device}"
        if param.dtype not in PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        if self.module() is None:
            if triton.missing() is not None:
                _warn_not_built()
            return NOT_BUILT
        return None

    def session(self) -> CudaSession:
        return CudaSession(self)
