"""What this installation can do on this machine, and what to do about what it cannot."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from .. import _core, backends
from .._version import __version__
from . import triton
from .cuda import NOT_BUILT, kernels


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
        "auto": {"cpu": _auto("cpu", False), "cuda": _auto("cuda", cuda["built"])},
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
    devices = []
    if torch.cuda.is_available() and torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append({"name": torch.cuda.get_device_name(index), "capability": f"{major}.{minor}"})
            if module is not None and not _runs(architectures, major, minor):
                missing.append(
                    f"cuda:{index} has compute capability {major}.{minor}, the kernels are built for "
                    f"{', '.join(architectures)}; reinstall with FUSEDOPT_CUDA_ARCHITECTURES={major}{minor}"
                )
    elif torch.version.hip is not None:
        missing.append(
            "torch is built for ROCm: parameters on its devices are stepped by the Triton kernels, if it is installed"
        )
    elif torch.version.cuda is None:
        missing.append("torch is built without CUDA; for CUDA devices, install a build of torch with it")
    else:
        missing.append("torch finds no CUDA device; check nvidia-smi and the driver")
    runs = [_runs(architectures, *map(int, device["capability"].split("."))) for device in devices]
    return {
        "built": module is not None,
        "toolkit": _decimal(module.toolkit) if module is not None and module.toolkit else None,
        "architectures": architectures,
        "usable": module is not None and any(runs),
        "torch": torch.version.cuda,
        "driver": _driver() if devices else None,
        "devices": devices,
    }


def _runs(architectures: list[str], major: int, minor: int) -> bool:
    """Machine code runs on later devices of its generation; the last has PTX, which all later devices compile."""
    numbers = [int(text) for text in architectures]
    if not numbers:
        return False
    return 10 * major + minor >= numbers[-1] or any(n // 10 == major and n % 10 <= minor for n in numbers)


def _decimal(version: int) -> str:
    """CUDA writes 12.8 as 12080."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver() -> str | None:
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if version is None else _decimal(version())


def _auto(kind: str, has_kernels: bool) -> str:
    # Backends look at no more of a parameter. Where there are no kernels theirs is not asked: it would warn, once.
    param = cast(Tensor, SimpleNamespace(device=torch.device(kind), dtype=torch.float32))
    candidates = [b for b in backends.candidates("auto") if has_kernels or b.name != "cuda"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(backend.name for backend in candidates if backend.refusal(param) is None)
