"""What torch says when memory is exhausted, as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .evaluate import size

_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = r"([\d.]+) ?(bytes|[KMGT]i?B|B)"

# How torch has put it, by version: from 1.x on, and of the CPU's allocator.
_SIGNS = re.compile(r"out of memory|OutOfMemoryError|can't allocate memory|not enough memory", re.IGNORECASE)
_PATTERNS = {
    "asked": (rf"[Tt]ried to allocate {_SIZE}", rf"you tried to allocate {_SIZE}"),
    "total": (rf"total capac\w* of {_SIZE}", rf"{_SIZE} total capacity"),
    "free": (rf"of which {_SIZE} is free", rf"{_SIZE} free"),
    "in_process": (rf"this process has {_SIZE} memory in use",),
    "allocated": (rf"{_SIZE} is allocated by PyTorch", rf"{_SIZE} already allocated"),
    "unallocated": (rf"{_SIZE} is reserved by PyTorch but unallocated",),
    "reserved": (rf"{_SIZE} reserved in total by PyTorch",),
}


@dataclass(frozen=True)
class OutOfMemory:
    """Bytes that a message tells of; None where it does not.

    Attributes:
        asked: What was to be allocated.
        total: What the device has.
        free: What was free of it.
        in_process: What the process held in all.
        allocated: What tensors held.
        unallocated: What torch held without using it.
    """

    asked: int | None = None
    total: int | None = None
    free: int | None = None
    in_process: int | None = None
    allocated: int | None = None
    unallocated: int | None = None

    @property
    def is_fragmented(self) -> bool:
        """Whether what torch holds unused would do, were it in one piece."""
        return self.asked is not None and self.unallocated is not None and self.unallocated > self.asked

    @property
    def elsewhere(self) -> int | None:
        """What other programs hold."""
        if self.total is None or self.free is None or self.in_process is None:
            return None
        return max(0, self.total - self.free - self.in_process)

    def sentences(self) -> Iterator[str]:
        """What is known, for people."""
        if self.asked is None:
            yield "memory was exhausted, and the message has no numbers"
            return
        yield f"{size(self.asked)} more were asked for"
        if self.total is not None and self.free is not None:
            yield f"{size(self.free)} of {size(self.total)} were free"
        if self.allocated is not None:
            yield f"tensors held {size(self.allocated)}"
        if self.unallocated:
            yield f"torch held {size(self.unallocated)} unused"
        if self.elsewhere:
            yield f"other programs held {size(self.elsewhere)}"


def parse_out_of_memory(text: str) -> OutOfMemory | None:
    """Reads a message of torch.

    Args:
        text: Of an exception, or a log with it.

    Returns:
        Its numbers; None if it is about something else.
    """
    if not _SIGNS.search(text):
        return None
    found: dict[str, int] = {}
    for name, patterns in _PATTERNS.items():
        for pattern in patterns:
            match = re.search(pattern, text)
            if match:
                found[name] = round(float(match[1]) * _UNITS[match[2]])
                break
    reserved = found.pop("reserved", None)
    if reserved is not None and "allocated" in found:
        found.setdefault("unallocated", max(0, reserved - found["allocated"]))
    return OutOfMemory(**found)
