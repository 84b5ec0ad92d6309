"""How steps on a GPU are timed, what they move, and copies that move as much."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.gpu_cases import Contender

DRY = os.environ.get("FUSEDOPT_GPU_DRY", "0") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
# Device clock cycles before a timed step, about a millisecond: launches then wait for the device and not the other way
# round, as after a backward pass. The time that the host takes is reported beside it.
AHEAD = 2_000_000
STEPS_OF_A_ROUND = 2 if DRY else 20  # timed by the wall clock
PIECE_BYTES = 2**12 if DRY else 2**31

Step = Callable[[], object]


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def device_is_broken() -> bool:
    """Whether an error stays: after an illegal access, for one, a process can do nothing more on the device."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def timed(step: Step) -> tuple[float, float]:
    """Milliseconds that the device takes, and those until the host is free again."""
    if DRY:
        begun = time.perf_counter()
        step()
        return (time.perf_counter() - begun) * 1e3, (time.perf_counter() - begun) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    begin.record()
    begun = time.perf_counter()
    step()
    host = (time.perf_counter() - begun) * 1e3
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


def timed_on_the_wall(step: Step) -> tuple[float, float]:
    """Milliseconds per step, of many steps: until all are done, and until the host is."""
    synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS_OF_A_ROUND):
        step()
    host = time.perf_counter() - begun
    synchronize()
    return (time.perf_counter() - begun) * 1e3 / STEPS_OF_A_ROUND, host * 1e3 / STEPS_OF_A_ROUND


def kernels_of(step: Step) -> int | None:
    """Kernels and copies of a step; None where they cannot be counted."""
    if DRY:
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([name for name in on_device if "Optimizer.step" not in name])  # which is a range, not a kernel


def moved_bytes(contender: Contender, optimizer: Optimizer, params: list[Parameter]) -> int | None:
    """What a step must read and write: weights and state both ways, and the gradient reads; None if not known.

    Temporaries do not count, so a contender that writes some shows a lower bandwidth.
    """
    if contender.gradient_reads is None:
        return None
    held = [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    param_bytes = sum(param.numel() * param.element_size() for param in params)
    return (contender.parameter_reads + 1 + contender.gradient_reads) * param_bytes + 2 * state_bytes


class Copies:
    """`copy_` between two buffers, as often as it takes to move a number of bytes, read and written ones together."""

    def __init__(self, largest: int) -> None:
        size = max(1, min(PIECE_BYTES, largest // 2))
        self._source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
        self._target = torch.empty_like(self._source)

    def of(self, moved: int) -> Step:
        pieces, rest = divmod(moved // 2, self._source.numel())

        def copy() -> None:
            for _ in range(pieces):
                self._target.copy_(self._source)
            if rest > 0:
                self._target[:rest].copy_(self._source[:rest])

        return copy


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
