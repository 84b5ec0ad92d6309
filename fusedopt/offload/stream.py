"""Steps parameters on a device whose states are on the host: copy in, kernel and copy out run at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..backends import DeviceSession, GroupStep, ParamStep, Scaling, SpreadOf
from ..backends.base import Health, SquareSums, Summing
from ..backends.device import Scalars, copy, lr_on
from ..backends.eager import count_health, step_param, update_sums, weights
from ..backends.table import add_entry, add_groups
from ..reference.norm import square_sums
from . import disk
from .homes import slabs_of
from .plan import Piece, Window, is_cut_at_chunks, least_size, plan, rounded, tensors_of
from .runtime import Runtime, check_not_captured, runtime_of
from .staging import Staging

STREAM_BYTES = 64 << 20
_LOOKS = (
    "reports of health and of norms look at states and weights after a step, which a CUDA graph cannot record where "
    "states are on the host; step outside of the graph, or stop recording"
)
_CLIPS = (
    "a step that clips and has states on the host waits for the gradients' norm, which a CUDA graph cannot record; "
    "step outside of the graph, or leave max_grad_norm out"
)
_READ_ON_HOST = (
    "this step has states on the host or parameters on several devices, and so it reads found_inf and grad_scale on "
    "the host, which a CUDA graph cannot record; step outside of the graph"
)
_IN_FILES = (
    "the host copies states in files during a step, which a CUDA graph cannot record; step outside of the graph, or "
    "pass state_device='cpu'"
)
_SLOTS = 2


def can_stream(entry: ParamStep) -> bool:
    """Whether a parameter is here as a whole; shards have states beside them."""
    return entry.segment == 0 and entry.indices is None and entry.spread is None


def is_streamed(entry: ParamStep) -> bool:
    """Whether a parameter is on a device, and what is kept of it on the host."""
    runtime = runtime_of(entry.param)
    return runtime is not None and any(runtime.is_host(tensor) for tensor in tensors_of(entry))


def check_read_on_host(scaling: Scaling) -> None:
    """Raises ValueError if what gradients are multiplied by is to be read on the host while a graph is captured."""
    check_not_captured((scaling.found_inf, scaling.grad_scale), _READ_ON_HOST)


@dataclass
class Traffic:
    """What streams have copied, in bytes, over all steps."""

    steps: int = 0
    to_device: int = 0
    from_device: int = 0


class _Ring:
    """A device's buffers, streams and events, the host's buffers for files, and the plan that was made last."""

    def __init__(self, runtime: Runtime, device: torch.device, size: int) -> None:
        self.runtime, self.device, self.size = runtime, device, size
        self.slots = [runtime.empty(size, device) for _ in range(_SLOTS)]
        self.staging = Staging(runtime)
        self.inward, self.outward = runtime.new_stream(device), runtime.new_stream(device)
        self.copied_in, self.stepped, self.copied_out = ([runtime.new_event() for _ in range(_SLOTS)] for _ in range(3))
        self.begun, self.ended = runtime.new_event(), runtime.new_event()
        self.key: Any = None
        self.windows: list[Window] = []
        self.tables: list[_core.TensorTable] = []
        self.steps: dict[tuple[int, int], Tensor] = {}  # of pieces that are not the last of their parameter


class Streamer:
    """See Session. It takes what another session would step, were its states on the device."""

    def __init__(self) -> None:
        self._groups: Sequence[GroupStep] = ()
        self._positions: Sequence[list[int] | None] = ()
        self._entries: dict[torch.device, list[ParamStep]] = {}
        self._sessions: dict[torch.device, DeviceSession] = {}
        self._rings: dict[torch.device, _Ring] = {}
        self._filled: set[torch.device] = set()  # whose tables have this step's tensors
        self._captured: list[_Ring] = []  # each for a graph, which replays it
        self.stream_bytes = STREAM_BYTES
        self.traffic = Traffic()

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._groups, self._positions = groups, positions
        self._entries.clear()
        self._filled.clear()
        for ring in self._rings.values():
            for table in ring.tables:
                table.clear()

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        return [i for i, param in enumerate(params) if param.grad is not None]

    def add(self, entry: ParamStep) -> bool:
        return False  # not by itself

    def take(self, entry: ParamStep, session: DeviceSession) -> None:
        """Takes a parameter for a session that could step it."""
        runtime = runtime_of(entry.param)
        assert runtime is not None
        device = runtime.device_of(entry.param)
        self._sessions[device] = session
        self._entries.setdefault(device, []).append(entry)

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._entries.values())

    def wait(self) -> None:
        """Waits until what steps have copied is on the host."""
        for ring in self._captured:  # who replays a graph tells nobody
            if not ring.runtime.is_capturing():
                ring.runtime.finish(ring.device)
        for ring in self._rings.values():
            if not ring.runtime.is_capturing():
                ring.runtime.synchronize(ring.ended)
                ring.staging.settle()

    def settle(self) -> None:
        """Waits until states in files are there; nothing else is waited for."""
        for ring in self._rings.values():
            ring.staging.settle()

    # ---- before a step -----------------------------------------------------------------------------

    def _ring(self, device: torch.device) -> _Ring:
        """The buffers of a device, with the plan of this step."""
        entries = self._entries[device]
        runtime = runtime_of(entries[0].param)
        assert runtime is not None
        size = rounded(max(self.stream_bytes, least_size(self._groups, entries)))
        ring = self._rings.get(device)
        if ring is None or ring.size != size:
            self.wait()
            ring = self._rings[device] = _Ring(runtime, device, size)
        key = [(e.param.shape, e.group, [(t.data_ptr(), t.dtype) for t in tensors_of(e)]) for e in entries]
        if ring.key != key:
            ring.key = key
            ring.windows = plan(self._groups, entries, ring.slots, [*slabs_of(runtime), *disk.views()])
            ring.staging.arrange(ring.windows, ring.slots)
            index = device.index or 0
            ring.tables = [_core.TensorTable(device_type=device.type, device_index=index) for _ in ring.windows]
            listed = [(w, i, p) for w, window in enumerate(ring.windows) for i, p in enumerate(window.pieces)]
            unfinished = [(w, i) for w, i, piece in listed if not piece.is_last]
            counts = runtime.empty(4 * max(1, len(unfinished)), device).view(torch.float32)
            ring.steps = {place: counts[i : i + 1].view(()) for i, place in enumerate(unfinished)}
        return ring

    def _fill(self, device: torch.device) -> _Ring:
        """Lists each window's pieces in its table, once in a step."""
        ring = self._ring(device)
        if device in self._filled:
            return ring
        self._filled.add(device)
        for number, (window, table) in enumerate(zip(ring.windows, ring.tables)):
            add_groups(table, self._groups, self._positions)
            for place, piece in enumerate(window.pieces):
                entry = self._entries[device][piece.entry]
                if not add_entry(table, _of_piece(entry, piece, ring.steps.get((number, place)))):
                    raise AssertionError("a piece of a parameter that was checked does not fit")
        return ring

    def square_sums(self) -> Tensor:
        sums = self.sums_by_place()
        parts = [sums[place].cpu() for place in sorted(sums)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")

    def sums_by_place(self) -> dict[tuple[int, int], Tensor]:
        """The sums of each parameter by its place in the param groups."""
        check_not_captured((entry.param for entries in self._entries.values() for entry in entries), _CLIPS)
        parts: dict[tuple[int, int], Tensor] = {}
        for device, entries in self._entries.items():
            ring, session = self._fill(device), self._sessions[device]
            pieces: dict[int, list[tuple[Piece, Tensor]]] = {}
            with session._backend.guard(device) as stream:
                for window, table in zip(ring.windows, ring.tables):
                    listed = sorted(window.pieces, key=lambda piece: self._place(entries[piece.entry]))
                    sizes = [-(-_numel(entries[p.entry], p) // _core.reduction_chunk) for p in listed]
                    sums = session.launch_square_sums(device, stream, table)
                    for piece, part in zip(listed, torch.split(sums, sizes)):
                        pieces.setdefault(piece.entry, []).append((piece, part))
            for index, found in pieces.items():
                whole = is_cut_at_chunks([piece for piece, _ in found])
                place = self._place(entries[index])
                parts[place] = torch.cat([part for _, part in found]) if whole else square_sums(entries[index].grad)
        return parts

    def _place(self, entry: ParamStep) -> tuple[int, int]:
        """Where a parameter is listed."""
        positions = self._positions[entry.group]
        return self._groups[entry.group].param_group, entry.position if positions is None else positions[entry.position]

    # ---- a step ------------------------------------------------------------------------------------

    def summing_step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Summing[Health]:
        yield from ()  # it takes no shards of a whole
        return self.step(grad_multipliers, counts_health=counts_health, square_sums=square_sums)

    def step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        health: Health = {}
        looks = counts_health or square_sums is not None
        if looks:
            params = (entry.param for entries in self._entries.values() for entry in entries)
            check_not_captured(params, _LOOKS)
        for device in self._entries:
            if self._fill(device).staging.is_used():
                check_not_captured((entry.param for entry in self._entries[device]), _IN_FILES)
        self.settle()
        for device, entries in self._entries.items():
            before = [weights(self._groups[e.group], on_device(e, [])).clone() for e in entries] if looks else []
            skips = [counts_health and self._groups[e.group].skips_blocks for e in entries]
            shadows = [copy(on_device(e, [])) if skip else None for e, skip in zip(entries, skips)]
            self._stream(device, list(grad_multipliers))
            if before:
                self.wait()
            for entry, held, shadow in zip(entries, before, shadows):
                group, skipped = self._groups[entry.group], 0
                if shadow is not None:  # kernels do not count what they skip: the reference takes the step once more
                    skipped = step_param(group, shadow, grad_multipliers[entry.group])
                stepped = on_device(entry, [])
                if counts_health:
                    health[entry.group, entry.position] = count_health(group, stepped, held, skipped)
                if square_sums is not None:
                    square_sums[entry.group, entry.position] = update_sums(group, stepped, held)
        self.traffic.steps += 1
        return health

    def _stream(self, device: torch.device, grad_multipliers: list[float]) -> None:
        ring, session = self._fill(device), self._sessions[device]
        runtime, entries = ring.runtime, self._entries[device]
        if runtime.is_capturing():
            self._captured.append(self._rings.pop(device))
        scalars = Scalars(grad_multipliers, [lr_on(group.lr, device) for group in self._groups], Scaling(), None)
        with session._backend.guard(device) as pointer:
            current = runtime.current_stream(device)
            for (number, place), count in ring.steps.items():
                step = entries[ring.windows[number].pieces[place].entry].step
                runtime.copy(count.view(1).view(torch.uint8), step.detach().view(1).view(torch.uint8), current)
            # The last step's copies come before this, because its end was waited for on this stream.
            runtime.record(ring.begun, current)
            runtime.wait(ring.inward, ring.begun)
            runtime.wait(ring.outward, ring.begun)
            for number, (window, table) in enumerate(zip(ring.windows, ring.tables)):
                slot = number % _SLOTS
                if number >= _SLOTS:
                    runtime.wait(ring.inward, ring.copied_out[slot])
                ring.staging.settle(_SLOTS - 1)
                ring.staging.fill(number)
                for host, target in window.moves:
                    runtime.copy(target, host, ring.inward)
                    self.traffic.to_device += target.numel()
                runtime.record(ring.copied_in[slot], ring.inward)
                runtime.wait(current, ring.copied_in[slot])
                session.launch(device, pointer, table, scalars)
                runtime.record(ring.stepped[slot], current)
                runtime.wait(ring.outward, ring.stepped[slot])
                for host, target in window.moves:
                    runtime.copy(host, target, ring.outward)
                    self.traffic.from_device += target.numel()
                runtime.record(ring.copied_out[slot], ring.outward)
                ring.staging.owe(number, ring.copied_out[slot])
            runtime.record(ring.ended, ring.outward)
            runtime.wait(current, ring.ended)
        torch.autograd.graph.increment_version([entry.param for entry in entries])


def _numel(entry: ParamStep, piece: Piece) -> int:
    return entry.param.numel() if piece.shape is None else torch.Size(piece.shape).numel()


def _of_piece(entry: ParamStep, piece: Piece, step: Tensor | None) -> ParamStep:
    """What a piece steps: its part of the parameter and its gradient, and its states in the buffer."""
    tensors = iter(piece.tensors)
    states = tuple(tuple(next(tensors) for _ in held) for held in entry.states)
    master = None if entry.master is None else next(tensors)
    param, grad = entry.param, entry.grad
    if piece.shape is not None:
        run = slice(piece.start, piece.start + _numel(entry, piece))
        param, grad = param.detach().view(-1)[run].view(piece.shape), grad.view(-1)[run].view(piece.shape)
    return replace(
        entry,
        param=param,
        grad=grad,
        states=states,
        master=master,
        step=entry.step if step is None else step,
        first_index=entry.first_index + piece.start,
    )


def on_device(entry: ParamStep, copies: list[tuple[Tensor, Tensor]]) -> ParamStep:
    """The same with copies of its states where the parameter is; each is added to `copies` with what it is of."""

    def moved(tensor: Tensor) -> Tensor:
        copy = tensor.to(entry.param.device)
        if copy is not tensor:
            copies.append((tensor, copy))
        return copy

    states = tuple(tuple(moved(tensor) for tensor in held) for held in entry.states)
    return replace(entry, states=states, master=None if entry.master is None else moved(entry.master))
