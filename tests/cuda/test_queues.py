"""The emulated runtime's streams, events and memory: what nothing orders runs in any order, and mistakes show."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from queued import QueuedRuntime, queued  # noqa: F401
from torch import Tensor


def copies(runtime: QueuedRuntime, seed: int, *, waits: bool) -> list[int]:
    """Copies 1 from the host to the device and on to the host, on two streams; what arrives."""
    runtime.queues.late(seed)
    host, device, result = runtime.pinned(64), runtime.empty(64, torch.device("cpu")), runtime.pinned(64)
    host.fill_(1)
    first, second, event = runtime.new_stream(None), runtime.new_stream(None), runtime.new_event()
    runtime.copy(device, host, first)
    runtime.record(event, first)
    if waits:
        runtime.wait(second, event)
    runtime.copy(result, device, second)
    runtime.queues.synchronize()
    return result.tolist()


def test_events_order_streams(queued: QueuedRuntime) -> None:  # noqa: F811
    assert all(copies(queued, seed, waits=True) == [1] * 64 for seed in range(1, 50))


def test_without_a_wait_what_is_read_was_not_written(queued: QueuedRuntime) -> None:  # noqa: F811
    """It may be read too early, while it is being written (a sentence), or by luck in time."""
    found: list[Any] = []
    for seed in range(1, 50):
        try:
            found.append(copies(queued, seed, waits=False)[0])
        except RuntimeError as error:
            found.append(str(error))
            queued.queues.drop_all()
    assert set(found) == {
        1,
        255,
        "A copy reads memory that another copy is writing.",
        "A copy writes memory that another copy is reading.",
    }


def test_the_same_seed_gives_the_same_order(queued: QueuedRuntime) -> None:  # noqa: F811
    def order(seed: int) -> list[bool]:
        queued.queues.late(seed)
        streams = [queued.new_stream(None) for _ in range(3)]
        events = [queued.new_event() for _ in range(12)]
        found = []
        for i, event in enumerate(events):
            queued.record(event, streams[i % 3])
            found += [queued.queues.is_done(e) for e in events]
        queued.queues.synchronize()
        assert all(queued.queues.is_done(event) for event in events)
        return found

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(1, 20)}) > 10


def test_an_event_counts_as_it_was_recorded_last(queued: QueuedRuntime) -> None:  # noqa: F811
    """Waiting for one that nobody has recorded is waiting for nothing, as in CUDA."""
    queued.queues.late(1)
    event = queued.new_event()
    queued.wait(queued.stream, event)
    queued.queues.synchronize_stream(queued.stream)
    for _ in range(3):
        queued.record(event, queued.stream)
        queued.synchronize(event)
        assert queued.queues.is_done(event)


@pytest.mark.parametrize("kind", ["device", "pinned", "pageable"])
def test_memory_is_told_apart(queued: QueuedRuntime, kind: str) -> None:  # noqa: F811
    memory = queued.memory(512, kind)
    assert queued.queues.memory_of(memory.data_ptr() + 511) == kind
    assert queued.is_host(memory) == (kind != "device")
    number, square = queued.memory(4, kind).view(torch.float32), queued.memory(8, "device").view(torch.float64)
    number.fill_(3.0)
    error = _square(number, square)
    assert error == (
        "" if kind == "device" else f"A kernel has an argument that points into {kind} memory of the host."
    )
    target = queued.empty(512, torch.device("cpu"))
    if kind == "pageable":
        with pytest.raises(RuntimeError, match="has pageable memory of the host, for which it would wait"):
            queued.copy(target, memory, queued.stream)
    else:
        queued.copy(target, memory, queued.stream)


def _square(number: Tensor, square: Tensor) -> str:
    return emulated.module().trial(number=number.data_ptr(), square=square.data_ptr(), stream=0)


def test_kernels_run_late(queued: QueuedRuntime) -> None:  # noqa: F811
    queued.queues.late(5)
    number, square = queued.memory(4, "device").view(torch.float32), queued.memory(8, "device").view(torch.float64)
    host = queued.pinned(4)
    host.view(torch.float32).fill_(3.0)
    queued.copy(number.view(torch.uint8), host, 0)  # the stream of the kernel, which comes after it
    assert emulated.module().trial(number=number.data_ptr(), square=square.data_ptr(), stream=0) == ""
    assert square.item() == 9.0


def test_a_full_device(queued: QueuedRuntime) -> None:  # noqa: F811
    queued.leave_free(1024)
    assert queued.free_bytes(torch.device("cpu")) == 1024
    taken = queued.memory(512, "device")
    with pytest.raises(torch.OutOfMemoryError):
        queued.memory(1024, "device")
    assert queued.memory(1024, "pinned").numel() == 1024
    queued.queues.give(taken.data_ptr())
    assert queued.free_bytes(torch.device("cpu")) == 1024
