"""Who is calling: some of torch's classes call an optimizer in ways that only the call stack tells."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

_DEPTH = 24  # frames between such a call and us: hooks and decorators of torch's, and our own


def locals_in(module: str) -> dict[str, Any] | None:
    """The local variables of the innermost function of a module that is being executed; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == module:
            return frame.f_locals
        frame = frame.f_back
    return None
