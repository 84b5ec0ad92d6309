"""What is held here of a parameter: a plain tensor wholly, a DTensor its local shard, a fake tensor only its shape."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..storage import placement
from ..storage.allocation import is_plain
from ..storage.placement import Place
from ..storage.placement import is_dtensor as is_dtensor
from ..storage.placement import local as local


def is_sharded(tensor: Tensor) -> bool:
    """Whether less of it may be held here than there is of it."""
    return is_dtensor(tensor) and not all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape, a dtype and a device, but no memory, as torch's own estimators of memory make them."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def wrapper_refusal(param: Tensor, grad: Tensor) -> str | None:
    """Why tensors whose class wraps others cannot be stepped, as a sentence; None if they can, or wrap nothing."""
    held = local(param)
    if is_fake(held):
        return None
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and any(isinstance(mode, fake.FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
        return "it is real, and its state would not be while FakeTensorMode is on; step it outside of that mode"
    for what, tensor in (("it", held), ("its gradient", local(grad))):
        if not is_plain(tensor):
            return (
                f"{what} is a {type(tensor).__name__}, whose numbers only its own operators can reach; "
                "use an optimizer of torch.optim, which calls them"
            )
    return None


def refusal(param: Tensor) -> str | None:
    """Why a DTensor parameter cannot be stepped, as a sentence; None if it can or is a plain tensor."""
    if not is_dtensor(param):
        return None
    for each in param.placements:  # type: ignore[attr-defined]
        if each.is_partial():
            return (
                f"its DTensor placement is {each!r}, whose numbers are parts that are still to be summed; "
                "redistribute it to Replicate() or Shard(dim)"
            )
        if not each.is_replicate() and not hasattr(each, "_split_tensor"):
            return f"its DTensor placement is {each!r}, of which it is not known what lies where; use Shard(dim)"
    return None


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """The part of a gradient that goes with what is held here of its parameter.

    Autograd may leave the gradient of a DTensor in other placements, unsummed ones among them: it is brought into the
    parameter's, as torch's optimizers do, which all ranks of the mesh take part in.
    """
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def place(param: Tensor) -> Place:
    """Where what is held here of a parameter is in the whole."""
    return placement.of(param) if is_dtensor(param) else placement.WHOLE


def with_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as numbers of another dtype of that size."""
    if not is_dtensor(tensor):
        return tensor.view(dtype)
    return like_param(local(tensor).view(dtype), tensor, tensor.shape)


def placements_like(param: Tensor, dims: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """The placements of a state of a DTensor, whose dimensions are those of the parameter; None for all.

    Where the parameter is sharded along another dimension, all ranks have the same.
    """
    placements: tuple[Any, ...] = param.placements  # type: ignore[attr-defined]
    if dims is None:
        return placements
    from torch.distributed.tensor import Replicate, Shard

    found: list[Any] = []
    for each in placements:
        if each.is_replicate() or each.dim not in dims:
            found.append(Replicate())
        elif isinstance(each, Shard) and type(each) is Shard:
            found.append(Shard(dims.index(each.dim)))
        else:
            found.append(type(each)(dims.index(each.dim), split_factor=each.split_factor))
    return tuple(found)


def like_param(tensor: Tensor, param: Tensor, shape: torch.Size, dims: tuple[int, ...] | None = None) -> Tensor:
    """A local state tensor, placed as its parameter is; `shape` is of the whole, `dims` as in `placements_like`."""
    if not is_dtensor(param):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor,
        param.device_mesh,  # type: ignore[attr-defined]
        placements_like(param, dims),
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor; the ranks of a DTensor's mesh meet."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def part_held_here(tensor: Tensor, param: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """What of a whole tensor goes with what is held here of a parameter; `dims` as in `placements_like`.

    The tensor may come whole, or as a DTensor in any placements on any mesh, which need not be the parameter's. Where
    it does not lie as the parameter does, ranks meet: those of its mesh, and those of the parameter's.
    """
    if is_dtensor(tensor) and (not is_dtensor(param) or tensor.device_mesh != param.device_mesh):  # type: ignore[attr-defined]
        tensor = gathered(tensor)
    if is_dtensor(param):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = param.device_mesh, placements_like(param, dims)  # type: ignore[attr-defined]
        if not is_dtensor(tensor):
            tensor = distribute_tensor(tensor.to(param.device), mesh, placements)
        elif tensor.placements != placements:  # type: ignore[attr-defined]
            tensor = tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return local(tensor)
