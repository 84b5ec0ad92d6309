"""The compiled CPU core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..masters import KEYS
from ..state import ROUNDINGS
from .base import GroupStep, Health, ParamStep

# DType and Master in csrc/core/tensors.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int8: 4, torch.int16: 5}
MASTERS: dict[str | None, int] = {kind: i for i, kind in enumerate([None, *KEYS])}
_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bind_torch(*, exchange: bool = True) -> None:
    """Tells the core how to read tensors; ``exchange=False`` leaves DLPack's C table unused."""
    _core.bind_torch(
        tensor_types=(torch.Tensor, torch.nn.Parameter),
        dtypes=DTYPES,
        is_neg=torch.Tensor.is_neg,
        data_ptr=torch.Tensor.data_ptr,
        exchange_api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None) if exchange else None,
    )


bind_torch()


class CpuSession:
    """See Session. Its table lives as long as the optimizer and is never pickled."""

    def __init__(self) -> None:
        self._table = _core.TensorTable()

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._table.clear()
        for group, places in zip(groups, positions):
            self._table.add_group(
                rule=group.rule,
                config=group.hyper,
                seed=group.seed,
                roundings=[ROUNDINGS.index(rounding) for rounding in group.roundings],
                rounding=ROUNDINGS.index(group.rounding),
                master=MASTERS[group.master],
                master_key="" if group.master is None else KEYS[group.master],
                param_group=group.param_group,
                positions=places or [],
            )

    def collect(self, group: int, params: list[Tensor], state: dict[Tensor, Any]) -> list[int]:
        return self._table.collect(group=group, params=params, state=state)

    def add(self, entry: ParamStep) -> bool:
        return self._table.add(
            group=entry.group,
            position=entry.position,
            param=entry.param,
            grad=entry.grad,
            states=entry.states,
            master=entry.master,
            step=entry.step,
            first_index=entry.first_index,
        )

    def __len__(self) -> int:
        return len(self._table)

    def square_sums(self) -> Tensor:
        sums = torch.empty(self._table.count_square_sums(), dtype=torch.float64)
        self._table.square_sums(sums=sums.data_ptr(), threads=torch.get_num_threads())
        return sums

    def step(self, grad_multipliers: Sequence[float], *, counts_health: bool = False) -> Health:
        return self._table.step(
            grad_multipliers=list(grad_multipliers), threads=torch.get_num_threads(), counts_health=counts_health
        )

    def forget(self) -> None:
        self._table.forget()


class CpuBackend:
    """See Backend."""

    name = "cpu"

    def refusal(self, param: Tensor) -> str | None:
        if param.device.type != "cpu":
            return f"it is on {param.device}"
        if param.dtype not in _PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        return None

    def session(self) -> CpuSession:
        return CpuSession()
