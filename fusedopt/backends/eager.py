"""The reference path: plain torch on any device, the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.arithmetic import rounded
from ..reference.dense import round_stochastic
from ..reference.norm import block_square_sums, chunk_sums, pairwise_sum, square_sums
from ..reference.random import bits_at
from ..storage import quantization, skipping
from ..storage import weights as storage
from ..storage.masters import SIXTEEN_BIT
from ..storage.state import StateSpec, keeps_own_precision
from .base import ASKING, HEALTH_COUNTS, REFERENCES, GroupStep, Health, ParamStep, SpreadOf, SquareSums, Summing
from .rounds import over_shards, taken, together

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
_PARAM_STREAM = 4  # after the four states that a rule has at most


def step_param(group: GroupStep, entry: ParamStep, grad_multiplier: float) -> int:
    """Steps one parameter in place: decode, reference, encode. Returns how many weights it left as they were."""
    return taken(summing_step(group, entry, grad_multiplier))


def summing_step(group: GroupStep, entry: ParamStep, grad_multiplier: float) -> Summing[int]:
    """The same, of a parameter that may be a shard: asks for sums over the whole."""
    step = int(entry.step.item()) + 1

    def bits(rounding: str, state: int, stored: torch.dtype) -> Tensor | None:
        if rounding == "nearest" or stored not in (*SIXTEEN_BIT, torch.uint8):
            return None
        param, begin = entry.param, entry.first_index
        index = entry.indices
        if index is None:
            index = torch.arange(begin, begin + param.numel(), dtype=torch.int64, device=param.device)
            if entry.segment:
                index += (index - begin) // entry.segment * (entry.segment_stride - entry.segment)
        return bits_at(index.to(param.device), seed=group.seed, step=step, state=state).reshape(param.shape)

    param = weights(group, entry)
    grad = _numbers(entry.grad, entry.param).to(param.dtype)
    multiplier = rounded(grad_multiplier, param)
    states = (_state(spec, held, entry.param) for spec, held in zip(group.states, entry.states))
    told: dict[str, Any] = {"dtype": entry.param.dtype} if group.layout else {}
    hyper = group.hyper if group.lr is None else {**group.hyper, "lr": float(group.lr.item())}
    if entry.spread is None:
        results = REFERENCES[group.rule](param, grad * multiplier, *states, step=step, **told, **hyper)
    else:
        whole = entry.spread.extent
        told["whole"] = replace(whole, numel=2 * whole.numel) if entry.param.is_complex() else whole
        asking = ASKING[group.rule](param, grad * multiplier, *states, step=step, **told, **hyper)
        results = yield from over_shards(asking, entry.spread)
    stored = skipping.Stored.of(entry.param, entry.master, entry.states) if group.skips_blocks else None
    for k, (spec, held, value) in enumerate(zip(group.states, entry.states, results[1:])):
        _write_state(spec, held, value, bits(group.roundings[k], k, held[0].dtype))
    _write_weights(group, entry, results[0], bits(group.rounding, _PARAM_STREAM, entry.param.dtype))
    entry.step.add_(1)
    if stored is None:
        return 0
    is_complex = entry.param.is_complex()
    return stored.put_back(skipping.spoilt(results, has_blocks=stored.has_blocks, is_complex=is_complex))


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs, a view that shares memory."""
    return torch.view_as_real(x) if x.is_complex() else x


def _numbers(x: Tensor, param: Tensor) -> Tensor:
    """In the precision that is computed in."""
    return _real(x) if keeps_own_precision(param) else x.float()


def weights(group: GroupStep, entry: ParamStep) -> Tensor:
    """A parameter in full precision."""
    return storage.read(group.master, _real(entry.param), entry.master)


def _state(spec: StateSpec, held: tuple[Tensor, ...], param: Tensor) -> Tensor:
    if len(held) == 1:
        return _numbers(held[0], param)
    return quantization.decode(held[0], held[1], is_signed=spec.is_signed)


def _write_state(spec: StateSpec, held: tuple[Tensor, ...], value: Tensor, bits: Tensor | None) -> None:
    if len(held) == 2:
        for target, part in zip(held, quantization.encode(value, is_signed=spec.is_signed, bits=bits)):
            target.copy_(part)
    else:
        _write(held[0], value, bits)


def _write_weights(group: GroupStep, entry: ParamStep, value: Tensor, bits: Tensor | None) -> None:
    if group.master is None or entry.master is None:
        _write(entry.param, value, bits)
        return
    storage.write(group.master, entry.param, entry.master, value, bits)


def _write(target: Tensor, value: Tensor, bits: Tensor | None) -> None:
    if bits is not None:
        value = round_stochastic(value, target.dtype, bits)
    _real(target).copy_(value)


def count_health(group: GroupStep, entry: ParamStep, before: Tensor, skipped: int) -> dict[str, int]:
    """What csrc/cpu/health.inl counts, after a step; `before` are the weights before it, `skipped` how many it left."""
    grad = _numbers(entry.grad, entry.param)
    unmoved = _same_bits(before, weights(group, entry)) & (grad != 0)
    counts = dict.fromkeys(HEALTH_COUNTS, 0)
    counts["stalled"] += int(unmoved.sum())
    counts["nonfinite_grads"] += int((~grad.isfinite()).sum())
    counts["skipped"] += skipped
    for spec, held in zip(group.states, entry.states):
        if len(held) == 2:
            top = 0x7F if spec.is_signed else 0xFF
            counts["codes"] += held[0].numel()
            counts["saturated_codes"] += int(((held[0] & top) == top).sum())
            counts["nonfinite_blocks"] += int((held[1] == 255).sum())
    return counts


def update_sums(group: GroupStep, entry: ParamStep, before: Tensor) -> tuple[float, float]:
    """What csrc/cpu/updates.inl adds, after a step; `before` are the weights before it."""
    after = weights(group, entry)
    update, weight = (_sum_of_squares(each, block_row(entry)) for each in (after - before, after))
    return update, weight


def block_row(entry: ParamStep) -> int:
    """Elements that blocks of a parameter's weights do not cross: of the runs that kernels step it in."""
    if entry.segment:
        return entry.segment * (2 if entry.param.is_complex() else 1)
    has_codes = any(len(held) == 2 for held in entry.states)
    return quantization.row_length(entry.param.shape) if has_codes else _real(entry.param).numel()


def _sum_of_squares(values: Tensor, row: int) -> float:
    # The rest is done on the host: in order, which takes a device a launch for each number.
    return float(pairwise_sum(chunk_sums(block_square_sums(values, row).cpu().double())))


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.contiguous().view(kind) == b.contiguous().view(kind)


class EagerSession:
    """See Session."""

    def __init__(self) -> None:
        self._groups: Sequence[GroupStep] = ()
        self._entries: list[ParamStep] = []

    def begin(self, groups: Sequence[GroupStep], positions: Sequence[list[int] | None]) -> None:
        self._groups = groups
        self._entries = []

    def collect(
        self, group: int, params: list[Tensor], state: dict[Tensor, Any], spread_of: SpreadOf | None = None
    ) -> list[int]:
        return [i for i, param in enumerate(params) if param.grad is not None]

    def add(self, entry: ParamStep) -> bool:
        self._entries.append(entry)
        return True

    def __len__(self) -> int:
        return len(self._entries)

    def square_sums(self) -> Tensor:
        return torch.cat([square_sums(entry.grad) for entry in self._entries])

    def step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        return taken(self.summing_step(grad_multipliers, counts_health=counts_health, square_sums=square_sums))

    def summing_step(
        self, grad_multipliers: Sequence[float], *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Summing[Health]:
        health: Health = {}
        looks = counts_health or square_sums is not None
        before = [weights(self._groups[e.group], e).clone() for e in self._entries] if looks else []
        skipped = [0] * len(self._entries)
        summing = []
        for i, entry in enumerate(self._entries):
            if entry.spread is None:
                skipped[i] = step_param(self._groups[entry.group], entry, grad_multipliers[entry.group])
            else:
                summing.append(i)
        spread = [self._entries[i] for i in summing]
        steps = [summing_step(self._groups[e.group], e, grad_multipliers[e.group]) for e in spread]
        for i, count in zip(summing, (yield from together(steps))):
            skipped[i] = count
        for entry, held, count in zip(self._entries, before, skipped):
            group = self._groups[entry.group]
            if counts_health:
                health[entry.group, entry.position] = count_health(group, entry, held, count)
            if square_sums is not None:
                square_sums[entry.group, entry.position] = update_sums(group, entry, held)
        self._entries = []
        return health


class EagerBackend:
    """See Backend."""

    name = "eager"

    def refusal(self, param: Tensor) -> str | None:
        if param.dtype not in DTYPES:
            return f"its dtype is {param.dtype}"
        return None

    def session(self) -> EagerSession:
        return EagerSession()
