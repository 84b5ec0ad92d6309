"""What compiled backends tell the core of a step's groups."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..storage import placement
from ..storage.state import DTYPES
from .base import GroupStep, ParamStep, Spread, SpreadOf

# What the core calls these by (csrc/core/tensors.h).
DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(_core.dtypes)}
ROUNDING_CODES = {name: code for code, name in enumerate(_core.roundings)}
MASTER_CODES = {kind: code for code, kind in enumerate(_core.masters)}
PARAM_DTYPES = tuple(DTYPES.values())


def bind_torch(*, exchange: bool = True) -> None:
    """Tells the core how to read tensors; ``exchange=False`` leaves DLPack's C table unused."""
    _core.bind_torch(
        tensor_types=(torch.Tensor, torch.nn.Parameter),
        dtypes=DTYPE_CODES,
        is_neg=torch.Tensor.is_neg,
        data_ptr=torch.Tensor.data_ptr,
        exchange_api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None) if exchange else None,
        probes=[torch.empty((1,) * dims, dtype=torch.float32, device="cpu") for dims in range(6)],
        increment_version=torch._C._increment_version,
    )


bind_torch()
_has_bound_shards = False


def bind_shards() -> None:
    """Tells the core how to read DTensors, once somebody has imported them."""
    global _has_bound_shards
    module = None if _has_bound_shards else sys.modules.get("torch.distributed.tensor")
    if module is not None and hasattr(module, "DTensor"):  # it may be half imported
        _core.bind_shards(type=module.DTensor, place_of=placement.of_spec)
        _has_bound_shards = True


def add_groups(table: _core.TensorTable, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
    """Adds a step's groups to a table that has none."""
    for group, places in zip(groups, positions):
        table.add_group(
            rule=group.rule,
            config=group.hyper,
            seed=group.seed,
            roundings=[ROUNDING_CODES[rounding] for rounding in group.roundings],
            rounding=ROUNDING_CODES[group.rounding],
            master=MASTER_CODES[group.master],
            master_key=group.master_key,
            skips_blocks=group.skips_blocks,
            param_group=group.param_group,
            positions=places or [],
        )


class Channels:
    """Where the sums of a step's shards go: channels, numbered as they are met."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}
        self.asked: list[tuple[Spread, str]] = []  # of each channel, somebody's sum that goes there

    def number(self, spread: Spread, over: str) -> int:
        """The number of the channel of a parameter's sums."""
        channel = spread.channel(over)
        if channel not in self._numbers:
            self._numbers[channel] = len(self.asked)
            self.asked.append((spread, over))
        return self._numbers[channel]


def _can_take(spread: Spread | None, channels: Channels | None) -> bool:
    return spread is None or (channels is not None and spread.is_even)


def _whole_of(
    spread: Spread | None, held: Tensor, channels: Channels | None
) -> tuple[tuple[int, int, int, int, bool] | None, list[int]]:
    """What the core is told of the parameter of which a tensor is a shard, and the channels of its sums."""
    if spread is None or channels is None:
        return None, [0, 0, 0]
    extent, cuts_columns = spread.extent, spread.channel("columns") != ()
    numbers = [channels.number(spread, over) for over in ("columns", "rows", "all")]
    return (extent.numel, extent.rows, extent.columns, spread.matrices(held), cuts_columns), numbers


def collect(
    table: _core.TensorTable,
    group: int,
    params: list[Tensor],
    state: dict[Tensor, Any],
    spread_of: SpreadOf | None,
    channels: Channels | None = None,
) -> list[int]:
    """Adds what fits of a group as it lies, DTensors among it. See Session.collect; `channels` as in `add_entry`."""
    bind_shards()

    def whole_of(param: Tensor, held: Tensor) -> Any:
        spread = spread_of(param)  # type: ignore[misc]
        if spread is None:
            return None
        return _whole_of(spread, held, channels) if _can_take(spread, channels) else False

    return table.collect(group=group, params=params, state=state, whole_of=None if spread_of is None else whole_of)


def add_entry(table: _core.TensorTable, entry: ParamStep, channels: Channels | None = None) -> bool:
    """Adds one parameter; False if it does not fit.

    Args:
        table: Where to.
        entry: The parameter.
        channels: Where sums of shards go; None if the backend takes no sums over shards.
    """
    if entry.indices is not None or not _can_take(entry.spread, channels):
        return False
    whole, numbers = _whole_of(entry.spread, entry.param, channels)
    return table.add(
        group=entry.group,
        position=entry.position,
        param=entry.param,
        grad=entry.grad,
        states=entry.states,
        master=entry.master,
        step=entry.step,
        first_index=entry.first_index,
        segment=entry.segment,
        segment_stride=entry.segment_stride,
        whole=whole,
        channels=numbers,
    )
