"""States in memory-mapped files: scratch of one run, on a disk that is larger than the memory."""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "fusedopt-scratch-"
MANIFEST = "manifest.json"
SLAB_BYTES = 1 << 26
COLD = 20  # MADV_COLD of Linux 5.4, which Python does not name: to be taken first when memory is short


class Slab(mmap.mmap):
    """A file of zeros, mapped to memory. It lives as long as a tensor in it, and keeps its folder for as long."""

    scratch: Scratch
    path: Path
    address: int

    @classmethod
    def create(cls, scratch: Scratch, path: Path, size: int) -> Slab:
        """Makes the file. Raises OSError if it cannot be as large as that; nothing is left of it then."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Blocks are reserved now: a disk that is full later would end the process at any write.
            os.posix_fallocate(handle, 0, size)
            slab = cls(handle, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(handle)
        slab.scratch, slab.path, slab.address = scratch, path, int(slab.memory().ctypes.data)
        weakref.finalize(slab, _remove_file, path, os.getpid())
        return slab

    def memory(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Its bytes. What refers to them keeps the slab alive."""
        return np.frombuffer(self, dtype=np.uint8)

    def advise(self, advice: int, at: int = 0, length: int | None = None) -> None:
        """Tells the system what is to become of the pages; one that does not know it may do as it likes.

        Args:
            advice: One of madvise's.
            at: The first byte on the pages.
            length: How many bytes they have; None for all that follow.
        """
        begin = at // mmap.PAGESIZE * mmap.PAGESIZE
        end = len(self) if length is None else at + length
        with contextlib.suppress(OSError):
            self.madvise(advice, begin, end - begin)


class Scratch:
    """A run's folder of slabs, which ends with the last of them. What a killed run leaves, the next one removes."""

    def __init__(self, folder: str) -> None:
        remove_abandoned(folder)
        # It gets its name when it is locked: until then another process would take it for abandoned.
        made = Path(tempfile.mkdtemp(prefix="." + PREFIX, dir=folder))
        self.path = made.with_name(made.name[1:])
        self._lock = (made / MANIFEST).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as the process lives
        whose = {"host": socket.gethostname(), "process": os.getpid()}
        said = "optimizer states in use by this process; no checkpoint, and worthless without it"
        json.dump({**whose, "what": said}, self._lock)
        self._lock.flush()
        made.rename(self.path)
        self._slabs: list[weakref.ref[Slab]] = []
        self._count = 0
        weakref.finalize(self, _remove, self.path, os.getpid())

    def slabs(self) -> list[Slab]:
        """Those that something lies in."""
        return [slab for slab in (ref() for ref in self._slabs) if slab is not None]

    def slab(self, size: int) -> Slab:
        """A new one. Raises OSError, with the path, if the disk is full; nothing is left of it then."""
        path = self.path / f"states-{self._count:05d}"
        try:
            slab = Slab.create(self, path, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: optimizer states need {size:,} more bytes; make room there, or choose "
                "another folder for state_device='disk:FOLDER'",
                str(path),
            ) from error
        self._count += 1
        self._slabs = [ref for ref in self._slabs if ref() is not None] + [weakref.ref(slab)]
        return slab


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # and not in a child
        shutil.rmtree(path, ignore_errors=True)


def _remove_file(path: Path, process: int) -> None:
    if os.getpid() == process:
        path.unlink(missing_ok=True)


def remove_abandoned(folder: str) -> None:
    """Removes what processes left there that were killed: nobody holds its lock."""
    for path in Path(folder).glob(PREFIX + "*"):
        try:
            with (path / MANIFEST).open("r+", encoding="utf-8") as manifest:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # in use, or another user's


# Of this process, by folder, for as long as states lie in it.
_SCRATCH: weakref.WeakValueDictionary[str, Scratch] = weakref.WeakValueDictionary()


def scratch_in(folder: str) -> Scratch:
    """This process's scratch in a folder."""
    found = _SCRATCH.get(folder)
    if found is None:
        found = _SCRATCH[folder] = Scratch(folder)
    return found


def by_address() -> list[tuple[int, Slab]]:
    """All slabs of this process that something lies in, each with where it begins."""
    slabs = (slab for scratch in list(_SCRATCH.values()) for slab in scratch.slabs())
    return sorted(((slab.address, slab) for slab in slabs), key=lambda pair: pair[0])


def views() -> list[Tensor]:
    """The bytes of all slabs."""
    return [torch.from_numpy(slab.memory()) for _, slab in by_address()]


def holder(slabs: list[tuple[int, Slab]], tensor: Tensor) -> Slab | None:
    """The one of slabs `by_address` that a tensor lies in; None if it is elsewhere."""
    at = bisect.bisect_right(slabs, tensor.data_ptr(), key=lambda pair: pair[0]) - 1
    slab = slabs[at][1] if at >= 0 else None
    return slab if slab is not None and tensor.data_ptr() < slab.address + len(slab) else None


def slab_of(tensor: Tensor) -> Slab | None:
    """The slab that a tensor lies in; None if it is in memory."""
    return holder(by_address(), tensor)


def windows(
    param_groups: Sequence[dict[str, Any]],
    state: dict[Tensor, Any],
    listed: Sequence[Sequence[int]],
    size: int = SLAB_BYTES,
) -> list[list[list[int]]]:
    """The same positions by group in windows of `size` bytes of states."""
    found: list[list[list[int]]] = []
    held = size
    for index, (group, places) in enumerate(zip(param_groups, listed)):
        for position in places:
            if held >= size:
                found.append([[] for _ in param_groups])
                held = 0
            found[-1][index].append(position)
            held += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state, group["params"][position]))
    return found


def _tensors(state: dict[Tensor, Any], param: Tensor) -> Iterator[Tensor]:
    return (value for value in state.get(param, {}).values() if isinstance(value, Tensor))


def read_ahead(
    param_groups: Sequence[dict[str, Any]], state: dict[Tensor, Any], listed: list[list[list[int]]]
) -> Iterator[list[list[int]]]:
    """Gives the windows, each to be stepped before the next is asked for.

    The states of the next are read ahead meanwhile, and those of the one before may go.
    """
    slabs = by_address()
    held: list[dict[int, Slab]] = []
    for window in listed:
        params = (group["params"][i] for group, places in zip(param_groups, window) for i in places)
        found = (holder(slabs, tensor) for param in params for tensor in _tensors(state, param))
        held.append({id(slab): slab for slab in found if slab is not None})
    for number, window in enumerate(listed):
        ahead = held[number + 1] if number + 1 < len(held) else {}
        for slab in ahead.values():
            slab.advise(mmap.MADV_WILLNEED)
        yield window
        for key, slab in held[number].items():
            if key not in ahead:
                slab.advise(COLD)
