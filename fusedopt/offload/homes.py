"""Where states are made: on the parameter's device, in pinned memory of the host, or in files."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..storage.allocation import Request, allocate, within
from ..storage.state import Slot
from .plan import rounded
from .runtime import Runtime, runtime_of


class Wanted(NamedTuple):
    """A tensor of a parameter's state: its param group, the parameter's part that is held here, and its shape."""

    group: dict[str, Any]
    local: Tensor
    slot: Slot

    @property
    def size(self) -> int:
        """Bytes, with the padding to the next tensor."""
        return rounded(self.slot.shape.numel() * self.slot.dtype.itemsize)


RESERVE_BYTES = 1 << 30
PLACES = ("device", "host", "disk")

# Pinned memory, by the name of a runtime, for as long as something lies in it.
_SLABS: dict[str, list[weakref.ref[Tensor]]] = {}


def slabs_of(runtime: Runtime) -> list[Tensor]:
    """The memory that states were pinned in."""
    found = [(ref, ref()) for ref in _SLABS.get(runtime.name, ())]
    _SLABS[runtime.name] = [ref for ref, slab in found if slab is not None]
    return [slab for _, slab in found if slab is not None]


def normalize(value: Any) -> str | None:
    """state_device as param_groups keep it. Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, torch.device):
        value = str(value)
    if isinstance(value, str) and value in ("cpu", "auto"):
        return value
    raise ValueError(
        f"state_device={value!r} is no place for states; pass None (the parameter's device), 'cpu' or 'auto'"
    )


def place_of(group: dict[str, Any], local: Tensor, slot: Slot, tensor: Tensor | None) -> str:
    """Where a tensor of a parameter's state is, or would be made: one of PLACES."""
    runtime = runtime_of(local)
    if runtime is None:
        return "host" if local.device.type == "cpu" else "device"
    if tensor is None:
        return "host" if group["state_device"] == "cpu" and slot.key != "step" else "device"
    return "host" if runtime.is_host(tensor) else "device"


def is_moved(local: Tensor, place: str) -> bool:
    """Whether a step copies what is at a place to where a parameter is."""
    return place != "device" and runtime_of(local) is not None


def note_of(group: dict[str, Any], local: Tensor) -> str:
    """What a group asks for that changes nothing for a parameter, as a sentence; empty if there is nothing."""
    if group["state_device"] in ("cpu", "auto") and local.device.type == "cpu" and runtime_of(local) is None:
        return (
            f"state_device={group['state_device']!r} changes nothing for parameters on the CPU, whose states are there "
            "in any case"
        )
    return ""


def place(wanted: Iterable[Wanted]) -> list[Tensor]:
    """Zeroed tensors where their groups want them, in the order asked for."""
    listed = list(wanted)
    tensors: list[Tensor | None] = [None] * len(listed)
    host: dict[str, tuple[Runtime, list[int]]] = {}
    usual: list[int] = []
    homes = _homes(listed)
    for i, item in enumerate(listed):
        runtime = runtime_of(item.local)
        if runtime is None or homes[i] == "device":
            usual.append(i)
        else:
            host.setdefault(runtime.name, (runtime, []))[1].append(i)
    for i, tensor in zip(usual, allocate(Request.of(listed[i].slot, listed[i].local) for i in usual)):
        tensors[i] = tensor
    for runtime, members in host.values():
        for i, tensor in zip(members, _pinned(runtime, [listed[i] for i in members])):
            tensors[i] = tensor
    return tensors  # type: ignore[return-value]


def _homes(wanted: Sequence[Wanted]) -> list[str]:
    """Where each is to be made. All tensors of a parameter go to one place, its step count stays beside it."""
    return [place_of(item.group, item.local, item.slot, None) for item in wanted]


def _pinned(runtime: Runtime, wanted: Sequence[Wanted]) -> list[Tensor]:
    """Tensors in one slab, one after the other."""
    slab = runtime.pinned(max(1, sum(item.size for item in wanted)))
    _SLABS.setdefault(runtime.name, []).append(weakref.ref(slab))
    memory = slab.numpy()
    tensors, offset = [], 0
    for item in wanted:
        tensors.append(within(memory, offset, item.slot.shape, item.slot.dtype))
        offset += item.size
    return tensors
