"""What an optimizer keeps to step with: a session of every backend, and one that streams states."""

from __future__ import annotations

from typing import Any

from .. import backends
from ..backends import Session
from ..offload.stream import STREAM_BYTES, Streamer

STREAMED = "streamed"  # the session of what is on a device and has its states on the host


def all_sessions() -> dict[str, Session]:
    """One of every backend, and one that streams states."""
    return {**backends.new_sessions(), STREAMED: Streamer()}


def streamer_of(sessions: dict[str, Session]) -> Streamer:
    """The one that streams states."""
    streamer = sessions[STREAMED]
    assert isinstance(streamer, Streamer)
    return streamer


def size_buffers(sessions: dict[str, Session], param_groups: list[dict[str, Any]]) -> None:
    """Gives what streams states buffers of the size that param groups ask for."""
    streamer_of(sessions).stream_bytes = max((group["stream_bytes"] for group in param_groups), default=STREAM_BYTES)


def let_go(sessions: dict[str, Session]) -> None:
    """Ends a step: gradients are no longer referred to, because zero_grad is to free them."""
    for session in sessions.values():
        session.begin((), ())
