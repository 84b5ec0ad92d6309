"""Backends, and how one is chosen.

``"auto"`` takes the first of BACKENDS that can step a parameter; the name of one takes that one or fails.
"""

from __future__ import annotations

from .base import Backend, GroupStep, ParamStep, Session
from .cpu import CpuBackend
from .eager import EagerBackend

__all__ = ["BACKENDS", "Backend", "GroupStep", "ParamStep", "Session", "candidates", "names"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), EagerBackend())}


def names() -> list[str]:
    """What ``backend=`` may be."""
    return ["auto", *BACKENDS]


def candidates(name: str) -> list[Backend]:
    """The backends to try for a name that `names` lists, the best first."""
    return list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]
