"""What a measurement was taken on: enough to judge it by, but nothing that names a host."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt import _core


def describe() -> dict[str, Any]:
    """The machine and the software, as JSON keeps them."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "transparent_huge_pages": _huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "openmp": _openmp_settings(),
        "fusedopt": fusedopt.__version__,
        "isa": _core.selected_isa(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _openmp_settings() -> str:
    """What the environment asks of OpenMP, such as how its threads wait: it changes every figure."""
    asked = sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "KMP_")))
    return " ".join(asked) or "default"


def _huge_pages() -> str:
    """The chosen mode: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


QUIET_CORES = 0.15  # if others use more than this, figures are doubtful


class OtherLoad:
    """How many cores other processes keep busy meanwhile, because steps that have to share cores are slow."""

    def __init__(self) -> None:
        self._started = self._seconds()

    def cores(self) -> float | None:
        """Cores used by others since this was made, on average; None where the system does not tell."""
        if self._started is None:
            return None
        now = self._seconds()
        assert now is not None
        elapsed, busy, own = (after - before for after, before in zip(now, self._started))
        return max(0.0, (busy - own) / elapsed)

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """The clock, and the seconds that all cores and this process have worked."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, interrupts, soft_interrupts, steal = (int(n) for n in line.split()[1:9])
        busy = (user + nice + system + interrupts + soft_interrupts + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()


def wait_until_quiet(seconds: float) -> None:
    """Gives other work some time to end, such as the compiler of a peer that was cut off."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        load = OtherLoad()
        time.sleep(0.5)
        cores = load.cores()
        if cores is None or cores < QUIET_CORES:
            return
