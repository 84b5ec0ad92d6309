"""What backends share whose tensors lie on devices: a table of tensors for each, and steps that wait for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _core
from ..reference.norm import block_chunks, pairwise_sum
from ..storage import placement
from ..storage.placement import local
from .base import GroupStep, Health, ParamStep, Scaling, SpreadOf, SquareSums, Summing
from .eager import block_row, count_health, step_param, weights
from .table import add_entry, add_groups, collect


class DeviceBackend(Protocol):
    """What a session asks of its backend."""

    def device_of(self, tensor: Tensor) -> torch.device:
        """The device that a tensor is on, with its number."""

    def guard(self, device: torch.device) -> AbstractContextManager[int]:
        """Makes a device the current one for as long as it is entered; gives its current stream."""

    def unusable(self, device: torch.device) -> str | None:
        """Why it cannot step what is on a device, as a clause; None if it can."""


@dataclass(frozen=True)
class Scalars:
    """What a step takes beside a table.

    Attributes:
        grad_multipliers: Of each group.
        lrs: Of each group, on the device; None where it is a plain number.
        scaling: See Scaling; its tensors are on the device.
        norm: Takes the gradients' norm on the device if they are clipped; else None.
        sums_updates: Whether the sums of squares of updates and weights are wanted.
    """

    grad_multipliers: list[float]
    lrs: list[Tensor | None]
    scaling: Scaling
    norm: Tensor | None
    sums_updates: bool = False


class DeviceSession:
    """See Session. A subclass says how kernels are launched: `launch` and `launch_square_sums`."""

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        self._tables: dict[torch.device, _core.TensorTable] = {}
        self._groups: Sequence[GroupStep] = ()
        self._positions: Sequence[list[int] | None] = ()
        self._begun: set[torch.device] = set()
        # Of each group, for counting: its parameters and the optimizer's state; entries that came one by one.
        self._collected: dict[int, tuple[list[Tensor], dict[Tensor, Any], set[int]]] = {}  # and what was left
        self._added: list[ParamStep] = []

    # ---- what a subclass does ----------------------------------------------------------------------

    def launch(self, device: torch.device, stream: int, table: _core.TensorTable, scalars: Scalars) -> Tensor | None:
        """Steps a table.

        Returns:
            If asked for, the sums of squares of updates and of weights, (2, chunks) in float64: those of the chunks of
            each tensor's block sums (reference/norm.py), in list order. Of a step that is not taken, updates are 0.
        """
        raise NotImplementedError

    def launch_square_sums(self, device: torch.device, stream: int, table: _core.TensorTable) -> Tensor:
        """See Session.square_sums."""
        raise NotImplementedError

    # ---- a session ---------------------------------------------------------------------------------

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._groups, self._positions = groups, positions
        self._begun.clear()
        self._collected.clear()
        self._added.clear()
        for table in self._tables.values():
            table.clear()

    def _table(self, tensor: Tensor) -> _core.TensorTable:
        """The table of a tensor's device, with this step's groups."""
        device = self._backend.device_of(tensor)
        if device not in self._tables:
            self._tables[device] = _core.TensorTable(device_type=device.type, device_index=device.index or 0)
        if device not in self._begun:
            self._begun.add(device)
            add_groups(self._tables[device], self._groups, self._positions)
        return self._tables[device]

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        if not params:
            return []
        if self._backend.unusable(params[0].device) is not None:
            return [i for i, param in enumerate(params) if param.grad is not None]
        left = collect(self._table(params[0]), group, params, state, spread_of)
        self._collected[group] = (params, state, set(left))
        return left

    def add(self, entry: ParamStep) -> bool:
        if not add_entry(self._table(entry.param), entry):
            return False
        self._added.append(entry)
        return True

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables.values())

    def _active(self) -> list[tuple[torch.device, _core.TensorTable]]:
        return [(device, table) for device, table in self._tables.items() if len(table) > 0]

    def device(self) -> torch.device | None:
        """The device of all that was taken; None if there are several."""
        active = self._active()
        return active[0][0] if len(active) == 1 else None

    def square_sums(self) -> Tensor:
        ((device, table),) = self._active()
        with self._backend.guard(device) as stream:
            return self.launch_square_sums(device, stream, table)

    def sums_by_place(self) -> dict[tuple[int, int], Tensor]:
        """The sums of each parameter by its place in the param groups."""
        entries = self._in_list_order(self._entries())
        sizes = [-(-entry.param.numel() // _core.reduction_chunk) for entry in entries]
        return dict(zip(map(self._place, entries), torch.split(self.square_sums(), sizes)))

    def _place(self, entry: ParamStep) -> tuple[int, int]:
        positions = self._positions[entry.group]
        listed = entry.position if positions is None else positions[entry.position]
        return self._groups[entry.group].param_group, listed

    def _in_list_order(self, entries: Iterable[ParamStep]) -> list[ParamStep]:
        """As tables have them."""
        return sorted(entries, key=self._place)

    def step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        return self.step_scaled(grad_multipliers, Scaling(), counts_health=counts_health, square_sums=square_sums)[0]

    def summing_step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Summing[Health]:
        yield from ()  # it takes no shards of a whole
        return self.step(grad_multipliers, counts_health=counts_health, square_sums=square_sums)

    def step_scaled(
        self,
        grad_multipliers: Sequence[float],
        scaling: Scaling,
        *,
        counts_health: bool = False,
        square_sums: SquareSums | None = None,
    ) -> tuple[Health, Tensor | None]:
        """The same, gradients multiplied by what is found on the device; with the norm, if they are clipped."""
        entries = self._entries() if counts_health or square_sums is not None else []
        before = [weights(self._groups[entry.group], entry).clone() if counts_health else None for entry in entries]
        shadows = [
            copy(entry) if counts_health and self._groups[entry.group].skips_blocks else None for entry in entries
        ]
        norm = None
        summed = {}
        for device, table in self._active():
            norm, sums = self._launch(device, table, list(grad_multipliers), scaling, square_sums is not None)
            if sums is not None:
                summed[device] = sums
        for device, sums in summed.items():
            here = [entry for entry in entries if self._backend.device_of(entry.param) == device]
            if square_sums is not None:
                square_sums.update(_update_sums(self._in_list_order(here), sums))
        health = {}
        for entry, held, shadow in zip(entries, before, shadows):
            group = self._groups[entry.group]
            skipped = 0
            if shadow is not None:  # kernels do not count what they skip: the reference takes the step once more
                skipped = step_param(group, shadow, _multiplier(grad_multipliers[entry.group], scaling, norm))
            if held is not None:
                health[entry.group, entry.position] = count_health(group, entry, held, skipped)
        return health, norm

    def _launch(
        self,
        device: torch.device,
        table: _core.TensorTable,
        grad_multipliers: list[float],
        scaling: Scaling,
        sums_updates: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The norm of gradients, if they are clipped, and what `launch` returns."""
        lrs = [lr_on(group.lr, device) for group in self._groups]
        on_device = replace(
            scaling,
            grad_scale=_float_on(scaling.grad_scale, device),
            found_inf=_float_on(scaling.found_inf, device),
        )
        with self._backend.guard(device) as stream:
            norm = torch.empty((), dtype=torch.float32, device=device) if scaling.max_grad_norm is not None else None
            sums = self.launch(device, stream, table, Scalars(grad_multipliers, lrs, on_device, norm, sums_updates))
        table.count_versions()
        return norm, sums

    def _entries(self) -> list[ParamStep]:
        """What was taken, parameter by parameter."""
        entries = list(self._added)
        for index, (params, state, left) in self._collected.items():
            group = self._groups[index]
            for position, param in enumerate(params):
                if param.grad is None or position in left:
                    continue
                held = {key: local(value) for key, value in state[param].items()}
                place = placement.of(param) if placement.is_dtensor(param) else placement.WHOLE
                entries.append(
                    ParamStep(
                        group=index,
                        position=position,
                        param=local(param).detach(),
                        grad=local(param.grad),
                        states=tuple(tuple(held[key] for key in spec.keys_in(held)) for spec in group.states),
                        step=held["step"],
                        master=held.get(group.master_key) if group.master_key else None,
                        **place._asdict(),
                    )
                )
        return entries


def _update_sums(entries: Sequence[ParamStep], sums: Tensor) -> SquareSums:
    """What `launch` returned of some parameters, in list order, as numbers: the device is waited for."""
    sizes = [block_chunks(entry.param.numel(), block_row(entry)) for entry in entries]
    totals = [pairwise_sum(part).tolist() for part in torch.split(sums.cpu(), sizes, dim=1)]
    return {(entry.group, entry.position): (update, weight) for entry, (update, weight) in zip(entries, totals)}


def copy(entry: ParamStep) -> ParamStep:
    """The same parameter, in tensors of its own."""
    return replace(
        entry,
        param=entry.param.clone(),
        states=tuple(tuple(part.clone() for part in held) for held in entry.states),
        step=entry.step.clone(),
        master=None if entry.master is None else entry.master.clone(),
    )


def _multiplier(sign: float, scaling: Scaling, norm: Tensor | None) -> float:
    """What gradients were multiplied by, nearly: the norm is rounded, which no number's being finite hangs on."""
    multiplier = sign if scaling.grad_scale is None else sign / float(scaling.grad_scale.item())
    if norm is None or scaling.max_grad_norm is None:
        return multiplier
    coefficient = scaling.max_grad_norm / (float(norm.item()) + 1e-6)
    return multiplier * (1.0 if coefficient > 1.0 else coefficient)


@contextmanager
def guard(device: torch.device) -> Iterator[int]:
    """Makes a CUDA, ROCm or oneAPI device the current one; gives its current stream."""
    kind = torch.xpu if device.type == "xpu" else torch.cuda
    with kind.device(device):
        stream = kind.current_stream(device)
        yield stream.sycl_queue if device.type == "xpu" else stream.cuda_stream


def pointer(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are; 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def _float_on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(device, torch.float32)


def lr_on(lr: Tensor | None, device: torch.device) -> Tensor | None:
    """A learning rate where kernels read it."""
    if lr is None:
        return None
    return lr.detach().to(device, lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float32)
