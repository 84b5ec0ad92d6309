"""Versions, the device and the tools of this machine, as one JSON object on the last line of the output."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pytest", "pybind11", "setuptools", "transformers", "typer", "rich")
TOOLS = ("nvcc", "cmake", "ninja", "g++", "ncu", "compute-sanitizer", "cuobjdump", "nvidia-smi")


def first_line(*command: str, last: bool = False) -> str | None:
    """What a tool says of itself; None if it is not there."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return lines[-1 if last else 0] if lines else ""


def versions() -> dict[str, Any]:
    """Of packages and tools, without importing any of them."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit,mig.mode.current"
    for name in TOOLS:
        found[name] = first_line(name, "--version", last=name == "nvcc") if name != "nvidia-smi" else None
    found["nvidia-smi"] = first_line("nvidia-smi", query, "--format=csv,noheader")
    return found


def device() -> dict[str, Any] | None:
    """The first CUDA device; None if there is none."""
    if os.environ.get("FUSEDOPT_GPU_DRY", "0") == "1":
        return {"name": "none: a dry run on the CPU", "capability": ""}
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gb": round(total / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "torch_cuda": torch.version.cuda,
    }


def host() -> dict[str, Any]:
    """The processor, as far as it matters for steps that the host bounds."""
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        model = models[0] if models else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "os": f"{platform.system()} {platform.release()}"}


if __name__ == "__main__":
    print(json.dumps({"device": device(), "versions": versions(), "host": host(), "interpreter": sys.executable}))
