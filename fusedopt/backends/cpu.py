"""The compiled CPU core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from .base import GroupStep, Health, ParamStep, SpreadOf, SquareSums, Summing
from .rounds import taken
from .table import PARAM_DTYPES, Channels, add_entry, add_groups, collect


class CpuSession:
    """See Session. Its table lives as long as the optimizer and is never pickled."""

    def __init__(self) -> None:
        self.threads: int | None = None  # as many as torch has
        self._table = _core.TensorTable()
        self._channels = Channels()
        self._waits: set[int] = set()  # groups whose learning rate is on another device: left to the reference

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._table.clear()
        self._channels = Channels()
        add_groups(self._table, groups, positions)
        self._waits = {i for i, group in enumerate(groups) if group.lr is not None}

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        if group in self._waits:
            return [i for i, param in enumerate(params) if param.grad is not None]
        return collect(self._table, group, params, state, spread_of, self._channels)

    def add(self, entry: ParamStep) -> bool:
        if entry.group in self._waits:
            return False
        return add_entry(self._table, entry, self._channels)

    def __len__(self) -> int:
        return len(self._table)

    def square_sums(self) -> Tensor:
        sums = torch.empty(self._table.count_square_sums(), dtype=torch.float64, device="cpu")
        self._table.square_sums(sums=sums.data_ptr(), threads=self.threads or torch.get_num_threads())
        return sums

    def step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        return taken(self.summing_step(grad_multipliers, counts_health=counts_health, square_sums=square_sums))

    def summing_step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Summing[Health]:
        multipliers, threads, asked = (
            list(grad_multipliers),
            self.threads or torch.get_num_threads(),
            self._channels.asked,
        )
        health = self._table.step(
            grad_multipliers=multipliers, threads=threads, counts_health=counts_health, square_sums=square_sums
        )
        if not asked:
            return health
        totals = torch.empty(0, dtype=torch.float64, device="cpu")
        for number, counts in enumerate(self._table.begin_shards(grad_multipliers=multipliers, channels=len(asked))):
            sums = torch.empty(sum(count for _, count in counts), dtype=torch.float64, device="cpu")
            self._table.sum_shards(round=number, totals=totals.data_ptr(), sums=sums.data_ptr(), threads=threads)
            parts = torch.split(sums, [count for _, count in counts]) if counts else ()
            totals = torch.cat(
                [sums[:0], *(yield [(*asked[channel], part) for (channel, _), part in zip(counts, parts)])]
            )
        health |= self._table.step_shards(
            totals=totals.data_ptr(), threads=threads, counts_health=counts_health, square_sums=square_sums
        )
        return health


class CpuBackend:
    """See Backend."""

    name = "cpu"

    def refusal(self, param: Tensor) -> str | None:
        if param.device.type != "cpu":
            return f"it is on {param.device}"
        if param.dtype not in PARAM_DTYPES:
            return f"its dtype is {param.dtype}"
        return None

    def session(self) -> CpuSession:
        return CpuSession()
