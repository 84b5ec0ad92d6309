"""What streams and memory of a kind of device are asked for; CUDA's, by torch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..storage.allocation import Request, allocate


class Runtime(Protocol):
    """Streams, events, copies and memory of a kind of device. Streams and events are its own objects."""

    name: str

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the memory of such a device."""

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the memory of the host."""

    def device_of(self, tensor: Tensor) -> torch.device:
        """The device that a tensor is on."""

    def free_bytes(self, device: torch.device) -> int:
        """What can be allocated on a device."""

    def allocate(self, requests: list[Request]) -> list[Tensor]:
        """Zeroed tensors on a device."""

    def empty(self, size: int, device: torch.device) -> Tensor:
        """Bytes on a device."""

    def pinned(self, size: int) -> Tensor:
        """Bytes on the host that devices copy from and to without its help, zeroed."""

    def current_stream(self, device: torch.device) -> Any:
        """The stream that kernels are launched on."""

    def new_stream(self, device: torch.device) -> Any:
        """A stream that nothing orders."""

    def new_event(self) -> Any:
        """An event that nobody has recorded."""

    def record(self, event: Any, stream: Any) -> None:
        """Puts an event behind what a stream has to do."""

    def wait(self, stream: Any, event: Any) -> None:
        """Lets a stream go on when an event has been reached."""

    def synchronize(self, event: Any) -> None:
        """Lets the host go on when an event has been reached."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Copies bytes on a stream."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Keeps a tensor's memory until a stream has done what it was told to by now."""

    def is_capturing(self) -> bool:
        """Whether launches are recorded for a graph."""

    def finish(self, device: torch.device) -> None:
        """Lets the host go on when a device has done all that it was told to, graphs included."""


class CudaRuntime:
    """See Runtime. ROCm's devices go by the same names in torch."""

    name = "cuda"

    def owns(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda"

    def is_host(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def free_bytes(self, device: torch.device) -> int:
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached

    def allocate(self, requests: list[Request]) -> list[Tensor]:
        return allocate(requests)

    def empty(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    def pinned(self, size: int) -> Tensor:
        # Registered and not from torch's allocator of pinned memory, which rounds sizes up to a power of two.
        memory = torch.zeros(size, dtype=torch.uint8, device="cpu")
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(memory, cudart.cudaHostUnregister, memory.data_ptr())
        return memory

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def new_event(self) -> Any:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def is_capturing(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def finish(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)


RUNTIMES: list[Runtime] = [CudaRuntime()]


def runtime_of(tensor: Tensor) -> Runtime | None:
    """The runtime of the device that a tensor is on; None for those of the CPU, and devices without one."""
    return next((runtime for runtime in RUNTIMES if runtime.owns(tensor)), None)


def check_not_captured(tensors: Iterable[Tensor | None], why: str) -> None:
    """Raises ValueError if what the device of one of these tensors is told is recorded for a CUDA graph.

    Args:
        tensors: On any devices.
        why: Why that cannot be recorded, and what to do instead, as a sentence.
    """
    runtimes = (None if tensor is None else runtime_of(tensor) for tensor in tensors)
    if any(runtime is not None and runtime.is_capturing() for runtime in runtimes):
        raise ValueError(why)
