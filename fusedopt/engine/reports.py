"""What an optimizer's state takes, and what goes wrong quietly in its steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor, float32

from .. import checks
from ..backends.base import HEALTH_COUNTS, Health
from ..offload.homes import PLACES, is_moved, moved_beside_states, note_of, place_of
from ..storage import masters
from ..storage.state import EIGHT_BIT, Slot, StateSpec, requested_format, slots_of, why_not_quantized
from .contract import Contract
from .sharding import local


def _members(optimizer: Contract) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for param in dict.fromkeys(group["params"]):  # once, however often it is listed
            yield group, param


def _unquantized(optimizer: Contract) -> Iterator[tuple[Tensor, StateSpec, str]]:
    """(parameter, state, why not) for every state that 8 bits are asked for; why not is empty if it gets them."""
    for group, param in _members(optimizer):
        for spec in optimizer.states_of(group, param):
            if requested_format(spec, group["state_dtype"]) == EIGHT_BIT:
                yield param, spec, why_not_quantized(spec, group, param)


def warn_if_nothing_is_quantized(optimizer: Contract) -> None:
    """Warns, once, if 8-bit state is asked for and no parameter can have it."""
    if optimizer.has_warned:
        return
    reasons = [reason for _, _, reason in _unquantized(optimizer)]
    if reasons and all(reasons):
        optimizer.has_warned = True
        found = ", ".join(dict.fromkeys(reasons))
        warnings.warn(
            f"state_dtype='8bit' changes nothing here: no parameter can have it ({found}); "
            "its states stay float32. See memory_report()",
            stacklevel=checks.callers_level(),
        )


# ---- tables ------------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line: list[str]) -> str:
        cells = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text(head), rule, *(text(line) for line in lines[1:])])


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


# ---- memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by kind: parameters, gradients, each state, masters.

    Attributes:
        numel: Elements of all parameters, held here.
        ours: Bytes by kind.
        torch: Bytes by kind of the same run with torch.optim, which keeps states in the parameter's dtype.
        unquantized: Why states that 8 bits are asked for are kept in float32: {reason: (states, elements)}.
        places: Bytes of states, masters and step counts by where they are: "device" for a GPU, "host" and "disk". A
            step reads all that is on the disk, and writes it again.
        moved_bytes: What a step copies between a GPU and the host, both ways together.
        notes: What was asked for and changes nothing.
    """

    numel: int
    ours: dict[str, int]
    torch: dict[str, int]
    unquantized: dict[str, tuple[int, int]]
    places: dict[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of states and masters together."""
        return sum(size for kind, size in self.ours.items() if kind not in ("parameters", "gradients"))

    @property
    def bytes_per_param(self) -> dict[str, float]:
        """Bytes per parameter by kind."""
        return {kind: size / max(1, self.numel) for kind, size in self.ours.items()}

    def __str__(self) -> str:
        n = max(1, self.numel)

        def row(kind: str, ours: int, theirs: int) -> list[str]:
            return [kind, f"{ours / n:.3f}", _size(ours), f"{theirs / n:.3f}", _size(theirs)]

        kinds = dict.fromkeys([*self.ours, *self.torch])
        rows = [row(kind, self.ours.get(kind, 0), self.torch.get(kind, 0)) for kind in kinds]
        rows.append(row("total", sum(self.ours.values()), sum(self.torch.values())))
        text = table(["", "B/param", "here", "B/param", "torch"], rows)
        for reason, (states, elements) in self.unquantized.items():
            text += f"\nnot in 8 bits, {states} states of {elements:,} elements: {reason}"
        where = ", ".join(f"{_size(size)} on the {place}" for place, size in self.places.items() if size > 0)
        if self.moved_bytes or self.places.get("disk"):
            text += f"\nstates and step counts: {where}"
        if self.moved_bytes:
            text += f"\na step moves {_size(self.moved_bytes)}, {self.moved_bytes / n:.2f} B/param"
        if filed := self.places.get("disk"):
            text += f"\na step reads from files {_size(filed)}, and writes as much to them"
        return "\n".join([f"{self.numel:,} parameters", text, *self.notes])


def memory_report(optimizer: Contract) -> MemoryReport:
    """See Contract.memory_report."""
    ours: dict[str, int] = {"parameters": 0, "gradients": 0}
    theirs = dict(ours)
    numel = moved = 0
    places = dict.fromkeys(PLACES, 0)
    notes: dict[str, None] = {}

    def count(kinds: dict[str, int], kind: str, size: int) -> None:
        kinds[kind] = kinds.get(kind, 0) + size

    for group, param in _members(optimizer):
        here = local(param)
        own = here.numel() * here.element_size()
        numel += here.numel()
        held = optimizer.state.get(param, {})
        for kinds in (ours, theirs):
            count(kinds, "parameters", own)
            if param.requires_grad:
                grad = here.element_size() if param.grad is None else param.grad.element_size()
                count(kinds, "gradients", here.numel() * grad)
        kept = [(slot, held.get(slot.key)) for slot in _slots(optimizer, group, param)]
        for slot, tensor in kept:
            place = place_of(group, here, slot, None if tensor is None else local(tensor))
            size = slot.shape.numel() * slot.dtype.itemsize
            places[place] += size
            moved += 2 * size if is_moved(group, here, place) else 0
        moved += moved_beside_states(group, here)
        if note := note_of(group, here):
            notes[note] = None
        for spec in optimizer.states_of(group, param):
            keys = spec.keys_in(held)
            made = sum(local(held[key]).numel() * held[key].element_size() for key in keys)
            planned = sum(slot.shape.numel() * slot.dtype.itemsize for slot in slots_of(spec, group, param, here))
            count(ours, spec.name, made if keys else planned)
            count(theirs, spec.name, spec.shape_for(here.shape).numel() * here.element_size())
        master = masters.slot_of(group, param, here)
        if master is not None:
            count(ours, master.key, master.shape.numel() * master.dtype.itemsize)
    if optimizer._release is not None:
        ours["gradients"] = min(ours["gradients"], optimizer._release.gradient_bytes())
    unquantized: dict[str, tuple[int, int]] = {}
    for param, spec, reason in _unquantized(optimizer):
        if reason:
            states, elements = unquantized.get(reason, (0, 0))
            unquantized[reason] = (states + 1, elements + spec.shape_for(local(param).shape).numel())
    return MemoryReport(numel, ours, theirs, unquantized, places, moved, tuple(notes))


def _slots(optimizer: Contract, group: dict[str, Any], param: Tensor) -> Iterator[Slot]:
    """The tensors of a parameter's state, as a group wants them."""
    here = local(param)
    yield Slot("step", Size(), Size(), float32)
    for spec in optimizer.states_of(group, param):
        yield from slots_of(spec, group, param, here)
    master = masters.slot_of(group, param, here)
    if master is not None:
        yield master


# ---- health ------------------------------------------------------------------------------------------

_MEANINGS = {
    "stalled": "weights that their gradient did not move",
    "nonfinite_grads": "gradients that were inf or NaN",
    "saturated_codes": "8-bit codes at the end of their range",
    "nonfinite_blocks": "8-bit blocks that hold inf or NaN",
    "skipped": "weights left as they were (skip_block)",
}


_SHOWN = 8


@dataclass(frozen=True)
class NonfiniteGradient:
    """A parameter whose gradient was inf or NaN in some steps.

    Attributes:
        where: Its name, or "parameter 3 of group 0".
        elements: How many elements of it were, over all steps.
        steps: In how many steps some were.
        first_step: The first of these steps, of those that are counted, from 1.
    """

    where: str
    elements: int
    steps: int
    first_step: int


@dataclass(frozen=True)
class HealthReport:
    """Counts over some steps.

    A weight counts as stalled if its gradient was not 0 and what is stored of it, its master included, was
    the same after the step. Rounded stochastically weights stand still most of the time and are right on
    average; rounded to nearest the same count is training that does not happen. The largest element of a
    block may well have the last code; more than about one code in 64 there points to a pathological block.

    Attributes:
        steps: Steps counted.
        elements: Elements stepped, over all steps.
        totals: Each count over all parameters.
        by_parameter: Each parameter's counts, by name or "group.position".
        nonfinite: Whose gradients were inf or NaN, those that were so first before the others, and of a step those with
            the most elements. If all of them became so in one step, the loss was not finite.
    """

    steps: int
    elements: int
    totals: dict[str, int]
    by_parameter: dict[str, dict[str, int]]
    nonfinite: tuple[NonfiniteGradient, ...] = ()

    def __str__(self) -> str:
        of = {"saturated_codes": self.totals["codes"], "nonfinite_blocks": max(1, -(-self.totals["codes"] // 64))}
        rows = []
        for name, meaning in _MEANINGS.items():
            share = self.totals[name] / max(1, of.get(name, self.elements))
            rows.append([meaning, f"{self.totals[name]:,}", f"{share:.2%}"])
        text = f"{self.steps} steps, {self.elements:,} elements\n" + table(["", "count", "share"], rows)
        if self.nonfinite:
            head = ["gradients that were inf or NaN", "elements", "steps", "first in step"]
            found = [[f.where, f"{f.elements:,}", f"{f.steps:,}", f"{f.first_step:,}"] for f in self.nonfinite[:_SHOWN]]
            text += "\n\n" + table(head, found)
            if len(self.nonfinite) > _SHOWN:
                text += f"\nand {len(self.nonfinite) - _SHOWN:,} more parameters, in `nonfinite` of the report"
        return text


@dataclass
class HealthRecord:
    """Adds up what steps counted."""

    optimizer: Contract
    steps: int = 0
    elements: int = 0
    counts: Health = field(default_factory=dict)
    nonfinite: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # the first step, and how many

    def add(self, counted: Health) -> None:
        self.steps += 1
        for key, counts in counted.items():
            self.elements += self.optimizer.param_groups[key[0]]["params"][key[1]].numel()
            total = self.counts.setdefault(key, dict.fromkeys(counts, 0))
            for name, number in counts.items():
                total[name] += number
            if counts["nonfinite_grads"]:
                first, steps = self.nonfinite.get(key, (self.steps, 0))
                self.nonfinite[key] = (first, steps + 1)

    def report(self) -> HealthReport:
        totals = {name: sum(counts[name] for counts in self.counts.values()) for name in HEALTH_COUNTS}
        by_parameter = {self._label(*key): dict(counts) for key, counts in self.counts.items()}
        found = [
            NonfiniteGradient(self._where(*key), self.counts[key]["nonfinite_grads"], steps, first)
            for key, (first, steps) in sorted(self.nonfinite.items())
        ]
        found.sort(key=lambda gradient: (gradient.first_step, -gradient.elements))  # stable: then as they are listed
        return HealthReport(self.steps, self.elements, totals, by_parameter, tuple(found))

    def _name(self, group: int, position: int) -> str | None:
        names = self.optimizer.param_groups[group].get("param_names")
        return names[position] if names else None

    def _where(self, group: int, position: int) -> str:
        return self._name(group, position) or f"parameter {position} of group {group}"

    def _label(self, group: int, position: int) -> str:
        return self._name(group, position) or f"{group}.{position}"
