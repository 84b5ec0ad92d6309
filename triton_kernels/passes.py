"""The host's part in the sums that come before a step of rules that normalize: how tensors are cut up, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import prepare, reduce, sums, table, vector_sums
from .normalize import MOMENTS
from .rules import Rule

_ALIGNED = 16  # numbers: each tensor's begin at a multiple of this

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Pass:
    """A kernel over tensors; the row of cuts of each has its first program at `first`."""

    kernel: Any
    first: int
    constants: dict[str, Any]


def passes(rule: Rule, formats: int) -> list[Pass]:
    """What is launched between a rule's moments and the rest of what it derives, in this order."""
    normalizing = rule.normalizing
    assert normalizing is not None
    stored = formats & 0xFFF  # without roundings and states
    eps = {"EPS": normalizing.eps}
    parts, rows = table.FIRST_OF_PARTS.value, table.FIRST_OF_ROWS.value
    if normalizing.quotient is None:
        second = (formats >> (13 + 3 * normalizing.second)) & 7
        constants = {"GRAD": (formats >> 3) & 7, "SECOND": second, "STATE": normalizing.second}
        return [Pass(vector_sums.quotient_kernel, parts, constants)]
    if normalizing.second >= 0:
        return [Pass(vector_sums.vector_kernel, parts, {**eps, "FORMATS": stored})]
    grad = {"GRAD": (formats >> 3) & 7}
    return [
        Pass(sums.row_sum_kernel, parts, grad),
        Pass(sums.row_average_kernel, rows, eps),
        Pass(sums.column_sum_kernel, table.FIRST_OF_STRIPS.value, grad),
        Pass(sums.column_average_kernel, table.FIRST_OF_COLUMNS.value, eps),
        Pass(sums.mean_kernel, table.FIRST_OF_MATRICES.value, {}),
        Pass(sums.row_factor_kernel, rows, {}),
        Pass(sums.part_sum_kernel, parts, {"FORMATS": stored}),
        Pass(sums.unit_sum_kernel, table.FIRST_OF_UNITS.value, {}),
    ]


def finish_constants(rule: Rule) -> dict[str, Any]:
    """What `finish_kernel` is compiled for."""
    return {"DERIVE": rule.derive, "CONFIG": len(rule.config), "HYPER": rule.hyper - MOMENTS.value}


@dataclass(frozen=True)
class Cuts:
    """How the tensors of a launch are cut up.

    Attributes:
        programs: How many programs each pass has, by its `first`.
        doubles: How many float64 numbers they need.
        floats: How many float32 numbers they need.
    """

    programs: dict[int, int]
    doubles: int
    floats: int

    @classmethod
    def fill(cls, cuts: Numbers, rows: Numbers, second: int) -> Cuts:
        """Fills the table of these tensors' cuts; `second` is the state that holds their second moment, or -1."""
        row_count, column_count = rows[:, table.ROW_COUNT.value], rows[:, table.COLUMN_COUNT.value]
        matrices, slabs, panels = (cuts[:, word.value] for word in (table.MATRICES, table.SLABS, table.PANELS))
        chunks = np.where(row_count > 0, 0, divided_up(rows[:, table.NUMEL.value], reduce.CHUNK.value))  # of vectors
        lines, columns = matrices * row_count, matrices * column_count
        units = matrices * slabs * panels + chunks
        for word, numbers in (
            (table.UNITS, units),
            (table.WEIGHED, matrices + chunks),
            (table.SECOND, rows[:, table.STATES.value + second] if second >= 0 else 0),
        ):
            cuts[:, word.value] = numbers

        doubles = floats = 0
        for word, sizes in (
            (table.ROW_SUMS, lines * panels),
            (table.WEIGHT_SUMS, lines * panels),
            (table.COLUMN_SUMS, slabs * columns),
            (table.WEIGHTED_SUMS, slabs * columns),
            (table.PARAM_SUMS, units),
            (table.UPDATE_SUMS, units),
        ):
            doubles = _place(cuts, word.value, sizes, doubles)
        for word, sizes in ((table.ROW_FACTORS, lines), (table.COLUMN_FACTORS, columns), (table.MEANS, matrices)):
            floats = _place(cuts, word.value, sizes, floats)

        programs = {}
        for word, counts in (
            (table.FIRST_OF_PARTS, divided_up(lines * panels + chunks, reduce.CHUNKS.value)),
            (table.FIRST_OF_ROWS, divided_up(lines, sums.AVERAGED_ROWS.value)),
            (table.FIRST_OF_STRIPS, matrices * slabs * divided_up(column_count, sums.STRIP.value)),
            (table.FIRST_OF_COLUMNS, divided_up(columns, sums.AVERAGED_COLUMNS.value)),
            (table.FIRST_OF_MATRICES, matrices),
            (table.FIRST_OF_UNITS, divided_up(units, sums.SUMMED_UNITS.value)),
        ):
            until = np.cumsum(counts)
            cuts[:, word.value] = until - counts
            programs[word.value] = int(until[-1])
        return cls(programs, doubles, floats)


def divided_up(a: Any, b: Any) -> Any:
    """Of integers, or arrays of them."""
    return -(-a // b)


def _place(cuts: Numbers, word: int, sizes: Numbers, begin: int) -> int:
    """Gives each tensor a place of its size from `begin` on. Returns where the next place may begin."""
    sizes = divided_up(sizes, _ALIGNED) * _ALIGNED
    until = np.cumsum(sizes)
    cuts[:, word] = begin + until - sizes
    return begin + int(until[-1])


def workspace(cuts: Sequence[Cuts], device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory that serves launches one after the other."""
    sizes = [(each.doubles, each.floats) for each in cuts]
    doubles, floats = (max(kind) for kind in zip(*sizes))
    return (
        torch.empty(doubles, dtype=torch.float64, device=device),
        torch.empty(floats, dtype=torch.float32, device=device),
    )


def take(rule: Rule, formats: int, cuts: Cuts, arguments: tuple[Tensor, ...], count: int, options: Any) -> None:
    """Launches everything; sums.py describes the `arguments`."""
    for each in passes(rule, formats):
        if cuts.programs[each.first] > 0:
            each.kernel[(cuts.programs[each.first],)](*arguments, count, **each.constants, **options)
    prepare.finish_kernel[(count,)](*arguments, count, **finish_constants(rule), **options)
