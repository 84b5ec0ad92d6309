"""How far a step has moved weights: norms of updates beside those of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..backends.base import SquareSums
from .collectives import Meshes, groups_of, summed
from .contract import Contract
from .reports import table

_SHOWN = 8


@dataclass(frozen=True)
class Norms:
    """Of a parameter, or of a param group.

    Attributes:
        where: The parameter's name, "parameter 3 of group 0", or "group 0".
        update: Euclidean norm of the update: of the new weights less the old.
        weight: Euclidean norm of the new weights.
        elements: How many weights there are.
    """

    where: str
    update: float
    weight: float
    elements: int

    @property
    def ratio(self) -> float:
        """The norm of the update over that of the weights; infinite if these are all 0 and have moved."""
        return self.update / self.weight if self.weight else math.inf if self.update else 0.0


@dataclass(frozen=True)
class NormsReport:
    """How far a step has moved weights.

    Weights are those that parameters stand for, what they keep beside them (master weights) included. Of a DTensor
    they are those of all its shards, each replica counted once, and every rank has the same report. A parameter without
    a gradient has not moved, and does not count.

    Attributes:
        total: Of everything that was stepped.
        groups: Of each param group.
        parameters: Of each parameter, as the param groups list them.
    """

    total: Norms
    groups: tuple[Norms, ...]
    parameters: tuple[Norms, ...]

    def worst(self, count: int = _SHOWN) -> list[Norms]:
        """The parameters with the largest update for their weights."""
        return sorted(self.parameters, key=lambda each: -each.ratio)[:count]

    def __str__(self) -> str:
        shown = [self.total, *(self.groups if len(self.groups) > 1 else ()), *self.worst()]
        rows = [[each.where, f"{each.update:.3g}", f"{each.weight:.3g}", f"{each.ratio:.3g}"] for each in shown]
        return table(["norms", "update", "weights", "ratio"], rows)


class NormsRecord:
    """Takes the norms of steps.

    Attributes:
        sums: What a step, or the parts that it is taken in, fill with sums of squares.
        report: Of the last step that was taken; None before there is one.
    """

    def __init__(self, optimizer: Contract) -> None:
        self._optimizer = optimizer
        self.sums: SquareSums = {}
        self.report: NormsReport | None = None

    def end(self) -> None:
        """Makes the report of the step; ranks that share parameters meet here."""
        groups = self._optimizer.param_groups
        meshes = self._optimizer._agreement().meshes(self._optimizer)
        if meshes is not None:
            self.sums.update(over_ranks(meshes, self.sums))
        by_group: list[list[tuple[Norms, tuple[float, float]]]] = [[] for _ in groups]
        for (index, position), sums in sorted(self.sums.items()):
            group = groups[index]
            names = group.get("param_names")
            where = names[position] if names else f"parameter {position} of group {index}"
            by_group[index].append((_norms(where, [sums], group["params"][position].numel()), sums))
        found = [
            _norms(f"group {i}", [sums for _, sums in of], sum(each.elements for each, _ in of))
            for i, of in enumerate(by_group)
        ]
        everything = [pair for of in by_group for pair in of]
        total = _norms("all", [sums for _, sums in everything], sum(each.elements for each, _ in everything))
        self.report = NormsReport(total, tuple(found), tuple(each for each, _ in everything))
        self.sums = {}


def over_ranks(meshes: Meshes, here: SquareSums) -> SquareSums:
    """The sums over all shards of the parameters that are on meshes; ranks meet once for each mesh.

    Of replicas those of one rank count. What is gathered has the same length on every rank, whatever it holds.
    """
    found: SquareSums = {}
    taken_here = {place: (1.0, *sums) for place, sums in here.items()}
    for mesh, places in meshes.meshes.items():
        rows = meshes.counted(mesh, places, taken_here, (0.0, 0.0, 0.0))
        totals = summed(torch.tensor(rows, dtype=torch.float64, device="cpu"), groups_of(mesh))
        for place, (taken, update, weight) in zip(places, totals.tolist()):
            if taken:
                found[place] = update, weight
    return found


def _norms(where: str, sums: Iterable[tuple[float, float]], elements: int) -> Norms:
    update = weight = 0.0
    for of_update, of_weight in sums:
        update += of_update
        weight += of_weight
    return Norms(where, math.sqrt(update), math.sqrt(weight), elements)
