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

from .. import _core, checks
from . import trial, triton
from .device import DeviceSession, Scalars, guard, pointer
from .table import PARAM_DTYPES

NOT_BUILT = (
    "this build of fusedopt has no CUDA kernels; reinstall it where nvcc 12 or later is on the PATH: "
    "pip install --no-binary fusedopt --force-reinstall --no-deps fusedopt, or install Triton, whose kernels are the "
    "next best: pip install 'fusedopt[triton]'"
)

# Tensors travel as 32 KB of kernel parameters, which older devices (by capability) and drivers (by CUDA) do not take.
_OLDEST_DEVICE = (7, 0)
_LARGE_PARAMETERS = 12010


@functools.cache
def _loaded() -> Any | None:
    if importlib.util.find_spec("fusedopt._cuda") is None:
        return None
    try:
        module = importlib.import_module("fusedopt._cuda")
    except ImportError as error:  # kept: to try again in every step would take its time
        return error
    if module.layout != _core.layout:
        return ImportError("fusedopt._cuda and fusedopt._core come from different builds; reinstall fusedopt")
    return module


def kernels() -> Any | None:
    """The module of the kernels, imported when a CUDA tensor is first met; None if it was not built."""
    found = _loaded()
    if isinstance(found, ImportError):
        raise ImportError(str(found)) from found
    return found


def decimal(version: int) -> str:
    """CUDA writes 12.8 as 12080."""
    return f"{version // 1000}.{version % 1000 // 10}"


def code_for(architectures: str, major: int, minor: int) -> str:
    """What kernels that are built for a list such as 80,90 have for a device: "machine code", "PTX" or nothing.

    Machine code runs on later devices of its generation. The last of the list has PTX, which drivers compile for all
    later devices.
    """
    numbers = [int(text) for text in architectures.split(",") if text]
    if any(number // 10 == major and number % 10 <= minor for number in numbers):
        return "machine code"
    return "PTX" if numbers and 10 * major + minor >= numbers[-1] else ""


def misfit(module: Any, device: torch.device) -> str | None:
    """Why a device or its driver cannot run the kernels at all, as a clause with the remedy; None if they may."""
    major, minor = torch.cuda.get_device_capability(device)
    has, toolkit, driver = f"{device} has compute capability {major}.{minor}", module.toolkit, module.driver_version()
    if (major, minor) < _OLDEST_DEVICE:
        return f"{has}, and they need {'.'.join(map(str, _OLDEST_DEVICE))} or later"
    rebuild = f"reinstall fusedopt with FUSEDOPT_CUDA_ARCHITECTURES={major}{minor}"
    code = code_for(module.architectures, major, minor)
    if module.architectures and not code:
        return f"{has}, the kernels are built for {module.architectures.replace(',', ', ')}; {rebuild}"
    if not toolkit or not driver:  # nothing to compare
        return None
    said = f"the driver supports CUDA up to {decimal(driver)}"
    if driver // 1000 < toolkit // 1000:
        return (
            f"{said}, the kernels are built by nvcc {decimal(toolkit)}; update the driver, or reinstall fusedopt with "
            f"nvcc {driver // 1000} on the PATH"
        )
    if driver < _LARGE_PARAMETERS <= toolkit:
        return f"{said}, and they need {decimal(_LARGE_PARAMETERS)}; update the driver to 530 or later"
    if code == "PTX" and driver < toolkit:
        return (
            f"{has}, for which the kernels have only PTX of nvcc {decimal(toolkit)}, and {said}, which cannot compile "
            f"it; update the driver, or {rebuild}"
        )
    return None


@functools.cache
def _warn_not_built() -> None:
    warnings.warn(f"CUDA parameters are stepped by plain torch, slowly: {NOT_BUILT}", stacklevel=checks.callers_level())


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

    def launch(self, device: torch.device, stream: int, table: _core.TensorTable, scalars: Scalars) -> Tensor | None:
        batch = table.batch(grad_multipliers=scalars.grad_multipliers)
        module = self._kernels()
        # New memory in every step: the allocator knows streams and graphs, and keeps it as long as they need it.
        clips, updates = scalars.norm is not None, scalars.sums_updates
        size = module.workspace_bytes(batch=batch, clips=clips, sums_updates=updates)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        chunks = module.count_update_sums(batch=batch) if updates else 0
        sums = torch.empty((2, chunks), dtype=torch.float64, device=device) if updates else None
        module.step(
            batch=batch,
            lrs=[(pointer(lr), lr is not None and lr.dtype == torch.float64) for lr in scalars.lrs],
            grad_scale=pointer(scalars.scaling.grad_scale),
            found_inf=pointer(scalars.scaling.found_inf),
            max_grad_norm=scalars.scaling.max_grad_norm,
            skip_step_above=scalars.scaling.skip_step_above,
            grad_norm=pointer(scalars.norm),
            sums_updates=updates,
            update_sums=pointer(sums),
            workspace=workspace.data_ptr(),
            stream=stream,
        )
        return sums


class CudaBackend:
    """See Backend."""

    name = "cuda"

    def __init__(self) -> None:
        self._verdicts = trial.Verdicts(self._unfit)

    def module(self) -> Any:
        """The kernels."""
        return kernels()

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def guard(self, device: torch.device) -> AbstractContextManager[int]:
        return guard(device)

    def unusable(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip is not None:
            return f"it is on {device}"
        try:
            module = self.module()
        except ImportError as error:
            return f"the CUDA kernels do not load: {error}"
        return NOT_BUILT if module is None else self._verdicts(device)

    def _unfit(self, device: torch.device) -> str | None:
        return misfit(self.module(), device) or self._launch_error(device) or trial.first_difference(self, device)

    def _launch_error(self, device: torch.device) -> str | None:
        """Squares a number on the device."""
        try:
            with self.guard(device) as stream:
                number = torch.full((1,), 3.0, dtype=torch.float32, device=device)
                square = torch.zeros((1,), dtype=torch.float64, device=device)
                error = self.module().trial(number=number.data_ptr(), square=square.data_ptr(), stream=stream)
                if not error and square.item() != 9.0:
                    error = f"the square of 3 is {square.item()}"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as found:  # torch's own, of a device that it cannot reach
            error = trial.said_by(found)
        if not error:
            return None
        return (
            f"a first launch on {device} fails ({error}); see that torch.ones(1, device='{device}') works, then "
            "reinstall fusedopt where this GPU is"
        )

    def refusal(self, param: Tensor) -> str | None:
        device = param.device
        if device.type == "cuda" and torch.version.hip is None and param.dtype not in PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        reason = self.unusable(device)
        if reason is NOT_BUILT:
            if triton.missing() is not None:
                _warn_not_built()
        elif reason is not None and device.type == "cuda" and torch.version.hip is None:
            trial.warn_unused(self.name, str(device), reason)
        return reason

    def session(self) -> CudaSession:
        return CudaSession(self)
