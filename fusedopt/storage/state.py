"""State formats: what a state is called, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from .. import checks
from .placement import why_blocks_are_cut
from .quantization import BLOCK, scales_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EIGHT_BIT = "8bit"
# From this size on a vector is no bias: it is a buffer in which FSDP1, DeepSpeed or apex hold many parameters.
FLAT_NUMEL = 2**18
FORMATS = (*DTYPES, EIGHT_BIT)
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
        is_signed: Whether it holds numbers of both signs; in 8 bits one that does not has twice the codes.
        is_maximum: Whether it is a running maximum. Rounded stochastically such a state is pushed up by
            every lucky draw and never comes down, so it is rounded to nearest unless named in a dict.
        unquantized: Why it is never stored in 8 bits, as a clause; empty if it may be.
        always_float32: Why it is stored in neither 8 nor 16 bits, as a clause; empty if it may be.
        extent: What it has a number for: each of the parameter's "elements", or each of its "rows" or "columns".
            Those are of the matrices in the last two dimensions; the dimensions before them count matrices.
        is_folded: Whether rows and columns are those of one matrix instead, the first dimension by the rest.
    """

    name: str
    is_signed: bool = True
    is_maximum: bool = False
    unquantized: str = ""
    always_float32: str = ""
    extent: str = "elements"
    is_folded: bool = False

    def dims_for(self, ndim: int) -> tuple[int, ...] | None:
        """Which of a parameter's dimensions its own are, stored densely; None for all. Folded columns begin with 1."""
        if self.extent == "elements":
            return None
        if self.is_folded:
            return (0,) if self.extent == "rows" else (1,)
        return tuple(range(ndim - 1)) if self.extent == "rows" else (*range(ndim - 2), ndim - 1)

    def shape_for(self, shape: torch.Size) -> torch.Size:
        """Its shape, stored densely, for a parameter (or a shard of one) of a shape."""
        if self.extent == "elements":
            return shape
        if self.is_folded:
            return torch.Size([shape[0] if self.extent == "rows" else shape[1:].numel()])
        return shape[:-1] if self.extent == "rows" else shape[:-2] + shape[-1:]

    @property
    def codes(self) -> str:
        """The key of its 8-bit codes."""
        return self.name + "_codes"

    @property
    def scales(self) -> str:
        """The key of the scales of its 8-bit codes."""
        return self.name + "_scales"

    def keys_in(self, held: dict[str, Any]) -> tuple[str, ...]:
        """Under which keys a parameter's state holds it: one, or codes and scales, or none."""
        if self.name in held:
            return (self.name,)
        return (self.codes, self.scales) if self.codes in held and self.scales in held else ()


def format_name(argument: str, value: Any, options: Sequence[str] = FORMATS) -> str:
    """A format as param_groups keep it, given by name or as a torch.dtype. Raises ValueError."""
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, str):
        value = _ALIASES.get(value, value)
    return checks.one_of(argument, value, options)


def _known_states(argument: str, value: dict[str, Any], specs: Sequence[StateSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in value:
        if name not in names:
            raise ValueError(
                f"{argument}={value!r} names the state {name!r}; the states are {', '.join(names) or 'none'}"
            )


def normalize_dtype(value: Any, specs: Sequence[StateSpec]) -> str | dict[str, str]:
    """state_dtype as param_groups keep it: a name, or a name per state. Raises ValueError."""
    if not isinstance(value, dict):
        return format_name("state_dtype", value)
    _known_states("state_dtype", value, specs)
    named = {name: format_name(f"state_dtype[{name!r}]", item) for name, item in value.items()}
    for spec in specs:
        wanted = named.get(spec.name, "float32")
        if spec.always_float32 and wanted != "float32":
            raise ValueError(
                f"state_dtype[{spec.name!r}]={wanted!r} is not possible: {spec.always_float32}; leave it out"
            )
        if spec.unquantized and wanted == EIGHT_BIT:
            raise ValueError(
                f"state_dtype[{spec.name!r}]='8bit' is not possible: {spec.unquantized}; use 'float32' or 'bfloat16'"
            )
    return named


def normalize_rounding(value: Any, specs: Sequence[StateSpec]) -> str | dict[str, str] | None:
    """state_rounding as param_groups keep it: None (the default), a name, or a name per state."""
    if value is None:
        return None
    if isinstance(value, dict):
        _known_states("state_rounding", value, specs)
        return {name: checks.one_of(f"state_rounding[{name!r}]", item, ROUNDINGS) for name, item in value.items()}
    return checks.one_of("state_rounding", value, ROUNDINGS)


def rounding_of(spec: StateSpec, state_rounding: str | dict[str, str] | None) -> str:
    """How a state is rounded when it is stored in 16 or 8 bits: stochastically unless told otherwise."""
    default = "nearest" if spec.is_maximum else "stochastic"
    if isinstance(state_rounding, dict):
        return state_rounding.get(spec.name, default)
    return default if spec.is_maximum or state_rounding is None else state_rounding


def keeps_own_precision(param: Tensor) -> bool:
    """Whether a parameter's states have its own dtype: float64 and complex ones, on the reference path."""
    return param.dtype in (torch.float64, torch.complex64, torch.complex128)


def requested_format(spec: StateSpec, state_dtype: str | dict[str, str]) -> str:
    """The format that a group asks for a state."""
    return state_dtype.get(spec.name, "float32") if isinstance(state_dtype, dict) else state_dtype


def why_not_quantized(spec: StateSpec, group: dict[str, Any], param: Tensor) -> str:
    """Why a state of a parameter that 8 bits are asked for is kept in float32; empty if it is not.

    Decided by the global shape, and never by one rank's shard: all ranks decide alike, and where all shards hold whole
    blocks it does not hang on how a parameter is sharded.
    """
    if spec.unquantized or spec.always_float32:
        return spec.unquantized or spec.always_float32
    shape = param.shape
    if len(shape) == 0 or (len(shape) == 1 and shape.numel() < FLAT_NUMEL):
        return f"{len(shape)}-dimensional"
    if shape.numel() < group["min_quantized_numel"]:
        return f"fewer than {group['min_quantized_numel']} elements"
    if len(shape) > 1 and shape[1:].numel() < BLOCK:
        return f"rows shorter than {BLOCK} elements"
    return why_blocks_are_cut(param, scales_shape(shape), BLOCK)


def stored_format(spec: StateSpec, group: dict[str, Any], param: Tensor) -> str | torch.dtype:
    """How a state of a parameter is stored: one of FORMATS, or its own dtype."""
    if keeps_own_precision(param):
        return param.dtype
    if spec.always_float32:
        return "float32"
    wanted = requested_format(spec, group["state_dtype"])
    return "float32" if wanted == EIGHT_BIT and why_not_quantized(spec, group, param) else wanted


class Slot(NamedTuple):
    """A tensor of a parameter's state.

    Attributes:
        key: Its key.
        shape: Of what is held here.
        global_shape: Of the whole, where the parameter is sharded.
        dtype: Its dtype.
        dims: Which of the parameter's dimensions its own are; None for all.
    """

    key: str
    shape: torch.Size
    global_shape: torch.Size
    dtype: torch.dtype
    dims: tuple[int, ...] | None = None


def slots_of(spec: StateSpec, group: dict[str, Any], param: Tensor, local: Tensor) -> list[Slot]:
    """The tensors that store a state of a parameter, of which `local` is the part that is held here."""
    stored = stored_format(spec, group, param)
    if stored != EIGHT_BIT:
        dtype = stored if isinstance(stored, torch.dtype) else DTYPES[stored]
        shape, global_shape = spec.shape_for(local.shape), spec.shape_for(param.shape)
        return [Slot(spec.name, shape, global_shape, dtype, spec.dims_for(param.dim()))]
    return [
        Slot(spec.codes, local.shape, param.shape, torch.uint8),
        Slot(spec.scales, scales_shape(local.shape), scales_shape(param.shape), torch.uint8),
    ]
