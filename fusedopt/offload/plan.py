"""How the states of a step are cut up and packed into windows, each as large as a buffer on the device."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backends import GroupStep, ParamStep
from ..reference.norm import CHUNK
from ..storage.quantization import BLOCK

ALIGNMENT = 256  # bytes, of every tensor in a buffer and on the host


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that is stepped in one window.

    Attributes:
        entry: Which of the step's parameters.
        start: Its first element, in row-major order.
        shape: Its own shape; None if it is the whole parameter as it is.
        tensors: Where its states lie in the buffer, in the order of `tensors_of`.
        is_last: Whether the step count may move on with it.
    """

    entry: int
    start: int
    shape: tuple[int, ...] | None
    tensors: tuple[Tensor, ...]
    is_last: bool


@dataclass
class Window:
    """What is on the device at one time.

    Attributes:
        pieces: What is stepped.
        moves: What is copied: bytes on the host, and where they go in the buffer.
    """

    pieces: list[Piece] = field(default_factory=list)
    moves: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def tensors_of(entry: ParamStep) -> list[Tensor]:
    """A parameter's states and what it keeps of its weights."""
    return [*(tensor for held in entry.states for tensor in held), *([] if entry.master is None else [entry.master])]


def rounded(size: int) -> int:
    """A size in bytes, up to the next address that a tensor may have."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Cut:
    """A part of a parameter: its first element, its shape, and the runs of its tensors on the host."""

    start: int
    shape: tuple[int, ...] | None
    runs: list[Tensor]

    @property
    def size(self) -> int:
        return sum(rounded(run.numel() * run.element_size()) for run in self.runs)


def _whole(entry: ParamStep) -> _Cut:
    return _Cut(0, None, tensors_of(entry))


def _is_quantized(entry: ParamStep) -> bool:
    return any(len(held) == 2 for held in entry.states)


def _part(entry: ParamStep, start: int, numel: int) -> _Cut:
    """A run of elements: any of dense states, and of 8-bit ones whole rows, or whole blocks of one row."""
    param = entry.param
    if not _is_quantized(entry):
        return _Cut(start, (numel,), [tensor.view(-1)[start : start + numel] for tensor in tensors_of(entry)])
    columns = param.shape[1:].numel()
    blocks = -(-columns // BLOCK)
    shape = (numel // columns, columns) if numel >= columns else (1, numel)
    first = start // columns * blocks + start % columns // BLOCK
    count = shape[0] * -(-shape[1] // BLOCK)
    runs: list[Tensor] = []
    for held in entry.states:
        runs.append(held[0].view(-1)[start : start + numel].view(shape))
        if len(held) == 2:
            runs.append(held[1].view(-1)[first : first + count].view(shape[0], -1))
    if entry.master is not None:
        runs.append(entry.master.view(-1)[start : start + numel].view(shape))
    return _Cut(start, shape, runs)


def _cuts(settings: GroupStep, entry: ParamStep, room: int, size: int) -> Iterator[_Cut]:
    """The parts of a parameter: as much as there is room for, and then buffers of a size full."""
    whole = _whole(entry)
    # Sums over a tensor need it as a whole, and so does what is not stored in row-major order.
    if whole.size <= room or settings.takes_sums or not all(tensor.is_contiguous() for tensor in whole.runs):
        yield whole
        return
    numel = entry.param.numel()
    per_element = whole.size / numel
    columns = entry.param.shape[1:].numel() if _is_quantized(entry) else 1
    # Whole chunks of the norm's sums where rows allow it, or else whole rows, or else blocks of a row.
    chunks = columns * (CHUNK // math.gcd(CHUNK, columns))
    usable = size - ALIGNMENT * len(whole.runs)
    unit = next((unit for unit in (chunks, columns) if unit * per_element <= usable), BLOCK)
    start = 0
    while start < numel:
        taken = int((room - (size - usable)) / per_element) // unit * unit
        if taken <= 0:
            taken = int(usable / per_element) // unit * unit
        if unit == BLOCK:
            taken = min(taken, columns - start % columns)
        taken = min(taken, numel - start)
        yield _part(entry, start, taken)
        start += taken
        room = size


def is_cut_at_chunks(pieces: Sequence[Piece]) -> bool:
    """Whether the pieces of a parameter begin where chunks of the norm's sums do."""
    return all(piece.start % CHUNK == 0 for piece in pieces)


def least_size(groups: Sequence[GroupStep], entries: Sequence[ParamStep]) -> int:
    """Bytes that a buffer needs at least, for what cannot be cut."""
    sizes = [_whole(entry).size for entry in entries if groups[entry.group].takes_sums]
    return max(sizes, default=0)


def plan(
    groups: Sequence[GroupStep], entries: Sequence[ParamStep], slots: Sequence[Tensor], slabs: Sequence[Tensor]
) -> list[Window]:
    """Packs a step into windows, which use the slots in turn.

    Args:
        groups: Of the step.
        entries: Its parameters, all of whose states are on the host.
        slots: The buffers on the device, of one size.
        slabs: The host's memory that states lie in; neighbours in one of them are copied together.
    """
    size = slots[0].numel()
    windows: list[Window] = []
    room = 0
    for index, entry in enumerate(entries):
        cuts = list(_cuts(groups[entry.group], entry, room if room >= size // 8 else size, size))
        for number, cut in enumerate(cuts):
            if cut.size > room:
                windows.append(Window())
                room = size
            slot = slots[(len(windows) - 1) % len(slots)]
            tensors = []
            for run in cut.runs:
                begin, length = size - room, run.numel() * run.element_size()
                target = slot[begin : begin + length]
                tensors.append(target.view(run.dtype).view(run.shape))
                if length > 0:
                    windows[-1].moves.append((run, target))
                room -= rounded(length)
            piece = Piece(index, cut.start, cut.shape, tuple(tensors), number == len(cuts) - 1)
            windows[-1].pieces.append(piece)
    by_address = sorted(((slab.data_ptr(), slab) for slab in slabs), key=lambda pair: pair[0])
    for window in windows:
        window.moves = list(_merged(window.moves, slots, by_address))
    return windows


def _merged(
    moves: list[tuple[Tensor, Tensor]], slots: Sequence[Tensor], slabs: Sequence[tuple[int, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same as bytes, neighbours in one. Slabs come with where they begin, in that order."""
    run: list[tuple[Tensor, int, Tensor, int, int]] = []  # slab, where in it, slot, where in it, bytes
    for host, target in moves:
        address, length = host.data_ptr(), target.numel()
        slot = next(slot for slot in slots if slot.data_ptr() <= target.data_ptr() < slot.data_ptr() + slot.numel())
        at = bisect.bisect_right(slabs, address, key=lambda pair: pair[0]) - 1
        begin, slab = slabs[at] if at >= 0 else (0, None)
        if slab is None or address >= begin + slab.numel():  # states that somebody else has made
            yield host.view(-1).view(torch.uint8), target
            continue
        found = (slab, address - begin, slot, target.data_ptr() - slot.data_ptr(), length)
        last = run[-1] if run else None
        gap = rounded(last[4]) if last else 0
        if last and last[0] is slab and last[2] is slot and (last[1] + gap, last[3] + gap) == (found[1], found[3]):
            run[-1] = (slab, last[1], slot, last[3], gap + length)
        else:
            run.append(found)
    for slab, at, slot, begin, length in run:
        yield slab[at : at + length], slot[begin : begin + length]
