"""State formats: what a state is called, how it is stored, and the memory it lives in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from . import _core, checks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDINGS = ("nearest", "stochastic")

# As the constructors take them.
StateDtype = Union[str, torch.dtype, "dict[str, str | torch.dtype]"]
StateRounding = Union[str, "dict[str, str]", None]


@dataclass(frozen=True)
class StateSpec:
    """One state of an optimizer.

    Attributes:
        name: Its key in ``optimizer.state``, torch's.
        is_maximum: Whether it is a running maximum. Rounded stochastically such a state is pushed up by
            every lucky draw and never comes down, so it is rounded to nearest unless named in a dict.
    """

    name: str
    is_maximum: bool = False


def _dtype_name(value: Any, argument: str) -> str:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, str):
        value = _ALIASES.get(value, value)
    return checks.one_of(argument, value, DTYPES)


def _known_states(argument: str, value: dict[str, Any], specs: Sequence[StateSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in value:
        if name not in names:
            raise ValueError(f"{argument}={value!r} names the state {name!r}; the states are {', '.join(names)}")


def normalize_dtype(value: Any, specs: Sequence[StateSpec]) -> str | dict[str, str]:
    """state_dtype as param_groups keep it: a name, or a name per state. Raises ValueError."""
    if isinstance(value, dict):
        _known_states("state_dtype", value, specs)
        return {name: _dtype_name(item, f"state_dtype[{name!r}]") for name, item in value.items()}
    return _dtype_name(value, "state_dtype")


def normalize_rounding(value: Any, specs: Sequence[StateSpec]) -> str | dict[str, str] | None:
    """state_rounding as param_groups keep it: None (the default), a name, or a name per state."""
    if value is None:
        return None
    if isinstance(value, dict):
        _known_states("state_rounding", value, specs)
        return {name: checks.one_of(f"state_rounding[{name!r}]", item, ROUNDINGS) for name, item in value.items()}
    return checks.one_of("state_rounding", value, ROUNDINGS)


def rounding_of(spec: StateSpec, state_rounding: str | dict[str, str] | None) -> str:
    """How a state is rounded when it is stored in 16 bits: stochastically unless told otherwise."""
    default = "nearest" if spec.is_maximum else "stochastic"
    if isinstance(state_rounding, dict):
        return state_rounding.get(spec.name, default)
    return default if spec.is_maximum or state_rounding is None else state_rounding


def keeps_own_precision(param: Tensor) -> bool:
    """Whether a parameter's states have its own dtype: float64 and complex ones, on the reference path."""
    return param.dtype in (torch.float64, torch.complex64, torch.complex128)


def requested_dtype(spec: StateSpec, state_dtype: str | dict[str, str]) -> torch.dtype:
    """The dtype that a group asks for a state."""
    return DTYPES[state_dtype.get(spec.name, "float32") if isinstance(state_dtype, dict) else state_dtype]


def stored_dtype(spec: StateSpec, state_dtype: str | dict[str, str], param: Tensor) -> torch.dtype:
    """The dtype that a state of a parameter is stored in."""
    return param.dtype if keeps_own_precision(param) else requested_dtype(spec, state_dtype)


@dataclass(frozen=True)
class Request:
    """A zeroed tensor that is wanted."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


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
        if request.device.type != "cpu":
            tensors[i] = torch.zeros(request.shape, dtype=request.dtype, device=request.device)
        elif size > _POOLED_BYTES:
            tensors[i] = _zeroed(request.shape, request.dtype)
        else:
            pooled.setdefault(request.dtype, []).append(i)
    for dtype, members in pooled.items():
        for slab_members in _slabs(requests, members):
            slots = [_slot(requests[i]) for i in slab_members]
            slab = _zeroed(torch.Size([sum(slots)]), dtype).untyped_storage()
            offset = 0
            for i, slot in zip(slab_members, slots):
                # set_ makes a tensor of its own over the slab, not a view with the bookkeeping of one
                tensors[i] = torch.empty(0, dtype=dtype).set_(slab, offset, requests[i].shape)  # type: ignore[call-overload]
                offset += slot
    return tensors  # type: ignore[return-value]


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


def _zeroed(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    _core.zero(data=tensor.data_ptr(), bytes=tensor.numel() * dtype.itemsize, threads=torch.get_num_threads())
    return tensor
