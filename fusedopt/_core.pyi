"""The compiled core (csrc/bindings.cpp)."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

def bind_torch(
    *,
    tensor_types: tuple[type, ...],
    dtypes: dict[Any, int],
    is_neg: Any,
    data_ptr: Any,
    exchange_api: Any,
    probes: list[Tensor],
    increment_version: Any,
) -> None: ...
def bind_shards(*, type: type, place_of: Callable[[Any], tuple[int, int, int, bool] | None]) -> None: ...
def available_isas() -> list[str]: ...
def selected_isa() -> str: ...
def rules() -> dict[str, tuple[str, ...]]: ...
def zero(*, data: int, bytes: int, threads: int) -> None: ...

layout: int
dtypes: tuple[str, ...]  # torch's names; the core takes a dtype, a rounding or a master by its position here
roundings: tuple[str, ...]
masters: tuple[str | None, ...]
reduction_chunk: int  # elements (core/pairwise.h)
sum_lanes: int  # of a chunk
max_slabs: int  # of a matrix (core/matrices.h)
weighed_rows: int
health_counts: tuple[str, ...]  # what a step counts

class TensorTable:
    def __init__(self, *, device_type: str = ..., device_index: int = ...) -> None: ...
    def __len__(self) -> int: ...
    def clear(self) -> None: ...
    def add_group(
        self,
        *,
        rule: str,
        config: dict[str, float],
        seed: int,
        roundings: list[int],
        rounding: int,
        master: int,
        master_key: str,
        skips_blocks: bool = ...,
        param_group: int = ...,
        positions: list[int] = ...,
    ) -> None: ...
    def collect(
        self,
        *,
        group: int,
        params: list[Tensor],
        state: dict[Tensor, Any],
        whole_of: Callable[
            [Tensor, Tensor], tuple[tuple[int, int, int, int, bool] | None, list[int]] | Literal[False] | None
        ]
        | None = ...,
    ) -> list[int]: ...
    def add(
        self,
        *,
        group: int,
        position: int,
        param: Tensor,
        grad: Tensor,
        states: tuple[tuple[Tensor, ...], ...],
        master: Tensor | None,
        step: Tensor,
        first_index: int,
        segment: int = ...,
        segment_stride: int = ...,
        whole: tuple[int, int, int, int, bool] | None = ...,
        channels: list[int] = ...,
    ) -> bool: ...
    def count_versions(self) -> None: ...
    def batch(self, *, grad_multipliers: list[float]) -> int: ...
    def rows(self) -> bytes: ...
    def cuts(self) -> bytes: ...
    def count_square_sums(self) -> int: ...
    def square_sums(self, *, sums: int, threads: int) -> None: ...
    def step(
        self,
        *,
        grad_multipliers: list[float],
        threads: int,
        counts_health: bool,
        square_sums: dict[tuple[int, int], tuple[float, float]] | None = None,
    ) -> dict[tuple[int, int], dict[str, int]]: ...
    def begin_shards(self, *, grad_multipliers: list[float], channels: int) -> list[list[tuple[int, int]]]: ...
    def sum_shards(self, *, round: int, totals: int, sums: int, threads: int) -> None: ...
    def step_shards(
        self,
        *,
        totals: int,
        threads: int,
        counts_health: bool,
        square_sums: dict[tuple[int, int], tuple[float, float]] | None = None,
    ) -> dict[tuple[int, int], dict[str, int]]: ...
