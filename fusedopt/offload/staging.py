"""Pinned copies of states in files, for a device that steps with them."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import disk
from .plan import Window
from .runtime import Runtime


class _Part(NamedTuple):
    """A run of bytes in a file, and where a window has its copy."""

    slab: disk.Slab
    file: Tensor
    pinned: Tensor

    def advise(self, advice: int) -> None:
        self.slab.advise(advice, self.file.data_ptr() - self.slab.address, self.file.numel())


class Staging:
    """Buffers between files and a device, each laid out as the buffer on the device that it goes with.

    Pages of a file are pageable memory, from which a device copies only while the host waits. Registering them would
    pin them, and files are for states that the memory has no room for. So the host copies them, a window at a time,
    while the device is busy with the window before.

    Args:
        runtime: Of the device.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._buffers: list[Tensor] = []
        self._parts: list[list[_Part]] = []
        self._owed: deque[tuple[Any, list[_Part]]] = deque()  # an event, and what is to go back to files after it

    def arrange(self, windows: Sequence[Window], slots: Sequence[Tensor]) -> None:
        """Lets windows copy from and to these buffers what they would copy from and to files."""
        self.settle()
        slabs = disk.by_address()
        self._parts = [[] for _ in windows]
        for number, window in enumerate(windows):
            slot = slots[number % len(slots)]
            for place, (host, target) in enumerate(window.moves):
                slab = disk.holder(slabs, host)
                if slab is None:
                    continue
                if not self._buffers:
                    self._buffers = [self._runtime.pinned(other.numel()) for other in slots]
                begin = target.data_ptr() - slot.data_ptr()
                pinned = self._buffers[number % len(slots)][begin : begin + target.numel()]
                self._parts[number].append(_Part(slab, host, pinned))
                window.moves[place] = (pinned, target)

    def is_used(self) -> bool:
        """Whether some window has states in files."""
        return any(self._parts)

    def fill(self, number: int) -> None:
        """Reads what a window has in files, and has the system read that of the next ahead."""
        ahead = self._parts[number + 1] if number + 1 < len(self._parts) else []
        for part in [*self._parts[number], *ahead] if number == 0 else ahead:
            part.advise(mmap.MADV_WILLNEED)
        for part in self._parts[number]:
            part.pinned.copy_(part.file)

    def owe(self, number: int, event: Any) -> None:
        """Notes that what a window has in files comes back to its buffer before an event; every window takes a slot."""
        if self.is_used():
            self._owed.append((event, self._parts[number]))

    def settle(self, left: int = 0) -> None:
        """Waits for what windows owe to files, except for the last of them, and writes it there."""
        while len(self._owed) > left:
            event, parts = self._owed.popleft()
            self._runtime.synchronize(event)
            for part in parts:
                part.file.copy_(part.pinned)
                part.advise(disk.COLD)
