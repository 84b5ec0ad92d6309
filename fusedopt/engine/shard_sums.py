"""Sums that a rule takes over a parameter of which ranks have parts: which ranks meet, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..reference.asking import Extent
from ..storage import placement
from .collectives import groups_of, summed
from .contract import Contract


@dataclass(frozen=True)
class ShardSums:
    """The whole of a sharded parameter, and over which groups its sums go. See backends.base.Spread."""

    extent: Extent
    is_even: bool
    row_dim: int | None
    groups: dict[str, list[Any]]

    @cached_property
    def channels(self) -> dict[str, tuple[str, ...]]:
        """The names of the groups that sums go through: torch takes microseconds to tell them."""
        return {over: tuple(group.group_name for group in groups) for over, groups in self.groups.items()}

    def channel(self, over: str) -> tuple[str, ...]:
        """The names of the groups that sums go through."""
        return self.channels[over]

    def matrices(self, held: Tensor) -> int:
        """Those in a shard: one for each index of the dimensions before that of the rows."""
        return 0 if self.row_dim is None else held.shape[: self.row_dim].numel()

    @staticmethod
    def sums(asked: Sequence[tuple[Any, str, Tensor]]) -> list[Tensor]:
        """Those of several parameters at a time: ranks meet once for each list of groups."""
        found: list[Tensor] = [numbers for _, _, numbers in asked]
        by_groups: dict[tuple[str, ...], list[int]] = {}
        for i, (spread, over, _) in enumerate(asked):
            by_groups.setdefault(spread.channel(over), []).append(i)
        for names, members in by_groups.items():
            if not names or not any(found[i].numel() for i in members):  # all here, or nothing
                continue
            spread, over, _ = asked[members[0]]
            total = summed(torch.cat([found[i].reshape(-1) for i in members]), spread.groups[over])
            for i, part in zip(members, torch.split(total, [found[i].numel() for i in members])):
                found[i] = part.reshape(found[i].shape)
        return found


# Of the specs that DTensors carry, by their ids and the dimension of rows, with the spec itself: one that has its id
# later is another.
_of_specs: dict[tuple[int, int | None], tuple[Any, ShardSums | None]] = {}


def shard_sums(optimizer: Contract, group: dict[str, Any], param: Any) -> ShardSums | None:
    """Where the sums go that a rule takes over a parameter; None if it takes none, or all of it is here."""
    spec = getattr(param, "_spec", None)  # asked of every parameter in every step, where `is_dtensor` takes its time
    if spec is None or not optimizer.takes_sums:
        return None
    key = id(spec), optimizer.row_dim(group, param)
    found = _of_specs.get(key)
    if found is None or found[0] is not spec:
        if len(_of_specs) >= 1 << 16:
            _of_specs.clear()
        found = _of_specs[key] = spec, _shard_sums(param, key[1])
    return found[1]


def _shard_sums(param: Any, row_dim: int | None) -> ShardSums | None:
    mesh, shape = param.device_mesh, param.shape
    cuts = placement.cuts(param._spec)
    if not cuts:
        return None
    rows = [i for i, dim in cuts.items() if dim == row_dim]
    columns = [i for i, dim in cuts.items() if row_dim is not None and dim > row_dim]
    extent = Extent(shape.numel())
    if row_dim is not None:
        extent = Extent(shape.numel(), shape[row_dim], shape[row_dim + 1 :].numel())
    dims = {"rows": rows, "columns": columns, "all": list(cuts)}
    groups = {over: groups_of(mesh, held) if held else [] for over, held in dims.items()}
    return ShardSums(extent, placement.is_even(param), row_dim, groups)
