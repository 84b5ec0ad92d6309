"""What compiled backends tell the core of a step's groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _core
from ..storage.state import DTYPES
from .base import GroupStep, ParamStep, Shards, Spread

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


def add_shards(table: _core.TensorTable, group: int, shards: Shards, channels: Channels | None = None) -> list[int]:
    """Adds shards; the positions of those that do not fit. `channels` as in `add_entry`."""
    others: list[int] = []
    if not all(_can_take(spread, channels) for spread in shards.spreads):
        fits = [_can_take(spread, channels) for spread in shards.spreads]
        others = [position for position, can in zip(shards.positions, fits) if not can]
        shards = shards.picked([i for i, can in enumerate(fits) if can])
    told = [_whole_of(spread, held, channels) for spread, held in zip(shards.spreads, shards.params)]
    left = table.collect_shards(
        group=group,
        positions=shards.positions,
        params=shards.params,
        grads=shards.grads,
        states=shards.states,
        places=shards.places,
        wholes=[whole for whole, _ in told],
        channels=[numbers for _, numbers in told],
    )
    return sorted(others + left)


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
