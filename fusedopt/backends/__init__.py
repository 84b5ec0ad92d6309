"""Backends, and how one is chosen.

``"auto"`` takes the first of BACKENDS that can step a parameter; the name of one takes that one or fails.
"""

from __future__ import annotations

from torch import Tensor

from .base import Backend, GroupStep, ParamStep, Scaling, Session, SpreadOf
from .cpu import CpuBackend
from .cuda import CudaBackend
from .device import DeviceSession
from .eager import EagerBackend
from .rounds import taken, together
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "DeviceSession",
    "GroupStep",
    "ParamStep",
    "Scaling",
    "Session",
    "SpreadOf",
    "candidates",
    "first",
    "names",
    "new_sessions",
    "taken",
    "together",
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), CudaBackend(), TritonBackend(), EagerBackend())
}


def names() -> list[str]:
    """What ``backend=`` may be."""
    return ["auto", *BACKENDS]


def new_sessions() -> dict[str, Session]:
    """One of every backend, for one optimizer."""
    return {name: backend.session() for name, backend in BACKENDS.items()}


def candidates(name: str) -> list[Backend]:
    """The backends to try for a name that `names` lists, the best first."""
    return list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]


def first(name: str, params: list[Tensor]) -> Backend:
    """The one that takes a group's parameters as they lie, judged by the first of them; others are looked at singly."""
    options = candidates(name)
    return next((b for b in options if params and b.refusal(params[0]) is None), options[0])
