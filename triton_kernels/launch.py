"""What the host does in a step: keeps tables in device memory, and launches kernels. It waits for nothing.

Tables are sent again only when they have changed; pointers of gradients may change in every step. Tables also hold the
learning rates that are Python numbers, so a schedule changes numbers in memory and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import passes, prepare, reduce, step, table, updates
from .codes import BLOCK
from .formats import CODES
from .normalize import MOMENTS
from .passes import divided_up
from .rules import RULES

# Kernels add and multiply in separate roundings.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}

_PROGRAM = step.BLOCKS.value * step.TILES.value  # blocks
_POINTERS = [table.PARAM.value, table.GRAD.value, table.MASTER.value, *range(table.STATES.value, table.SCALES.value)]


@dataclass(frozen=True)
class Launch:
    """The tensors of one rule and one set of formats: rows first to last of the table."""

    rule: str
    formats: int
    first: int
    last: int
    programs: int
    cuts: passes.Cuts | None = None

    def step_constants(self) -> dict[str, Any]:
        """What `step_kernel` is compiled for."""
        rule = RULES[self.rule]
        return {
            "UPDATE": rule.update,
            "NORMALIZE": rule.normalizing and rule.normalizing.quotient,
            "STATES": len(rule.states),
            "SIGNS": rule.signs,
            "ROOTED": rule.rooted,
            "HYPER": rule.hyper,
            "FORMATS": self.formats,
        }


def prepare_constants(name: str, *, clips: bool) -> dict[str, Any]:
    """What `prepare_kernel` is compiled for."""
    rule = RULES[name]
    normalizing = rule.normalizing
    return {
        "DERIVE": normalizing.moments if normalizing else rule.derive,
        "CONFIG": len(rule.config),
        "HYPER": MOMENTS.value if normalizing else rule.hyper,
        "NORMALIZES": normalizing is not None,
        "CLIPS": clips,
    }


class Mirror:
    """Numbers in device memory, sent there again only when they have changed.

    A captured graph copies from the host's memory whenever it is replayed, so that stays as long as this object does.
    Memory cannot be pinned while a stream is captured: some is kept ready from the steps before.
    """

    _READY = 2  # buffers: graphs that may be captured between two steps

    def __init__(self) -> None:
        self._sent: tuple[bytes, int] | None = None
        self._tensors: tuple[Tensor, ...] = ()  # on the device and, as long as it may still be read, on the host
        self._captured: list[tuple[Tensor, ...]] = []
        self._ready: list[Tensor] = []

    def on(self, device: torch.device, stream: int, numbers: np.ndarray[Any, Any]) -> Tensor:
        """The numbers on a device, sent in a stream's order."""
        if device.type == "cpu":
            return torch.from_numpy(numbers)
        is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        wanted = (numbers.tobytes(), stream)
        if wanted == self._sent:
            tensors = self._tensors
        else:
            pinned = self._ready_buffer(numbers) if is_captured else torch.from_numpy(numbers).pin_memory()
            tensors = (pinned.to(device, non_blocking=True), pinned)
            if not is_captured:  # what a graph copies exists only once it is replayed
                self._sent, self._tensors = wanted, tensors
        if is_captured:
            self._captured.append(tensors)  # every replay reads them
        elif device.type == "cuda":
            self._prepare(numbers)
        return tensors[0]

    def _prepare(self, numbers: np.ndarray[Any, Any]) -> None:
        """Pins what a capture may need."""
        if self._ready and self._ready[0].shape != numbers.shape:
            self._ready.clear()
        while len(self._ready) < self._READY:
            self._ready.append(torch.from_numpy(np.zeros_like(numbers)).pin_memory())

    def _ready_buffer(self, numbers: np.ndarray[Any, Any]) -> Tensor:
        """The numbers in memory that has been pinned before."""
        if not self._ready or self._ready[0].shape != numbers.shape:
            raise RuntimeError(
                "a step is captured in a CUDA graph, and no step with the same tensors has been taken since the last "
                "capture; take one before, outside of the graph, as torch.cuda.graphs asks for any work"
            )
        buffer = self._ready.pop()
        buffer.copy_(torch.from_numpy(numbers))
        return buffer


class Plan:
    """A step's tensors as launches.

    Args:
        given_rows: What `TensorTable.rows` gave: a row for each tensor, in list order.
        given_cuts: What `TensorTable.cuts` gave.
        rules_of: The name of each group's rule.
    """

    def __init__(self, given_rows: bytes, given_cuts: bytes, rules_of: Sequence[str]) -> None:
        rows, given = _numbers(given_rows, table.FIRST_PROGRAM.value), _numbers(given_cuts, table.UNITS.value)
        names = sorted(set(rules_of))
        rule = np.array([names.index(name) for name in rules_of])[rows[:, table.GROUP.value]]
        formats = rows[:, table.FORMATS.value]
        order = np.lexsort((formats, rule))
        filled = np.zeros((len(rows), table.WIDTH.value), np.int64)
        filled[:, : rows.shape[1]] = rows[order]
        rule, formats, numel = rule[order], formats[order], filled[:, table.NUMEL.value]
        has_codes = np.zeros(len(rows), bool)
        for state in range(4):
            has_codes |= (formats >> (13 + 3 * state)) & 7 == CODES.value
        segment = filled[:, table.SEGMENT.value]
        length = np.where(segment > 0, segment, np.where(has_codes, filled[:, table.ROW.value], numel))
        gap = np.where(segment > 0, filled[:, table.SEGMENT_STRIDE.value] - segment, 0)
        filled[:, table.ROW_GAP.value] = gap
        filled[:, table.ROW.value] = length
        filled[:, table.IS_ALIGNED.value] = (filled[:, _POINTERS] % 16 == 0).all(1)
        chunks = divided_up(numel, reduce.CHUNK.value)
        self.chunks, filled[:, table.FIRST_CHUNK.value] = _in_list_order(chunks, order)
        sum_programs = divided_up(chunks, reduce.CHUNKS.value)
        filled[:, table.FIRST_SUM_PROGRAM.value] = np.cumsum(sum_programs) - sum_programs
        self.sum_programs = int(sum_programs.sum())

        blocks = numel // np.maximum(length, 1) * divided_up(length, BLOCK.value)
        block_chunks = divided_up(blocks, reduce.CHUNK.value)
        self.block_chunks, filled[:, table.FIRST_OF_BLOCK_CHUNKS.value] = _in_list_order(block_chunks, order)
        room = 2 * divided_up(blocks, reduce.LANES.value) * reduce.LANES.value  # as updates.room_of
        filled[:, table.FIRST_BLOCK_SUM.value] = np.cumsum(room) - room
        self.block_sums = int(room.sum())

        programs = divided_up(blocks, _PROGRAM)
        begins = np.flatnonzero(np.diff(rule, prepend=-1) | np.diff(formats, prepend=-1))
        self.launches = []
        # How tensors are cut up for sums, row by row, if a rule asks for that.
        self.cuts = None
        if any(RULES[name].normalizing for name in names):
            self.cuts = np.zeros((len(rows), table.CUT_WIDTH.value), np.int64)
            self.cuts[:, : given.shape[1]] = given[order]
        for first, last in zip(begins.tolist(), [*begins[1:].tolist(), len(rows)]):
            until = np.cumsum(programs[first:last])
            filled[first:last, table.FIRST_PROGRAM.value] = until - programs[first:last]
            name, cuts = names[rule[first]], None
            normalizing = RULES[name].normalizing
            if self.cuts is not None and normalizing is not None:
                cuts = passes.Cuts.fill(self.cuts[first:last], filled[first:last], normalizing.second)
            self.launches.append(Launch(name, int(formats[first]), first, last, int(until[-1]), cuts))
        self.rows = filled

    def of_rules(self) -> list[tuple[str, int, int]]:
        """Each rule with its rows."""
        found: dict[str, tuple[str, int, int]] = {}
        for launch in self.launches:
            first = found.get(launch.rule, (launch.rule, launch.first, 0))[1]
            found[launch.rule] = (launch.rule, first, launch.last)
        return list(found.values())


def _in_list_order(counts: passes.Numbers, order: passes.Numbers) -> tuple[int, passes.Numbers]:
    """Numbers through what tensors have `counts` of, in list order.

    `order` is where each tensor stands in the list. Returns how many there are, and the first number of each tensor.
    """
    listed = np.empty_like(counts)
    listed[order] = counts
    until = np.cumsum(listed)
    return int(listed.sum()), (until - listed)[order]


def _numbers(given: bytes, width: int) -> passes.Numbers:
    return np.frombuffer(given, np.int64).reshape(-1, width)


def group_rows(
    names: Sequence[str],
    hypers: Sequence[dict[str, float]],
    seeds: Sequence[int],
    grad_multipliers: Sequence[float],
    lrs: Sequence[Tensor | None],
    max_grad_norm: float | None,
    skip_step_above: float | None,
) -> np.ndarray[Any, Any]:
    """The table of param groups."""
    filled = np.zeros((len(names), table.GROUP_WIDTH.value), np.int64)
    numbers = filled.view(np.float64)
    for i, (name, hyper, seed, multiplier, lr) in enumerate(zip(names, hypers, seeds, grad_multipliers, lrs)):
        filled[i, table.LR.value] = 0 if lr is None else lr.data_ptr()
        filled[i, table.LR_IS_DOUBLE.value] = lr is not None and lr.dtype == torch.float64
        filled[i, table.SEED.value] = seed
        numbers[i, table.SIGN.value] = multiplier
        numbers[i, table.MAX_GRAD_NORM.value] = max_grad_norm or 0.0
        numbers[i, table.SKIP_ABOVE.value] = np.inf if skip_step_above is None else skip_step_above
        config = RULES[name].config
        numbers[i, table.CONFIG.value : table.CONFIG.value + len(config)] = [hyper[key] for key in config]
    return filled


def square_sums(plan: Plan, rows: Tensor) -> Tensor:
    """The sums of squares of all gradients, one for each chunk, in list order."""
    sums = torch.empty(plan.chunks, dtype=torch.float64, device=rows.device)
    if plan.sum_programs > 0:
        reduce.square_sum_kernel[(plan.sum_programs,)](rows, sums, len(rows), **OPTIONS)
    return sums


def pairwise_sum(sums: Tensor) -> Tensor:
    """Their sum in pairs, of one element."""
    if len(sums) == 0:
        return torch.zeros(1, dtype=torch.float64, device=sums.device)
    while len(sums) > 1:
        count = divided_up(len(sums), reduce.PAIRS.value)
        added = torch.empty(count, dtype=torch.float64, device=sums.device)
        reduce.pairwise_kernel[(divided_up(count, reduce.ROWS.value),)](sums, added, len(sums), **OPTIONS)
        sums = added
    return sums


def update_sums(plan: Plan, rows: Tensor, block_sums: Tensor) -> Tensor:
    """The sums of squares of all updates and weights: (2, chunks), in list order; `block_sums` is what steps stored."""
    sums = torch.empty((2, plan.block_chunks), dtype=torch.float64, device=rows.device)
    if plan.sum_programs > 0:
        grid = (plan.sum_programs, 2)
        updates.update_sum_kernel[grid](rows, block_sums, sums, len(rows), plan.block_chunks, **OPTIONS)
    return sums


def take_step(
    plan: Plan,
    rows: Tensor,
    cuts: Tensor | None,
    groups: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    norm: Tensor | None,
    *,
    sums_updates: bool = False,
) -> Tensor | None:
    """Steps everything; `norm` takes the gradient norm, and gradients are clipped if it is given.

    `rows` and `cuts` are the plan's, on the device. Returns what `update_sums` does, if `sums_updates`.
    """
    square_sum = grad_norm = grad_scale
    if norm is not None:
        square_sum, grad_norm = pairwise_sum(square_sums(plan, rows)), norm
    derived = torch.empty((len(rows), table.DERIVED_WIDTH.value), dtype=torch.int32, device=rows.device)
    for name, first, last in plan.of_rules():
        prepare.prepare_kernel[(divided_up(last - first, prepare.TENSORS.value),)](
            rows[first:last],
            groups,
            derived[first:last],
            grad_scale,
            found_inf,
            square_sum,
            grad_norm,
            last - first,
            **prepare_constants(name, clips=norm is not None),
            **OPTIONS,
        )
    block_sums = None
    if sums_updates:
        block_sums = torch.empty(plan.block_sums, dtype=torch.float32, device=rows.device)
    if cuts is not None:
        workspace = passes.workspace([launch.cuts for launch in plan.launches if launch.cuts], rows.device)
    for launch in plan.launches:
        if launch.programs > 0:
            first, last = launch.first, launch.last
            if cuts is not None and launch.cuts is not None:
                arguments = (rows[first:last], cuts[first:last], groups, derived[first:last], *workspace)
                passes.take(RULES[launch.rule], launch.formats, launch.cuts, arguments, last - first, OPTIONS)
            step.step_kernel[(launch.programs,)](
                rows[first:last], derived[first:last], block_sums, last - first, **launch.step_constants(), **OPTIONS
            )
    return None if block_sums is None else update_sums(plan, rows, block_sums)
