"""The kernels in Triton (triton_kernels): AMD and Intel devices, and NVIDIA ones without compiled kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _core, checks
from . import trial
from .device import DeviceSession, Scalars, guard
from .table import PARAM_DTYPES

_OLDEST = (3, 3)  # kernels take functions as constants, and tuples
_INSTALL = "pip install -U 'fusedopt[triton]'"


@functools.cache
def is_installed() -> bool:
    """Whether there is a triton to import."""
    return importlib.util.find_spec("triton") is not None


def installed_version() -> str:
    """Imports triton, which takes a while."""
    return str(importlib.import_module("triton").__version__)


def missing() -> str | None:
    """Why there is no triton for the kernels, as a clause with the remedy; None if there is one."""
    if not is_installed():
        return f"triton is not installed; install it with: {_INSTALL}"
    version = installed_version()
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, _OLDEST))}; install a newer one with: {_INSTALL}"
    return None


def is_interpreting() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@functools.cache
def kernels() -> Any:
    """The module that launches the kernels, imported with triton when they are first needed."""
    return importlib.import_module("fusedopt.triton_kernels.launch")


@functools.cache
def _warn_missing(kind: str, reason: str) -> None:
    warnings.warn(f"{kind} parameters are stepped by plain torch, slowly: {reason}", stacklevel=checks.callers_level())


def unreachable(device: torch.device) -> str | None:
    """Why kernels cannot reach tensors on a device, as a clause; None if they can."""
    reason = missing()
    if reason is not None:
        if device.type == "xpu" or (device.type == "cuda" and torch.version.hip is not None):
            _warn_missing("ROCm" if device.type == "cuda" else "Intel GPU", reason)
        return reason
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and is_interpreting()):
        return f"it is on {device}"
    return None


class TritonSession(DeviceSession):
    """See DeviceSession. It remembers a device's plan for as long as the tensors stay where they are."""

    def __init__(self, backend: TritonBackend) -> None:
        super().__init__(backend)
        self._plans: dict[torch.device, tuple[tuple[bytes, tuple[str, ...]], Any]] = {}
        self._mirrors: dict[torch.device, tuple[Any, Any, Any]] = {}
        self._defaults: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _plan(self, device: torch.device, table: _core.TensorTable) -> Any:
        rows, rules = table.rows(), tuple(group.rule for group in self._groups)
        if device not in self._plans or self._plans[device][0] != (rows, rules):
            self._plans[device] = ((rows, rules), kernels().Plan(rows, table.cuts(), rules))
        return self._plans[device][1]

    def _mirrors_of(self, device: torch.device) -> tuple[Any, Any, Any]:
        """Of the tensors' rows, of how they are cut up, and of the groups'."""
        if device not in self._mirrors:
            self._mirrors[device] = (kernels().Mirror(), kernels().Mirror(), kernels().Mirror())
        return self._mirrors[device]

    def launch_square_sums(self, device: torch.device, stream: int, table: _core.TensorTable) -> Tensor:
        plan = self._plan(device, table)
        return kernels().square_sums(plan, self._mirrors_of(device)[0].on(device, stream, plan.rows))

    def launch(self, device: torch.device, stream: int, table: _core.TensorTable, scalars: Scalars) -> Tensor | None:
        plan = self._plan(device, table)
        groups = kernels().group_rows(
            [group.rule for group in self._groups],
            [group.hyper for group in self._groups],
            [group.seed for group in self._groups],
            scalars.grad_multipliers,
            scalars.lrs,
            scalars.scaling.max_grad_norm,
            scalars.scaling.skip_step_above,
        )
        if device not in self._defaults:
            self._defaults[device] = (
                torch.ones((), dtype=torch.float32, device=device),
                torch.zeros((), dtype=torch.float32, device=device),
            )
        one, zero = self._defaults[device]
        of_tensors, of_cuts, of_groups = self._mirrors_of(device)
        sums: Tensor | None = kernels().take_step(
            plan,
            of_tensors.on(device, stream, plan.rows),
            None if plan.cuts is None else of_cuts.on(device, stream, plan.cuts),
            of_groups.on(device, stream, groups),
            one if scalars.scaling.grad_scale is None else scalars.scaling.grad_scale,
            zero if scalars.scaling.found_inf is None else scalars.scaling.found_inf,
            scalars.norm,
            sums_updates=scalars.sums_updates,
        )
        return sums


class TritonBackend:
    """See Backend."""

    name = "triton"

    def __init__(self) -> None:
        self._verdicts = trial.Verdicts(self._unfit)

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def guard(self, device: torch.device) -> AbstractContextManager[int]:
        return _no_guard() if device.type == "cpu" else guard(device)

    def refusal(self, param: Tensor) -> str | None:
        if param.dtype not in PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        reason = unreachable(param.device)
        if reason is None and (reason := self.unusable(param.device)) is not None:
            trial.warn_unused(self.name, str(param.device), reason)
        return reason

    def unusable(self, device: torch.device) -> str | None:
        reason = unreachable(device)
        return reason if reason is not None or device.type == "cpu" else self._verdicts(device)

    def _unfit(self, device: torch.device) -> str | None:
        error = trial.launch_error(self, device)
        if error is None:
            return trial.first_difference(self, device)
        return (
            f"a first launch on {device} fails ({error}); install the triton that goes with this torch, and the C "
            "compiler that it needs"
        )

    def session(self) -> TritonSession:
        return TritonSession(self)


@contextmanager
def _no_guard() -> Iterator[int]:
    yield 0
