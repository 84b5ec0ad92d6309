"""The memory that states live in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .state import Slot


@dataclass(frozen=True)
class Request:
    """A zeroed tensor that is wanted."""

    shape: torch.Size
    dtype: torch.dtype
    like: Tensor  # is to lie where this one does
    strides: tuple[int, ...] | None = None  # row-major by default

    @classmethod
    def of(cls, slot: Slot, local: Tensor) -> Request:
        """A tensor of the state of a parameter, of which `local` is held here.

        What is stored in full precision lies in the parameter's order, so that all of them are one run of memory. What
        is rounded stochastically, or in blocks, depends on row-major order, and is read and written in that.
        """
        follows = slot.shape == local.shape and slot.dtype.itemsize >= torch.float32.itemsize
        return cls(slot.shape, slot.dtype, local.detach(), permuted_strides(local) if follows else None)


def permuted_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that fills its memory in another order than row-major, as channels_last; else None."""
    if tensor.is_contiguous() or not is_plain(tensor):
        return None
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return None
        expected *= size
    return tensor.stride()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in its memory: operators do not go to a `__torch_dispatch__` of its class."""
    return type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


_SLAB_BYTES = 1 << 25  # a slab's size; large enough for huge pages to matter
_POOLED_BYTES = 1 << 18  # tensors up to this size share slabs
_ALIGNMENT = 64  # bytes, a cache line


def allocate(requests: Iterable[Request]) -> list[Tensor]:
    """Zeroed tensors, in the order asked for.

    On the CPU small tensors of a dtype share slabs of memory: thousands of separate ones would be spread
    over as many pages, and looking at them costs more than stepping them. Memory is zeroed by all threads,
    on huge pages where the system grants them.
    """
    requests = list(requests)
    tensors: list[Tensor | None] = [None] * len(requests)
    pooled: dict[torch.dtype, list[int]] = {}
    for i, request in enumerate(requests):
        size = request.shape.numel() * request.dtype.itemsize
        if request.like.device.type != "cpu" or not is_plain(request.like):
            kind: dict[str, Any] = {"dtype": request.dtype, "device": request.like.device}
            if request.strides is None:
                tensors[i] = request.like.new_zeros(request.shape, **kind)
            else:
                tensors[i] = request.like.new_empty_strided(request.shape, request.strides, **kind).zero_()
        elif size > _POOLED_BYTES:
            tensors[i] = _zeroed(request.shape, request.dtype, request.strides)
        else:
            pooled.setdefault(request.dtype, []).append(i)
    for dtype, members in pooled.items():
        for slab_members in _slabs(requests, members):
            slots = [_slot(requests[i]) for i in slab_members]
            slab = _zeroed(torch.Size([sum(slots)]), dtype).view(torch.uint8).numpy()
            offset = 0
            for i, slot in zip(slab_members, slots):
                tensors[i] = within(slab, offset, requests[i].shape, dtype, requests[i].strides)
                offset += slot * dtype.itemsize
    return tensors  # type: ignore[return-value]


def within(
    slab: Any, offset: int, shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...] | None = None
) -> Tensor:
    """A tensor of its own in a slab's memory, from a byte on, not a view with the bookkeeping of one.

    Its storage begins where it does. With an offset in a storage that tensors share, a compiled step would copy all
    that lies before it as well, and in torch 2.6 from the wrong place.
    """
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    if shape.numel() == 0:
        return tensor.view(shape)
    storage = torch.frombuffer(slab, dtype=dtype, count=shape.numel(), offset=offset).untyped_storage()
    return tensor.set_(storage, 0, shape, *(() if strides is None else (strides,)))


def _slot(request: Request) -> int:
    """Elements that a pooled tensor takes up, padding included."""
    per_line = _ALIGNMENT // request.dtype.itemsize
    return -(-max(1, request.shape.numel()) // per_line) * per_line


def _slabs(requests: Sequence[Request], members: Sequence[int]) -> Iterable[list[int]]:
    """Splits pooled tensors into runs of at most a slab."""
    run: list[int] = []
    held = 0
    for i in members:
        size = _slot(requests[i]) * requests[i].dtype.itemsize
        if run and held + size > _SLAB_BYTES:
            yield run
            run, held = [], 0
        run.append(i)
        held += size
    yield run


def _zeroed(shape: torch.Size, dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    if strides is None:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    else:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    _core.zero(data=tensor.data_ptr(), bytes=tensor.numel() * dtype.itemsize, threads=torch.get_num_threads())
    return tensor
