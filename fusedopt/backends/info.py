"""What this installation can do on this machine, and what to do about what it cannot."""

from __future__ import annotations

from typing import Any, cast

import torch

from .. import _core, backends
from .._version import __version__
from . import triton
from .cuda import NOT_BUILT, decimal, kernels
from .device import DeviceBackend


def info() -> dict[str, Any]:
    """Versions, kernels, devices, and which backend ``backend="auto"`` takes; all of it plain values, for JSON.

    Returns:
        "fusedopt" and "torch", their versions; "cpu": the core's instruction sets, "available" and "selected";
        "cuda": whether kernels are "built" ("toolkit", "architectures"), whether they are "usable" here, torch's CUDA
        version as "torch", what the "driver" supports, "devices" with "name" and "capability"; "triton", its version
        or None; "auto": a backend's name by kind of device; "missing": a line each for what is not there and how to
        get it.
    """
    missing: list[str] = []
    cuda = _cuda(missing)
    if (reason := triton.missing()) is not None:
        missing.append(reason)
    return {
        "fusedopt": __version__,
        "torch": str(torch.__version__),
        "cpu": _cpu(missing),
        "cuda": cuda,
        "triton": triton.installed_version() if triton.is_installed() else None,
        "auto": {
            "cpu": backends.first("auto", [torch.empty(0, dtype=torch.float32, device="cpu")]).name,
            "cuda": _auto_on_cuda(cuda),
        },
        "missing": missing,
    }


def render(found: dict[str, Any] | None = None) -> str:
    """What `info` found as text, a line for each thing."""
    found = info() if found is None else found
    cpu, cuda = found["cpu"], found["cuda"]
    built = "not built"
    if cuda["built"]:
        built = f"built by nvcc {cuda['toolkit']} for {', '.join(cuda['architectures'])}"
        built += ", usable" if cuda["usable"] else ", not usable here"
    lines = [
        ("fusedopt", found["fusedopt"]),
        ("torch", found["torch"] + (f", CUDA {cuda['torch']}" if cuda["torch"] else ", without CUDA")),
        ("CPU kernels", f"{cpu['selected'] or 'none'} of {', '.join(cpu['available'])}"),
        ("CUDA kernels", built),
    ]
    for index, device in enumerate(cuda["devices"]):
        lines.append((f"cuda:{index}", f"{device['name']}, compute capability {device['capability']}"))
    if cuda["driver"]:
        lines.append(("driver", f"up to CUDA {cuda['driver']}"))
    lines.append(("triton", found["triton"] or "not installed"))
    lines += [(f'"auto" on {kind}', name) for kind, name in found["auto"].items()]
    lines += [("note", line) for line in found["missing"]]
    return "\n".join(f"{label:<15}{text}" for label, text in lines)


def _cpu(missing: list[str]) -> dict[str, Any]:
    selected = None
    try:
        selected = _core.selected_isa()
    except ValueError as error:  # of what the environment asks for
        missing.append(str(error))
    return {"available": list(_core.available_isas()), "selected": selected}


def _cuda(missing: list[str]) -> dict[str, Any]:
    module = None
    try:
        module = kernels()
        if module is None:
            missing.append(NOT_BUILT)
    except ImportError as error:
        missing.append(f"the CUDA kernels do not load: {error}")
    architectures = module.architectures.split(",") if module is not None and module.architectures else []
    devices, runs = [], []
    if torch.cuda.is_available() and torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
            reason = None if module is None else _unusable("cuda", torch.device("cuda", index))
            runs.append(module is not None and reason is None)
            if reason is not None:
                missing.append(reason if reason.startswith("cuda:") else f"cuda:{index}: {reason}")
    elif torch.version.hip is not None:
        missing.append(
            "torch is built for ROCm: parameters on its devices are stepped by the Triton kernels, if it is installed"
        )
    elif torch.version.cuda is None:
        missing.append("torch is built without CUDA; for CUDA devices, install a build of torch with it")
    else:
        missing.append("torch finds no CUDA device; check nvidia-smi and the driver")
    return {
        "built": module is not None,
        "toolkit": decimal(module.toolkit) if module is not None and module.toolkit else None,
        "architectures": architectures,
        "usable": any(runs),
        "torch": torch.version.cuda,
        "driver": _driver() if devices else None,
        "devices": devices,
    }


def _unusable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot step what is on a device, without the warning of those who step there."""
    return cast(DeviceBackend, backends.BACKENDS[name]).unusable(device)


def _driver() -> str | None:
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if version is None else decimal(version())


def _auto_on_cuda(cuda: dict[str, Any]) -> str:
    """The backend that steps what is on the first device; where there is none, on one that the kernels are for."""
    if cuda["usable"] or (cuda["built"] and not cuda["devices"]):
        return "cuda"
    reason = _unusable("triton", torch.device("cuda", 0)) if cuda["devices"] else triton.missing()
    return "triton" if reason is None else "eager"
