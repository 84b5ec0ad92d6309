"""Where states are made: on the parameter's device, in pinned memory of the host, or in files."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..storage.allocation import Request, allocate, within
from ..storage.state import Slot
from . import disk
from .plan import rounded
from .runtime import Runtime, check_not_captured, runtime_of


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
_DISK = "disk:"
_MADE_BEFORE = (
    "states are made in the first step, and a CUDA graph that is captured then would set them to zero in each replay; "
    "take a step, or load a state dict, before capturing"
)

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
    if isinstance(value, str) and value.startswith(_DISK):
        folder = os.path.abspath(value.removeprefix(_DISK))
        if value == _DISK or not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"state_device={value!r} names no folder that can be written to; make {folder} first")
        return _DISK + folder
    raise ValueError(
        f"state_device={value!r} is no place for states; pass None (the parameter's device), 'cpu', 'auto' or "
        "'disk:FOLDER'"
    )


def check_step_device(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError if a group's step_device or host_threads is not possible."""
    device, threads = group["step_device"], group["host_threads"]
    if isinstance(device, torch.device):
        device = group["step_device"] = str(device)
    if device not in (None, "cpu"):
        raise ValueError(f"step_device={device!r} steps nothing; pass None (where the parameter is) or 'cpu'")
    if threads is not None and checks.whole("host_threads", threads) < 1:
        raise ValueError(f"host_threads={threads!r} steps nothing; pass a whole number >= 1, or None")
    if device is not None and group["state_device"] not in (None, "cpu"):
        raise ValueError(
            f"step_device='cpu' has its states on the host, and state_device={group['state_device']!r} asks for "
            "another place; leave state_device out"
        )


def is_stepped_on_host(group: dict[str, Any], local: Tensor) -> bool:
    """Whether a parameter is on a device and its group asks for steps on the host."""
    return group["step_device"] is not None and runtime_of(local) is not None


def refusal(group: dict[str, Any], local: Tensor, is_part: bool) -> str | None:
    """Why a parameter's states cannot be where its group wants them, as a sentence; None if they can."""
    wanted = group["state_device"]
    if wanted is None:
        return None
    if wanted.startswith(_DISK) and local.device.type != "cpu" and runtime_of(local) is None:
        return (
            f"state_device={wanted!r} is for parameters on the CPU and on CUDA devices, and it is on {local.device}; "
            "pass None"
        )
    if is_part and runtime_of(local) is not None:
        return (
            f"it is a DTensor on {local.device}, whose states must be there, too, and its group has "
            f"state_device={wanted!r}; pass None, or FSDP2's CPUOffloadPolicy"
        )
    return None


def uses_disk(group: dict[str, Any]) -> bool:
    """Whether a group's states are in files."""
    return str(group["state_device"]).startswith(_DISK)


def is_read_in_place(group: dict[str, Any], local: Tensor) -> bool:
    """Whether a parameter is stepped with its states as they lie in files, mapped to memory."""
    return uses_disk(group) and runtime_of(local) is None


def place_of(group: dict[str, Any], local: Tensor, slot: Slot, tensor: Tensor | None) -> str:
    """Where a tensor of a parameter's state is, or would be made: one of PLACES."""
    runtime, wanted = runtime_of(local), group["state_device"]
    if is_stepped_on_host(group, local):
        return "host"
    if uses_disk(group) and slot.key != "step" and (tensor is None or disk.slab_of(tensor) is not None):
        return "disk"
    if runtime is None:
        return "host" if local.device.type == "cpu" else "device"
    if tensor is None:
        return "host" if wanted == "cpu" and slot.key != "step" else "device"
    return "host" if runtime.is_host(tensor) else "device"


def is_moved(group: dict[str, Any], local: Tensor, place: str) -> bool:
    """Whether a step copies what is at a place to where a parameter is."""
    return not is_stepped_on_host(group, local) and place != "device" and runtime_of(local) is not None


def moved_beside_states(group: dict[str, Any], local: Tensor) -> int:
    """What a step copies of a parameter besides its states: for a step on the host its gradient, and weights twice."""
    return 3 * local.numel() * local.element_size() if is_stepped_on_host(group, local) else 0


def note_of(group: dict[str, Any], local: Tensor) -> str:
    """What a group asks for that changes nothing for a parameter, as a sentence; empty if there is nothing."""
    if group["state_device"] in ("cpu", "auto") and local.device.type == "cpu" and runtime_of(local) is None:
        return (
            f"state_device={group['state_device']!r} changes nothing for parameters on the CPU, whose states are there "
            "in any case"
        )
    return ""


@torch.inference_mode(False)  # tensors that are made in it can be written to in it only
def place(wanted: Iterable[Wanted]) -> list[Tensor]:
    """Zeroed tensors where their groups want them, in the order asked for.

    Raises:
        OSError: A disk is full. Nothing was made then.
        ValueError: A CUDA graph is being captured.
    """
    listed = list(wanted)
    check_not_captured((item.local for item in listed), _MADE_BEFORE)
    tensors: list[Tensor | None] = [None] * len(listed)
    members: dict[str, list[int]] = {"device": [], "host": [], "disk": [], "auto": [], "cpu": []}
    for i, item in enumerate(listed):
        home = place_of(item.group, item.local, item.slot, None)
        if is_stepped_on_host(item.group, item.local):
            members["cpu"].append(i)
            continue
        # Where there is no device, the host is where states are made in any case.
        usual = home == "host" and runtime_of(item.local) is None
        is_open = item.group["state_device"] == "auto" and runtime_of(item.local) is not None and home == "device"
        members["auto" if is_open and item.slot.key != "step" else "device" if usual else home].append(i)

    def fill(places: list[int], found: Iterable[Tensor]) -> None:
        for i, tensor in zip(places, found):
            tensors[i] = tensor

    fill(members["disk"], _on_disk([listed[i] for i in members["disk"]]))
    cpu = torch.empty(0, dtype=torch.float32, device="cpu")
    fill(members["cpu"], allocate(Request(listed[i].slot.shape, listed[i].slot.dtype, cpu) for i in members["cpu"]))
    fill(members["device"], allocate(_request(listed[i]) for i in members["device"]))
    for places in _by_param(listed, members["auto"]):
        found = _beside([listed[i] for i in places])
        if found is None:
            members["host"] += places
        else:
            fill(places, found)
    by_runtime: dict[str, list[int]] = {}
    for i in members["host"]:
        runtime = runtime_of(listed[i].local)
        assert runtime is not None
        by_runtime.setdefault(runtime.name, []).append(i)
    for places in by_runtime.values():
        runtime = runtime_of(listed[places[0]].local)
        assert runtime is not None
        fill(places, _pinned(runtime, [listed[i] for i in places]))
    return tensors  # type: ignore[return-value]


def _request(item: Wanted) -> Request:
    return Request.of(item.slot, item.local)


def _by_param(listed: Sequence[Wanted], members: Iterable[int]) -> list[list[int]]:
    """Those of one parameter together."""
    found: dict[int, list[int]] = {}
    for i in members:
        found.setdefault(listed[i].local.data_ptr(), []).append(i)
    return list(found.values())


def _beside(wanted: Sequence[Wanted]) -> list[Tensor] | None:
    """A parameter's states on its device, if that leaves the reserve free; None if there is no room."""
    runtime = runtime_of(wanted[0].local)
    assert runtime is not None
    free = runtime.free_bytes(runtime.device_of(wanted[0].local))
    if free - sum(item.size for item in wanted) < wanted[0].group["reserve_bytes"]:
        return None
    try:
        return runtime.allocate([_request(item) for item in wanted])
    except torch.OutOfMemoryError:  # what is free may be in pieces
        return None


def _on_disk(wanted: Sequence[Wanted]) -> list[Tensor]:
    """Tensors in files of about equal size, in their groups' folders; those of a parameter are neighbours."""
    runs: list[list[Wanted]] = []
    held = disk.SLAB_BYTES
    folder = ""
    for item in wanted:
        if held + item.size > disk.SLAB_BYTES or item.group["state_device"] != folder:
            runs.append([])
            held, folder = 0, item.group["state_device"]
        runs[-1].append(item)
        held += item.size
    tensors: list[Tensor] = []
    made: list[disk.Slab] = []
    for run in runs:
        scratch = disk.scratch_in(run[0].group["state_device"].removeprefix(_DISK))
        try:
            slab = scratch.slab(max(mmap.PAGESIZE, sum(item.size for item in run)))
        except OSError:
            for other in made:
                other.path.unlink()
            raise
        made.append(slab)
        memory = slab.memory()
        offset = 0
        for item in run:
            tensors.append(within(memory, offset, item.slot.shape, item.slot.dtype))
            offset += item.size
    return tensors


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
