"""Peak memory of something that runs in this process."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """Peak memory since this was made: of the GPU if one is used, else of this process, beyond what it had before."""

    def __init__(self) -> None:
        self._has_cuda = torch.cuda.is_available()
        if self._has_cuda:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._before: float | None = None
        # The C library keeps what was freed. If it gave that back later, or used it again, memory would seem to have
        # fallen, or not to have grown.
        with contextlib.suppress(OSError, TypeError, AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
            self._before = _status("VmRSS")

    def bytes(self) -> float | None:
        """The peak until now, or None where nothing tells it."""
        if self._has_cuda:
            peaks = [torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())]
            if max(peaks):
                return float(max(peaks))
        peak = _status("VmHWM")
        return None if peak is None or self._before is None else max(peak - self._before, 1.0)


def _status(name: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return 1024.0 * float(line.split()[1])
    return None
