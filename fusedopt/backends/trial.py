"""Whether a backend's kernels work on a device: found out once in a process, before the first step there.

A device may lack code for itself in the kernels, its driver may be too old for them, or a first launch may fail. On one
that this machine has not seen yet, two small steps are also compared with those of the CPU core, which takes some
milliseconds; what passed is remembered in the user's cache directory. `fusedopt check` proves much more.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _core, checks
from .._version import __version__
from ..storage.quantization import scales_shape
from .base import REFERENCES, GroupStep, ParamStep, Session
from .cpu import CpuSession

FIRST_CHECK = "FUSEDOPT_FIRST_CHECK"

_SHAPES = ((257,), (3, 70))
_STEPS = 2


class Tried(Protocol):
    """What is asked of a backend."""

    name: str

    def session(self) -> Session:
        """See Backend."""


class Verdicts:
    """Why a backend's kernels cannot be used, by device; None if they can.

    Args:
        find: Finds out, which may wait for the device.
    """

    def __init__(self, find: Callable[[torch.device], str | None]) -> None:
        self._find = find
        self._found: dict[torch.device, str | None] = {}
        self._lock = threading.RLock()

    def __call__(self, device: torch.device) -> str | None:
        """The reason, found out where it is not known. Where that cannot be now, the kernels are taken on trust."""
        if device not in self._found:
            if not may_wait(device):
                return None
            with self._lock:
                if device not in self._found:
                    try:
                        with _undisturbed():
                            self._found[device] = self._find(device)
                    except torch.OutOfMemoryError:  # says nothing about the kernels: asked again in the next step
                        return None
        return self._found[device]


def may_wait(device: torch.device) -> bool:
    """Whether something may be launched and waited for: not while a graph is captured or torch.compile traces."""
    if torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() > 0:  # of modes, of which one may make fake tensors
        return False
    if device.type == "cpu":
        return True
    if not getattr(torch, device.type).is_available():  # fake tensors may be on a device that is not here
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing is recorded, and waiting is no error."""
    is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    mode = torch.cuda.get_sync_debug_mode() if is_initialized else 0
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.no_grad():
            yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def warn_unused(name: str, device: str, reason: str) -> None:
    """Says once that a device's parameters are left to the next backend."""
    warnings.warn(
        f"parameters on {device} are not stepped by the {name} kernels: {reason}", stacklevel=checks.callers_level()
    )


def launch_error(backend: Tried, device: torch.device) -> str | None:
    """What a first tiny launch says, as a clause; None if it works."""
    try:
        session = backend.session()
        session.begin([_group()], [None])
        assert session.add(_entries(device, torch.float32, is_quantized=False)[0])
        session.square_sums().cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers and drivers may raise
        return said_by(error)
    return None


def said_by(error: Exception) -> str:
    """An error as a clause: its kind and its first line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


# ---- the first check -----------------------------------------------------------------------------------------


def first_difference(backend: Tried, device: torch.device) -> str | None:
    """What of the first steps on a device is not the CPU core's, as a sentence; None if nothing is.

    Nothing is compared if FUSEDOPT_FIRST_CHECK=0, or where this machine has passed before.
    """
    if os.environ.get(FIRST_CHECK, "1") == "0":
        return None
    mark = _mark(backend, device)
    if mark is not None and mark.exists():
        return None
    for dtype, is_quantized in ((torch.float32, False), (torch.bfloat16, True)):
        found = _difference(backend, device, dtype, is_quantized=is_quantized)
        if found is not None:
            return (
                f"a first step with {str(dtype).removeprefix('torch.')} parameters and "
                f"{'8-bit' if is_quantized else 'float32'} states was not that of the CPU ({found}); please report "
                f"this with the output of `fusedopt check --device {device}` and `fusedopt info`; "
                f"{FIRST_CHECK}=0 uses the kernels all the same"
            )
    if mark is not None:
        _leave(mark, _identity(backend, device))
    return None


@functools.cache
def _group(rounding: str = "nearest") -> GroupStep:
    """A step of a rule with as few states as show both kinds of 8-bit codes, two, by numbers that are not round."""
    named = {rule: _hyperparameters(rule) for rule in _core.rules()}
    rule = min((rule for rule, names in named.items() if names), key=lambda rule: abs(len(_core.rules()[rule]) - 2))
    hyper = {name: 0.01 if name == "lr" else 0.3 for name in named[rule]}
    roundings = (rounding,) * len(_core.rules()[rule])
    return GroupStep(rule=rule, hyper=hyper, states=(), roundings=roundings, seed=7, maximize=False)


def _hyperparameters(rule: str) -> list[str]:
    """What a rule's reference asks for by name; nothing if it takes whatever it is given."""
    parameters = inspect.signature(REFERENCES[rule]).parameters.values() if rule in REFERENCES else ()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "step"]


def _entries(device: torch.device, dtype: torch.dtype, *, is_quantized: bool) -> list[ParamStep]:
    """Parameters with gradients and fresh states; the same numbers each time, and none of torch's own generators."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(device, dtype)

    def state(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        if is_quantized and len(shape) > 1:
            shapes = (torch.Size(shape), scales_shape(torch.Size(shape)))
            return tuple(torch.zeros(size, dtype=torch.uint8, device=device) for size in shapes)
        return (torch.zeros(shape, dtype=torch.float32, device=device),)

    return [
        ParamStep(
            group=0,
            position=i,
            param=numbers(shape),
            grad=numbers(shape),
            states=tuple(state(shape) for _ in _group().roundings),
            step=torch.zeros((), dtype=torch.float32, device=device),
        )
        for i, shape in enumerate(_SHAPES)
    ]


def _difference(backend: Tried, device: torch.device, dtype: torch.dtype, *, is_quantized: bool) -> str | None:
    """How two steps differ from the CPU core's, as a clause."""
    try:
        ours = _stepped(backend.session(), _entries(device, dtype, is_quantized=is_quantized))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers and drivers may raise
        return said_by(error)
    theirs = _stepped(CpuSession(), _entries(torch.device("cpu"), dtype, is_quantized=is_quantized))
    for name, expected in theirs.items():
        different = differing(ours[name], expected).sum().item()
        if different:
            return f"{different} of {expected.numel()} elements of {name} differ"
    return None


def _stepped(session: Session, entries: list[ParamStep]) -> dict[str, Tensor]:
    for _ in range(_STEPS):
        session.begin([_group("stochastic")], [None])
        assert all([session.add(entry) for entry in entries])
        session.step([1.0])
    session.begin((), ())
    found = {}
    for entry in entries:
        of = f"the parameter of shape {tuple(entry.param.shape)}"
        found[of] = entry.param.cpu()
        for k, held in enumerate(entry.states):
            for part, tensor in zip(("the codes of ", "the scales of ") if len(held) > 1 else ("",), held):
                found[f"{part}state {k} of {of}"] = tensor.cpu()
    return found


def differing(found: Tensor, expected: Tensor) -> Tensor:
    """Which elements of two tensors of one shape and dtype have other bits: booleans in a row, on the CPU."""
    return (bits(found) != bits(expected)).reshape(expected.numel(), -1).any(dim=1)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU, in a row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


# ---- what a machine remembers --------------------------------------------------------------------------------


def cache_directory() -> Path | None:
    """The user's directory for what can be found out again; None if there is no such user."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "fusedopt"
    except RuntimeError:
        return None


def _identity(backend: Tried, device: torch.device) -> dict[str, Any]:
    """What a result holds for: the kernels, what compiles and launches them, and the device."""
    core = os.stat(_core.__file__)
    return {
        "backend": backend.name,
        "fusedopt": __version__,
        "build": [core.st_size, core.st_mtime_ns],
        "torch": str(torch.__version__),
        "triton": _version_of("triton"),
        **_of_device(device),
    }


def _version_of(package: str) -> str | None:
    """Of a package as it is installed, which takes no import."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _of_device(device: torch.device) -> dict[str, Any]:
    """A device's name and its driver."""
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return {"device": properties.name, "driver": str(getattr(properties, "driver_version", ""))}
    if device.type != "cuda":
        return {"device": device.type, "driver": None}
    text = torch.version.hip or ""
    try:
        text += Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        text += str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "")())
    return {"device": torch.cuda.get_device_name(device), "driver": text}


def _mark(backend: Tried, device: torch.device) -> Path | None:
    """The file that is there if the first check has passed on this machine."""
    directory = cache_directory()
    if directory is None:
        return None
    text = json.dumps(_identity(backend, device), sort_keys=True)
    return directory / f"first-check-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _leave(mark: Path, identity: dict[str, Any]) -> None:
    """Writes a mark whole or not at all; where nothing can be written, the next process checks again."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=mark.parent, prefix=mark.stem, delete=False
        ) as file:
            json.dump(identity, file, indent=1)
        os.replace(file.name, mark)
    except OSError:
        pass
