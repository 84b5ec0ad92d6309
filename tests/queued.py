"""A device of the emulated runtime that runs late: its memory, streams and events, for what streams states.

Tensors are the CPU's. All memory is the device's that was not asked for as the host's, so parameters, gradients and
what torch allocates are on the device; see tests/cuda_on_cpu/queues.h.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from cases import params_of, set_grads
from emulated import EmulatedBackend
from torch import Tensor

from fusedopt import _core, backends
from fusedopt.backends.base import SpreadOf
from fusedopt.backends.cuda import CudaSession
from fusedopt.backends.device import Scalars, pointer
from fusedopt.offload import disk, runtime
from fusedopt.storage.allocation import Request


class QueuedRuntime:
    """See fusedopt.offload.runtime.Runtime. `forget` are calls of `wait` that it leaves out, by number in a step."""

    name = "queued"

    def __init__(self) -> None:
        self.queues = emulated.module().runtime
        self.pinned_as = "pinned"
        self.stream = self.queues.create_stream()
        self.forget: set[int] = set()
        self.waits = 0
        self.calls: list[tuple[str, ...]] = []
        self.alive: list[Any] = []  # what waits to be read
        self.graph: list[Callable[[], None]] | None = None  # what is recorded while a graph is captured
        self.of_graphs: set[int] = set()  # events that were recorded into graphs

    def reset(self) -> None:
        """On time, with nothing that waits and room for everything."""
        self.queues.drop_all()
        self.queues.late(0)
        self.queues.set_capacity(2**62)

    def memory(self, size: int, kind: str) -> Tensor:
        address = self.queues.take(max(size, 1), kind)
        if not address:
            raise torch.OutOfMemoryError("the pretended device is full")
        array = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(array, dtype=torch.uint8)

    def leave_free(self, size: int) -> None:
        """Makes the device as large as what is in use and this many bytes."""
        self.queues.set_capacity(2**62)
        self.queues.set_capacity(2**62 - self.queues.memory()[0] + size)

    def owns(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and not self.is_host(tensor)

    def is_host(self, tensor: Tensor) -> bool:
        return self.queues.memory_of(tensor.data_ptr()) in ("pinned", "pageable")

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def free_bytes(self, device: torch.device) -> int:
        return self.queues.memory()[0]

    def allocate(self, requests: list[Request]) -> list[Tensor]:
        sizes = [request.shape.numel() * request.dtype.itemsize for request in requests]
        found = [self.memory(size, "device").zero_() for size in sizes]
        return [memory.view(r.dtype).view(r.shape) for memory, r in zip(found, requests)]

    def empty(self, size: int, device: torch.device) -> Tensor:
        return self.memory(size, "device")

    def pinned(self, size: int) -> Tensor:
        return self.memory(size, self.pinned_as).zero_()

    def current_stream(self, device: torch.device) -> int:
        return self.stream

    def new_stream(self, device: torch.device) -> int:
        return self.queues.create_stream()

    def new_event(self) -> int:
        return self.queues.create_event()

    def do(self, call: Callable[[], None]) -> None:
        """Has something done by a stream, or by each replay of the graph that is captured."""
        self.graph.append(call) if self.graph is not None else call()

    def record(self, event: int, stream: int) -> None:
        if self.graph is not None:
            self.of_graphs.add(event)
        self.do(lambda: self.queues.record(event, stream))

    def wait(self, stream: int, event: int) -> None:
        self.waits += 1
        if self.waits - 1 not in self.forget:
            self.do(lambda: self.queues.wait(stream, event))

    def synchronize(self, event: int) -> None:
        assert self.graph is None, "a CUDA graph cannot record that the host waits"
        assert event not in self.of_graphs, "an event of a CUDA graph cannot be waited for outside of it"
        self.queues.synchronize_event(event)

    def finish(self, device: torch.device) -> None:
        assert self.graph is None, "a CUDA graph cannot record that the host waits"
        self.queues.synchronize()

    def copy(self, target: Tensor, source: Tensor, stream: int) -> None:
        self.do(lambda: self.queues.copy(target.data_ptr(), source.data_ptr(), target.numel(), stream))

    @contextmanager
    def capture(self) -> Iterator[Callable[[], None]]:
        """Records what streams are told for a graph; gives what replays it."""
        graph: list[Callable[[], None]] = []
        self.graph = graph
        try:
            yield lambda: [call() for call in graph] and None
        finally:
            self.graph = None

    def keep(self, tensor: Tensor, stream: int) -> None:
        self.alive.append(tensor)

    def is_capturing(self) -> bool:
        return self.graph is not None


class QueuedSession(CudaSession):
    """Leaves every parameter to be looked at singly, and keeps what a launch that is late will read."""

    _backend: QueuedBackend

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        return [i for i, param in enumerate(params) if param.grad is not None]

    def launch(self, device: torch.device, stream: int, table: _core.TensorTable, scalars: Scalars) -> Tensor | None:
        queued, module = self._backend.runtime, self._kernels()
        batch = table.batch(grad_multipliers=scalars.grad_multipliers)
        updates = scalars.sums_updates
        size = module.workspace_bytes(batch=batch, clips=False, sums_updates=updates)
        workspace = torch.empty(size, dtype=torch.uint8)
        chunks = module.count_update_sums(batch=batch) if updates else 0
        sums = torch.empty((2, chunks), dtype=torch.float64) if updates else None
        queued.alive += [workspace, sums]
        lrs = [(0, False)] * len(self._groups or scalars.lrs)
        call = partial(
            module.step, batch=batch, lrs=lrs, grad_scale=0, found_inf=0, max_grad_norm=None, skip_step_above=None,
            grad_norm=0, sums_updates=updates, update_sums=pointer(sums), workspace=workspace.data_ptr(), stream=stream,
        )  # fmt: skip
        queued.do(call)
        if sums is not None:
            queued.queues.synchronize()  # they are read at once
        return sums

    def launch_square_sums(self, device: torch.device, stream: int, table: _core.TensorTable) -> Tensor:
        sums = super().launch_square_sums(device, stream, table)
        self._backend.runtime.queues.synchronize()
        return sums


class QueuedBackend(EmulatedBackend):
    def __init__(self, runtime: QueuedRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    @contextmanager
    def guard(self, device: torch.device) -> Iterator[int]:
        yield self.runtime.stream

    def session(self) -> QueuedSession:
        return QueuedSession(self)


def settle(runtime: QueuedRuntime) -> None:
    """Runs what waits, so that the host may read, and write to the device."""
    runtime.queues.synchronize()
    runtime.alive.clear()


def run(runtime: QueuedRuntime, optimizer: Any, steps: int, first: int = 0, seed: int = 3) -> Any:
    """Steps with the gradients of `set_grads`, in an order of streams that a seed chooses; 0 is on time."""
    runtime.queues.late(seed)
    for step in range(first, first + steps):
        set_grads(params_of(optimizer), step)
        optimizer.step()
        settle(runtime)
    return optimizer


@pytest.fixture
def queued(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueuedRuntime]:
    """backend="cuda" steps CPU tensors by the emulated kernels, on streams that a test may make late."""
    found = QueuedRuntime()
    create = disk.Slab.create

    def declared(scratch: disk.Scratch, path: Path, size: int) -> disk.Slab:
        """Pages of a file are no memory of the device."""
        slab = create(scratch, path, size)
        found.queues.declare(slab.address, size, "pageable")
        weakref.finalize(slab, found.queues.forget, slab.address)
        return slab

    found.reset()  # in a fresh process, too
    monkeypatch.setattr(disk.Slab, "create", declared)
    monkeypatch.setitem(backends.BACKENDS, "cuda", QueuedBackend(found))
    monkeypatch.setattr(runtime, "RUNTIMES", [found])
    yield found
    found.reset()
