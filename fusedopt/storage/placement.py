"""Where the elements of a DTensor's shard are in the whole, whatever its placements."""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing torch.distributed for those who do not use it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is held here, sharing its memory; waits for one that a collective still writes."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    if is_dtensor(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    module = sys.modules.get("torch.distributed._functional_collectives")
    return tensor.wait() if module is not None and isinstance(tensor, module.AsyncCollectiveTensor) else tensor


class Place(NamedTuple):
    """Where elements are in the global tensor, taken in row-major order here and there.

    Attributes:
        first_index: Of the first.
        segment: How many follow each other there as they do here; 0 if all do.
        segment_stride: From where one such segment begins to where the next does.
        indices: Of each element, if they are not as regular as that.
    """

    first_index: int = 0
    segment: int = 0
    segment_stride: int = 0
    indices: Tensor | None = None


WHOLE = Place()


def of(param: Any) -> Place:
    """The place of what is held here of a DTensor."""
    mesh = param.device_mesh
    return _place_of(param.shape, tuple(mesh.shape), tuple(mesh.get_coordinate()), param.placements)


def cuts(spec: Any) -> dict[int, int]:
    """The dimensions that ranks have parts of, by the dimensions of the mesh: none over those of a single rank."""
    return {i: p.dim for i, p in enumerate(spec.placements) if not p.is_replicate() and spec.mesh.size(i) > 1}


# What `of_spec` found, by the ids of specs, with the spec itself: one that has its id later is another.
_of_specs: dict[int, tuple[Any, tuple[int, int, int, bool] | None]] = {}


def of_spec(spec: Any) -> tuple[int, int, int, bool] | None:
    """What the core is told of DTensors of a spec, remembered for it; None if their place is not a regular one.

    Returns:
        The numbers of the `Place` of what is held here, and whether every rank has all of it.
    """
    found = _of_specs.get(id(spec))
    if found is not None and found[0] is spec:
        return found[1]
    told = None
    if all(p.is_replicate() or hasattr(p, "_split_tensor") for p in spec.placements):
        mesh = spec.mesh
        place = _place_of(spec.shape, tuple(mesh.shape), tuple(mesh.get_coordinate()), spec.placements)
        if place.indices is None:
            told = (place.first_index, place.segment, place.segment_stride, not cuts(spec))
    if len(_of_specs) >= 1 << 16:
        _of_specs.clear()
    _of_specs[id(spec)] = (spec, told)
    return told


def is_even(param: Any) -> bool:
    """Whether what every rank holds of a DTensor is a regular place, as far as its placements tell.

    The same on every rank, where places themselves need not be: a shard may be empty, or all of a dimension.
    """
    from torch.distributed.tensor import Shard

    cutting = [p for p in param.placements if not p.is_replicate()]
    dims = sorted({p.dim for p in cutting})
    if any(type(p) is not Shard for p in cutting):
        return False
    return len(dims) < 2 or (len(dims) == 2 and param.shape[: dims[0]].numel() == 1)


def why_blocks_are_cut(param: Any, scales_shape: torch.Size, block: int) -> str:
    """Why blocks of a DTensor's rows would not lie in one shard each, as a clause; empty if they do.

    The same on every rank: it hangs on the edges of all shards.
    """
    if not is_dtensor(param):
        return ""
    return _why_blocks_are_cut(param.shape, tuple(param.device_mesh.shape), param.placements, scales_shape, block)


@lru_cache(maxsize=4096)
def _why_blocks_are_cut(
    shape: torch.Size, mesh_shape: tuple[int, ...], placements: tuple[Any, ...], scales_shape: torch.Size, block: int
) -> str:
    columns = len(shape) - 1 if len(shape) < 2 else 1  # the dimension that rows begin with
    cut = sorted({placement.dim for placement in placements if not placement.is_replicate()})
    if not cut or cut == [0] != [columns]:
        return ""
    why = f"sharded along dimension {cut[-1]}, with edges within blocks of {block} elements"
    if cut[-1] > columns:
        return why
    inner = shape[columns + 1 :].numel()
    for coordinate in product(*map(range, mesh_shape)):
        held = indices_of(shape, mesh_shape, coordinate, placements)[columns]
        scales = indices_of(scales_shape, mesh_shape, coordinate, placements)[columns]
        if len(held) == 0 and len(scales) == 0:
            continue
        if len(held) == 0 or int(held[-1] - held[0]) != len(held) - 1:
            return why
        begin, end = int(held[0]) * inner, (int(held[-1]) + 1) * inner
        blocks = list(range(begin // block, -(-end // block)))
        if begin % block or (end % block and end != shape[columns:].numel()) or scales.tolist() != blocks:
            return why
    return ""


@lru_cache(maxsize=4096)
def _place_of(
    shape: torch.Size, mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> Place:
    return _place(shape, indices_of(shape, mesh_shape, coordinate, placements))


def indices_of(
    shape: torch.Size, mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> list[Tensor]:
    """Along each dimension, which indices of the whole are held at a coordinate of a mesh.

    Placements are applied to the indices themselves, one after the other, as torch applies them to tensors.
    """
    held = [torch.arange(size, dtype=torch.int64, device="cpu") for size in shape]
    for place, count, placement in zip(coordinate, mesh_shape, placements):
        if placement.is_replicate():
            continue
        dim = placement.dim
        view = held[dim].reshape([1] * dim + [-1])
        parts, _ = placement._split_tensor(view, count, with_padding=False, contiguous=True)
        held[dim] = parts[place].reshape(-1) if place < len(parts) else held[dim][:0]
    return held


def _place(shape: torch.Size, held: list[Tensor]) -> Place:
    sizes = [len(indices) for indices in held]
    if 0 in sizes:
        return WHOLE
    strides = [shape[dim + 1 :].numel() for dim in range(len(shape))]
    first = sum(int(indices[0]) * stride for indices, stride in zip(held, strides))
    if all(int(indices[-1] - indices[0]) == len(indices) - 1 for indices in held):
        cut = [dim for dim, size in enumerate(sizes) if size < shape[dim]]
        # One segment for each index before the last dimension that is cut; these are evenly spread if only the first
        # of the dimensions before it that have more than one index is cut.
        last = cut[-1] if cut else 0
        if all(size == 1 for size in sizes[:last]):
            return Place(first)
        beginning = max((dim for dim in cut if dim < last), default=0)
        if all(size == 1 for size in sizes[:beginning]):
            return Place(first, torch.Size(sizes[last:]).numel(), strides[last - 1])
    indices = torch.zeros((), dtype=torch.int64, device="cpu")
    for along, stride in zip(held, strides):
        indices = indices.unsqueeze(-1) + along * stride
    return Place(first, indices=indices.reshape(-1))
