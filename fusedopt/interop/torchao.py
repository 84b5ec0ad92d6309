"""State dicts of torchao, both ways; its states have torch's names, as ours have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import sharding
from ..engine.optimizer import FusedOptimizer
from ..storage.state import StateSpec
from .shared import checked_tensor, imported, plain, read, written

_SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BLOCK = 256
_MIN_NUMEL = 4096


@torch.no_grad()
def from_torchao(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from a state dict of torchao's 8-bit, 4-bit or fp8 optimizers.

    A state is read through its dequantize(), whatever its tensor subclass, or copied if it is plain. torchao is
    needed to load its state dicts from a file, but not here. Settings that both have are taken over, lr as a number.

    Args:
        optimizer: The optimizer that is to go on; nothing in it changes.
        state_dict: A state dict of theirs, for parameters of the same shapes in the same groups.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: new float32 tensor of the parameter's shape}},
        "param_groups": groups}; DTensors where theirs are.

    Raises:
        ValueError: The state dict has other groups, states or shapes.
        TypeError: It is no dict.
    """

    def settings(saved: dict[str, Any], where: str) -> dict[str, Any]:
        keys = [key for key in saved if key in optimizer.defaults or key not in _SETTINGS]
        return {**{key: saved[key] for key in keys}, **plain(saved, ("lr",))}

    def states(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any], where: str) -> dict[str, Any]:
        taken = {}
        for spec in specs:
            value = checked_tensor(held, spec.name, param.shape, where)
            local = sharding.local(value)
            if type(local).dequantize is not Tensor.dequantize:  # every tensor has one, for torch's own formats
                local = local.dequantize()
            taken[spec.name] = sharding.like_param(local.to(torch.float32, copy=True), value, value.shape)
        return taken

    return read(optimizer, state_dict, settings, states)


@torch.no_grad()
def to_torchao(optimizer: FusedOptimizer) -> dict[str, Any]:
    """A state dict that torchao's 8-bit optimizer of the same equation loads.

    States of parameters (of shards) of at least 4096 elements, in whole blocks of 256, are quantized, by torchao,
    as its own would be; but not a running maximum, which its step could not read. The others are float32, and so
    is everything in what `to_torch_state_dict` gives.

    Args:
        optimizer: An optimizer whose states are exp_avg, exp_avg_sq and at most max_exp_avg_sq.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: OptimState8bit or float32 tensor of the parameter's shape}},
        "param_groups": groups, lr a tensor}. All tensors are new, DTensors where the parameter is one.

    Raises:
        ImportError: torchao is not installed.
        ValueError: A parameter, a state or a setting is one that torchao does not have.
    """
    quantized = imported("torchao.optim.subclass_8bit", "torchao").OptimState8bit

    def settings(group: dict[str, Any], where: str) -> dict[str, Any]:
        names = [spec.name for spec in optimizer.states(group)]
        if len(names) < 2 or names != list(_STATES[: len(names)]):
            raise ValueError(
                f"{where} has the states {', '.join(names) or 'none'}, and torchao's optimizers "
                f"{', '.join(_STATES)}; none of them reads it: use to_torch_state_dict"
            )
        if group["maximize"]:
            raise ValueError(f"{where} has maximize=True, which torchao has not; minimize the negative loss instead")
        known = plain(group, _SETTINGS)
        # Their step refuses a number, and their load_state_dict does not make it a tensor.
        return {**known, "lr": torch.tensor(known["lr"], dtype=torch.float32, device="cpu")}

    def states(specs: Sequence[StateSpec], param: Tensor, dense: dict[str, Any], where: str) -> dict[str, Any]:
        held: dict[str, Any] = {"step": dense["step"].clone()}
        for spec in specs:
            value = sharding.local(dense[spec.name])
            fits = value.numel() >= _MIN_NUMEL and value.numel() % _BLOCK == 0
            if fits and not spec.is_maximum:
                # As their step does it: codes of zeros, and a copy, which quantizes.
                zeros = quantized.zeros(value.shape, spec.is_signed, _BLOCK, value.device, dtype=param.dtype)
                value = zeros.copy_(value)
            held[spec.name] = sharding.like_param(value, param, param.shape)
        return held

    return written(optimizer, "torchao", settings, states)
