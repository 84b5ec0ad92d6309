"""What the ranks of a step tell each other: sums over all shards, and whether they are about to do the same.

Numbers are gathered and added in the order of the ranks, so that every rank gets the same bits. What is gathered has a
length that no gradient changes, and comes with a hash of what decides on a step: ranks that disagree all find out and
raise the same error, where otherwise they would wait for each other.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..reference.norm import numbers
from . import sharding, spread
from .contract import Contract

T = TypeVar("T")

_DISAGREED = -1.0  # in the place of a hash

# What of a param group decides whether ranks gather anything, and in which formats they step.
_AGREED = (
    "max_grad_norm",
    "skip_step_above",
    "state_dtype",
    "state_rounding",
    "min_quantized_numel",
    "master_weights",
    "rounding",
    "seed",
    "maximize",
)


def _distributed() -> Any | None:
    """torch.distributed, if this process has joined others."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


# ---- gathering ---------------------------------------------------------------------------------------


def groups_of(mesh: Any, dims: Sequence[int] | None = None) -> list[Any]:
    """The process groups to go through, one after the other, to reach all of a mesh, or all along some of its dims.

    Those of a single rank are left out: it would tell itself what it knows.
    """
    dist: Any = _distributed()
    long = [dim for dim in (range(mesh.ndim) if dims is None else dims) if mesh.size(dim) > 1]
    if dims is None and len(long) > 1 and mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]  # at once
    return [mesh.get_group(dim) for dim in long]


def gathered(row: Tensor, group: Any) -> Tensor:
    """What every member of a group has for `row`, one below the other in the order of ranks, where `row` is."""
    dist: Any = _distributed()
    device = torch.device("cuda") if "nccl" in dist.get_backend(group) else torch.device("cpu")
    mine = row.to(device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    return torch.stack(rows).to(row.device)


def summed(row: Tensor, groups: Iterable[Any]) -> Tensor:
    """The sum of `row` over all members of groups that are gone through one after the other."""
    for group in groups:
        rows = gathered(row, group)
        row = rows[0]
        for other in rows[1:]:
            row = row + other
    return row


class _Row(NamedTuple):
    """What a rank tells in a step; all as doubles, in which hashes of 48 bits are exact."""

    hash: float  # of what is to be done
    grads: float  # of which parameters have gradients
    found_inf: float
    plain: float  # the sum of squares of gradients that are no DTensors: every rank takes that of the first
    sums: tuple[float, ...]  # sums of squares of gradients that are, by explicit group, those without one first

    def over(self, groups: Iterable[Any]) -> _Row:
        """What all members of groups tell."""
        row = self
        for group in groups:
            flat = torch.tensor([*row[:4], *row.sums], dtype=torch.float64, device="cpu")
            rows = gathered(flat, group).tolist()
            first = rows[0]
            same = [first[k] if all(other[k] == first[k] for other in rows) else _DISAGREED for k in (0, 1)]
            sums = tuple(_ordered_sum(other[k] for other in rows) for k in range(4, len(first)))
            row = _Row(same[0], same[1], max(other[2] for other in rows), first[3], sums)
        return row


def _ordered_sum(values: Iterable[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


# ---- one optimizer's ranks ---------------------------------------------------------------------------


class Meshes:
    """The meshes that an optimizer's parameters are on, and the explicit groups that their norm is summed over.

    Args:
        param_groups: Of the optimizer. It is looked at anew in every step: parameters may be swapped.
    """

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        meshes: dict[Any, list[tuple[int, int]]] = {}  # where the parameters of each are listed
        self.groups: list[Any] = []
        self.plain: list[tuple[int, int]] = []  # where parameters that are no DTensors are listed
        for index, group in enumerate(param_groups):
            explicit = group["grad_norm_group"]
            if explicit is not None and explicit not in self.groups:
                self.groups.append(explicit)
            for position, param in enumerate(group["params"]):
                if sharding.is_dtensor(param):
                    meshes.setdefault(param.device_mesh, []).append((index, position))
                else:
                    self.plain.append((index, position))
        # The largest first: all ranks of the others are most often in it, and know from it what to do.
        self.meshes = dict(sorted(meshes.items(), key=lambda item: -item[0].size()))
        self._param_groups = param_groups
        self._on: dict[Any, list[Tensor]] = {}  # the parameters themselves

    def __bool__(self) -> bool:
        return bool(self.meshes or self.groups)

    def at(self, place: tuple[int, int]) -> Tensor:
        """The parameter that is listed at a place."""
        index, position = place
        param: Tensor = self._param_groups[index]["params"][position]
        return param

    def listed(self, mesh: Any) -> list[tuple[int, int]]:
        """Whose gradients ranks of a mesh sum up: its own parameters', and on the first of meshes those of plain ones.

        Of what is no DTensor every rank takes the sum of the first.
        """
        return [*self.meshes[mesh], *(self.plain if mesh == next(iter(self.meshes)) else [])]

    def has_grads(self, mesh: Any) -> bytes:
        """Whether each of a mesh's parameters has a gradient."""
        if mesh not in self._on:  # looked up once: it is asked in every step
            self._on[mesh] = [self.at(place) for place in self.meshes[mesh]]
        return bytes([param.grad is not None for param in self._on[mesh]])

    @staticmethod
    def counts_here(mesh: Any, param: Any) -> bool:
        """Whether this rank is the one of a parameter's replicas whose numbers count in a sum over a mesh.

        What is no DTensor is the same on all ranks of the mesh.
        """
        coordinate = mesh.get_coordinate()
        if not sharding.is_dtensor(param):
            return not any(coordinate)
        return all(place == 0 or p.is_shard() or _is_strided(p) for place, p in zip(coordinate, param.placements))

    def counted(
        self, mesh: Any, places: Iterable[tuple[int, int]], here: dict[tuple[int, int], T], nothing: T
    ) -> list[T]:
        """What this rank adds to sums over a mesh: what it has `here` where that counts, else `nothing`."""
        return [
            here[place] if place in here and self.counts_here(mesh, self.at(place)) else nothing for place in places
        ]

    def settings(self, mesh: Any, rules: list[str]) -> dict[str, Any]:
        """What all ranks of a mesh must have in common, by what it is called."""
        found: dict[str, Any] = {}
        for index, position in self.meshes[mesh]:
            group = self._param_groups[index]
            if f"the optimizer of group {index}" not in found:
                found[f"the optimizer of group {index}"] = rules[index]
                found.update({f"{key} of group {index}": group[key] for key in _AGREED})
            param: Any = group["params"][position]
            where = f"parameter {position} of group {index}"
            found[f"the dtype of {where}"] = str(param.dtype)
            found[f"the shape of {where}"] = tuple(param.shape)
            found[f"the placements of {where}"] = str(tuple(param.placements))
        found["the number of parameters"] = len(self.meshes[mesh])
        return found


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"  # in some versions no Shard


def _hash(what: object) -> float:
    return float(int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:6], "big"))


class Agreement:
    """What an optimizer has told the other ranks, and when it has to again. It lives as long as the optimizer."""

    def __init__(self) -> None:
        self._key: object = None
        self._hashes: dict[Any, float] = {}
        self._meshes: Meshes | None = None
        self._specs: list[Any] = []  # kept, so that no other has the id of one in the key

    def meshes(self, optimizer: Contract) -> Meshes | None:
        """Where the numbers of a step are; None if they are all here. Raises if the ranks disagree on the step.

        They compare what they are about to do whenever one of them has another list of parameters or other options.
        """
        if _distributed() is None:
            return None
        groups = optimizer.param_groups
        # Where the parameters and what they are spread by are the same, so are their meshes.
        key = [
            (
                *map(repr, map(group.get, _AGREED)),
                id(group["grad_norm_group"]),
                *map(id, group["params"]),
                *(id(getattr(param, "_spec", None)) for param in group["params"]),
            )
            for group in groups
        ]
        if key == self._key and not self._hashes and not any(group["grad_norm_group"] for group in groups):
            return None
        if key == self._key and self._meshes is not None:
            return self._meshes
        meshes = Meshes(groups)
        if key != self._key:
            spread.refuse_unknown(groups)
            self._hashes = {}
            rules = [f"{type(optimizer).__name__} ({optimizer.rule(group)})" for group in groups]
            told = {mesh: meshes.settings(mesh, rules) for mesh in meshes.meshes}
            for mesh, settings in told.items():
                hashed = _hash(settings)
                # As long as that of a norm: ranks of which only some compare then find out, too.
                is_whole = optimizer._release is not None and self._key is not None
                none = (0.0,) * (len(meshes.listed(mesh)) if is_whole else 1 + len(meshes.groups))
                row = _Row(hashed, _grads_hash(meshes, mesh), 0.0, 0.0, none)
                self._check(meshes, mesh, row.over(groups_of(mesh)), settings)
                self._hashes[mesh] = hashed
            self._key = key
            self._specs = [getattr(param, "_spec", None) for group in groups for param in group["params"]]
        self._meshes = meshes if meshes else None
        return self._meshes

    def total(
        self, optimizer: Contract, meshes: Meshes, sums: dict[tuple[Any, Any], float], found_inf: float
    ) -> tuple[float, float]:
        """The sum of squares of all gradients, wherever they are, and whether one was found not to be finite anywhere.

        Args:
            optimizer: Whose step it is.
            meshes: Its.
            sums: Of squares here, by (mesh or None, explicit group or None).
            found_inf: Not 0 if a gradient was found not to be finite here.
        """
        explicit = [None, *meshes.groups]
        by_group = {group: sums.get((None, group), 0.0) for group in explicit}
        for i, mesh in enumerate(meshes.meshes):
            here = tuple(sums.get((mesh, group), 0.0) for group in explicit)
            row = _Row(self._hashes[mesh], _grads_hash(meshes, mesh), found_inf, by_group[None], here)
            row = row.over(groups_of(mesh))
            self._check(meshes, mesh, row, None, optimizer)
            found_inf = row.found_inf
            if i == 0:
                by_group[None] = row.plain
            for group, value in zip(explicit, row.sums):
                by_group[group] += value
        for group in meshes.groups:
            limits = {"max_grad_norm": optimizer.common_max_grad_norm()}
            if optimizer.common_skip_step_above() is not None:
                limits["skip_step_above"] = optimizer.common_skip_step_above()
            agreed = _hash(limits)
            row = _Row(agreed, 0.0, found_inf, 0.0, (by_group[group],)).over([group])
            if row.hash == _DISAGREED:
                self._raise(limits, [group])
            found_inf, by_group[group] = row.found_inf, row.sums[0]
        return _ordered_sum(by_group.values()), found_inf

    def whole_sums(
        self, optimizer: Contract, meshes: Meshes, sums: dict[tuple[int, int], float]
    ) -> dict[tuple[int, int], float]:
        """The sum of squares of each whole gradient, the same on every rank.

        Args:
            optimizer: Whose step it is.
            meshes: Its.
            sums: Of squares of what is here, by where the parameter is listed. Some parameters are enough; ranks that
                share them are to ask for the same.
        """
        found: dict[tuple[int, int], float] = {}
        for mesh in meshes.meshes:
            listed = meshes.listed(mesh)
            asked = bytes(place in sums for place in listed)
            if not any(asked):
                continue
            # As long as there are parameters: ranks that ask for others find out, and do not wait for each other.
            here = tuple(meshes.counted(mesh, listed, sums, 0.0))
            row = _Row(self._hashes[mesh], float(zlib.crc32(asked)), 0.0, 0.0, here).over(groups_of(mesh))
            self._check(meshes, mesh, row, None, optimizer)
            found |= {place: total for place, total in zip(listed, row.sums) if place in sums}
        return found

    def _check(
        self,
        meshes: Meshes,
        mesh: Any,
        row: _Row,
        settings: dict[str, Any] | None,
        optimizer: Contract | None = None,
    ) -> None:
        if _DISAGREED not in (row.hash, row.grads):
            return
        self._key = None  # to be compared again, whatever changes until then
        told = settings or {}
        if row.hash == _DISAGREED and settings is None and optimizer is not None:
            rules = [f"{type(optimizer).__name__} ({optimizer.rule(group)})" for group in optimizer.param_groups]
            told = meshes.settings(mesh, rules)
        if row.hash != _DISAGREED:
            places = meshes.meshes[mesh]
            told = {
                f"the gradient of parameter {position} of group {index}": "one" if has else "none"
                for (index, position), has in zip(places, meshes.has_grads(mesh))
            }
        self._raise(told, groups_of(mesh))

    @staticmethod
    def _raise(told: dict[str, Any], groups: list[Any]) -> None:
        """Raises a ValueError that names the first difference, on every rank the same."""
        dist: Any = _distributed()
        found = {dist.get_rank(): told}
        for group in groups:
            others: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(others, found, group=group)
            found = {rank: each for other in others for rank, each in other.items()}
        first = found[min(found)]
        for name in dict.fromkeys(name for each in found.values() for name in each):
            values = {rank: each.get(name) for rank, each in sorted(found.items())}
            if any(value != first.get(name) for value in values.values()):
                listed = ", ".join(f"{value!r} on rank {rank}" for rank, value in values.items())
                raise ValueError(
                    f"ranks disagree about {name}: {listed}; all ranks that share parameters must step them in the "
                    "same way, so give them the same. Nothing has changed"
                )
        raise ValueError("ranks disagree about a step, and agree by now; take it again")


def _grads_hash(meshes: Meshes, mesh: Any) -> float:
    # Where there is nobody to compare with, thousands of parameters are not asked.
    return float(zlib.crc32(meshes.has_grads(mesh))) if mesh.size() > 1 else 0.0


def any_nonzero(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a gradient has a number other than 0, on any rank that shares the parameters."""
    grads = (param.grad for group in param_groups for param in group["params"] if param.grad is not None)
    here = any(bool(numbers(sharding.local(grad)).count_nonzero()) for grad in grads)
    if _distributed() is None:
        return here
    flag = torch.tensor([float(here)], dtype=torch.float64, device="cpu")
    for mesh in Meshes(param_groups).meshes:
        flag = summed(flag, groups_of(mesh))
    return bool(flag)


def largest(param_groups: list[dict[str, Any]], value: int) -> int:
    """The largest of what the ranks that share parameters have; a collective, if there are any."""
    if _distributed() is None:
        return value
    row = torch.tensor([value], dtype=torch.int64, device="cpu")
    for mesh in Meshes(param_groups).meshes:
        for group in groups_of(mesh):
            row = gathered(row, group).amax(0)
    return int(row)
