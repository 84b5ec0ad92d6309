"""What compiled backends tell the core of a step's groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _core
from ..storage.state import DTYPES
from .base import GroupStep, ParamStep, Shards

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


def add_shards(table: _core.TensorTable, group: int, shards: Shards) -> list[int]:
    """Adds shards; the positions of those that do not fit."""
    return table.collect_shards(
        group=group,
        positions=shards.positions,
        params=shards.params,
        grads=shards.grads,
        states=shards.states,
        places=shards.places,
    )


def add_entry(table: _core.TensorTable, entry: ParamStep) -> bool:
    """Adds one parameter; False if it does not fit."""
    if entry.indices is not None or entry.spread is not None:
        return False
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
    )
