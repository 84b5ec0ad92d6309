"""The reference path: plain torch on any device, the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.arithmetic import rounded
from ..reference.dense import round_stochastic
from ..reference.norm import square_sums
from ..reference.random import random_bits
from ..state import keeps_own_precision
from .base import REFERENCES, GroupStep, ParamStep

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def step_param(group: GroupStep, entry: ParamStep, grad_multiplier: float) -> None:
    """Steps one parameter in place: decode, reference, encode."""
    step = int(entry.step.item()) + 1

    def decode(x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.view_as_real(x)
        return x if keeps_own_precision(entry.param) else x.float()

    param = decode(entry.param)
    grad = decode(entry.grad).to(param.dtype)
    multiplier = rounded(grad_multiplier, param)
    results = REFERENCES[group.rule](
        param, grad * multiplier, *(decode(state) for state in entry.states), step=step, **group.hyper
    )
    # A view as real numbers shares memory, so the results are written where they belong.
    _write(entry.param, results[0])
    for k, (state, value) in enumerate(zip(entry.states, results[1:])):
        if group.roundings[k] == "stochastic" and state.dtype in (torch.bfloat16, torch.float16):
            bits = random_bits(
                state.shape, state.device, seed=group.seed, step=step, first_index=entry.first_index, state=k
            )
            value = round_stochastic(value, state.dtype, bits)
        _write(state, value)
    entry.step.add_(1)


def _write(target: Tensor, value: Tensor) -> None:
    (torch.view_as_real(target) if target.is_complex() else target).copy_(value)


class EagerSession:
    """See Session."""

    def __init__(self) -> None:
        self._groups: Sequence[GroupStep] = ()
        self._entries: list[ParamStep] = []

    def begin(self, groups: Sequence[GroupStep]) -> None:
        self._groups = groups
        self._entries = []

    def collect(self, group: int, params: list[Tensor], state: dict[Tensor, Any]) -> list[int]:
        return [i for i, param in enumerate(params) if param.grad is not None]

    def add(self, entry: ParamStep) -> bool:
        self._entries.append(entry)
        return True

    def __len__(self) -> int:
        return len(self._entries)

    def square_sums(self) -> Tensor:
        return torch.cat([square_sums(entry.grad) for entry in self._entries])

    def step(self, grad_multipliers: Sequence[float]) -> None:
        for entry in self._entries:
            step_param(self._groups[entry.group], entry, grad_multipliers[entry.group])
        self._entries = []

    def forget(self) -> None:
        self._entries = []


class EagerBackend:
    """See Backend."""

    name = "eager"

    def refusal(self, param: Tensor) -> str | None:
        if param.dtype not in DTYPES:
            return f"its dtype is {param.dtype}"
        return None

    def session(self) -> EagerSession:
        return EagerSession()
