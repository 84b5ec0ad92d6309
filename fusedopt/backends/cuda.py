"""The CUDA kernels: a step is a few launches and waits for nothing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .base import GroupStep, Health, ParamStep, Scaling
from .eager import count_health, weights
from .table import PARAM_DTYPES, add_groups

_CUDA = 2  # DLPack's number
NOT_BUILT = (
    "this build of fusedopt has no CUDA kernels; reinstall it where nvcc 12 or later is on the PATH: "
    "pip install --no-binary fusedopt --force-reinstall --no-deps fusedopt"
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


class CudaSession:
    """See Session. It keeps a table of tensors for each device."""

    def __init__(self, backend: CudaBackend) -> None:
        self._backend = backend
        self._tables: dict[int, _core.TensorTable] = {}
        self._groups: Sequence[GroupStep] = ()
        self._positions: Sequence[list[int] | None] = ()
        self._begun: set[int] = set()
        # Of each group, for counting: its parameters and the optimizer's state; entries that came one by one.
        self._collected: dict[int, tuple[list[Tensor], dict[Tensor, Any]]] = {}
        self._added: list[ParamStep] = []

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._groups, self._positions = groups, positions
        self._begun.clear()
        self._collected.clear()
        self._added.clear()
        for table in self._tables.values():
            table.clear()

    def _table(self, tensor: Tensor) -> _core.TensorTable:
        """The table of a tensor's device, with this step's groups."""
        device = self._backend.index_of(tensor)
        if device not in self._tables:
            self._tables[device] = _core.TensorTable(device_type=self._backend.device_type, device_id=max(device, 0))
        if device not in self._begun:
            self._begun.add(device)
            add_groups(self._tables[device], self._groups, self._positions)
        return self._tables[device]

    def collect(self, group: int, params: list[Tensor], state: dict[Tensor, Any]) -> list[int]:
        if not params:
            return []
        self._collected[group] = (params, state)
        return self._table(params[0]).collect(group=group, params=params, state=state)

    def add(self, entry: ParamStep) -> bool:
        if not self._table(entry.param).add(
            group=entry.group,
            position=entry.position,
            param=entry.param,
            grad=entry.grad,
            states=entry.states,
            master=entry.master,
            step=entry.step,
            first_index=entry.first_index,
        ):
            return False
        self._added.append(entry)
        return True

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables.values())

    def _active(self) -> list[tuple[torch.device, _core.TensorTable]]:
        return [(self._backend.device(i), table) for i, table in self._tables.items() if len(table) > 0]

    def device(self) -> torch.device | None:
        """The device of all that was taken; None if there are several."""
        active = self._active()
        return active[0][0] if len(active) == 1 else None

    def square_sums(self) -> Tensor:
        ((device, table),) = self._active()
        batch = table.batch(grad_multipliers=[1.0] * len(self._groups))
        module = self._backend.module()
        with self._backend.guard(device) as stream:
            sums = torch.empty(module.count_square_sums(batch=batch), dtype=torch.float64, device=device)
            module.square_sums(batch=batch, sums=sums.data_ptr(), stream=stream)
        return sums

    def step(self, grad_multipliers: Sequence[float], *, counts_health: bool = False) -> Health:
        return self.step_scaled(grad_multipliers, Scaling(), counts_health=counts_health)[0]

    def step_scaled(
        self, grad_multipliers: Sequence[float], scaling: Scaling, *, counts_health: bool = False
    ) -> tuple[Health, Tensor | None]:
        """The same, gradients multiplied by what is found on the device; with the norm, if they are clipped."""
        entries = self._entries() if counts_health else []
        before = [weights(self._groups[entry.group], entry).clone() for entry in entries]
        norm = None
        for device, table in self._active():
            norm = self._launch(device, table, list(grad_multipliers), scaling)
        health = {
            (entry.group, entry.position): count_health(self._groups[entry.group], entry, held)
            for entry, held in zip(entries, before)
        }
        return health, norm

    def _launch(
        self, device: torch.device, table: _core.TensorTable, grad_multipliers: list[float], scaling: Scaling
    ) -> Tensor | None:
        clips = scaling.max_grad_norm is not None
        batch = table.batch(grad_multipliers=grad_multipliers)
        module = self._backend.module()
        lrs = [_lr_on(group.lr, device) for group in self._groups]
        scale, found_inf = _float_on(scaling.grad_scale, device), _float_on(scaling.found_inf, device)
        with self._backend.guard(device) as stream:
            # New memory in every step: the allocator knows streams and graphs, and keeps it as long as they need it.
            workspace = torch.empty(module.workspace_bytes(batch=batch, clips=clips), dtype=torch.uint8, device=device)
            norm = torch.empty((), dtype=torch.float32, device=device) if clips else None
            module.step(
                batch=batch,
                lrs=[(0 if lr is None else lr.data_ptr(), lr is not None and lr.dtype == torch.float64) for lr in lrs],
                grad_scale=_pointer(scale),
                found_inf=_pointer(found_inf),
                max_grad_norm=scaling.max_grad_norm,
                grad_norm=_pointer(norm),
                workspace=workspace.data_ptr(),
                stream=stream,
            )
        return norm

    def _entries(self) -> list[ParamStep]:
        """What was taken, parameter by parameter."""
        entries = list(self._added)
        listed = {(entry.group, entry.position) for entry in entries}
        for index, (params, state) in self._collected.items():
            group = self._groups[index]
            for position, param in enumerate(params):
                if param.grad is None or (index, position) in listed or param not in state:
                    continue
                held = state[param]
                master = held.get(group.master_key) if group.master_key else None
                entries.append(
                    ParamStep(
                        group=index,
                        position=position,
                        param=param.detach(),
                        grad=param.grad,
                        states=tuple(tuple(held[key] for key in spec.keys_in(held)) for spec in group.states),
                        step=held["step"],
                        master=master if isinstance(master, Tensor) else None,
                    )
                )
        return entries

    def forget(self) -> None:
        for table in self._tables.values():
            table.forget()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float_on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(device, torch.float32)


def _lr_on(lr: Tensor | None, device: torch.device) -> Tensor | None:
    if lr is None:
        return None
    return lr.detach().to(device, lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float32)


class CudaBackend:
    """See Backend."""

    name = "cuda"
    device_type = _CUDA

    def module(self) -> Any:
        """The kernels."""
        return kernels()

    def index_of(self, tensor: Tensor) -> int:
        """The number of the device that a tensor is on."""
        return tensor.get_device()

    def device(self, index: int) -> torch.device:
        """The device of a number."""
        return torch.device("cuda", index)

    def guard(self, device: torch.device) -> _Guard:
        """Makes a device the current one for as long as it is entered; gives the current stream of it."""
        return _Guard(device)

    def refusal(self, param: Tensor) -> str | None:
        if param.device.type != "cuda" or torch.version.hip is not None:
            return f"it is on {param.device}"
        if param.dtype not in PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        if self.module() is None:
            _warn_not_built()
            return NOT_BUILT
        return None

    def session(self) -> CudaSession:
        return CudaSession(self)


class _Guard:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._context = torch.cuda.device(device)

    def __enter__(self) -> int:
        self._context.__enter__()  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(self._device).cuda_stream

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
