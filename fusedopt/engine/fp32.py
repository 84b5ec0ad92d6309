"""Full-precision weights of a model, for checkpoints: those of parameters that stand for more than their own bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import masters
from ..storage import weights as storage
from . import sharding
from .members import make_state
from .optimizer import FusedOptimizer


@torch.no_grad()
def fp32_parameters(optimizer: FusedOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in full precision, for a checkpoint.

    A 16-bit parameter with master weights stands for more than its own bits; what it stands for is given
    here. All others are given as they are, 16-bit ones widened.

    Args:
        optimizer: The optimizer that steps the model.
        model: Any module.

    Returns:
        {name in ``model.named_parameters()``: new float32 tensor}, float64 and complex ones in their own dtype.
        A sharded parameter gives a DTensor.

    Raises:
        TypeError: The optimizer is none, or the model is no module.
    """
    groups = _groups(optimizer, model)
    weights = {}
    for name, param in model.named_parameters():
        value = full_precision(optimizer, groups.get(param), param).clone()
        weights[name] = sharding.like_param(value, param, param.shape)
    return weights


def _groups(optimizer: FusedOptimizer, model: nn.Module) -> dict[Tensor, dict[str, Any]]:
    """The param group of every parameter that is stepped."""
    if not hasattr(optimizer, "param_groups"):  # a framework may have wrapped it
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass the optimizer that steps the model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass the torch.nn.Module that is stepped")
    return {param: group for group in optimizer.param_groups for param in group["params"]}


def full_precision(optimizer: FusedOptimizer, group: dict[str, Any] | None, param: Tensor) -> Tensor:
    """What is held here of a parameter's weights, at least in float32; may share its memory."""
    kind = None if group is None else masters.kind_of(group.get("master_weights"), param)
    kept = None if kind is None else optimizer.state.get(param, {}).get(masters.KEYS[kind])
    return storage.read(kind, sharding.local(param).detach(), None if kept is None else sharding.local(kept))


@torch.no_grad()
def load_fp32_parameters(optimizer: FusedOptimizer, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets the weights of a model, and what its optimizer keeps of them beside it; undoes `fp32_parameters`.

    What a 16-bit parameter without master weights cannot hold is rounded to nearest.

    Args:
        optimizer: The optimizer that steps the model.
        model: Any module.
        weights: {name: tensor} for every parameter of the model. Parameter and tensor may be sharded or not, each as it
            is, whatever the other; ranks meet where they differ.

    Raises:
        TypeError: The optimizer is none or the wrapper of one of ours, the model is no module, weights are no mapping,
            or one of them is no tensor. Nothing has changed then.
        ValueError: A parameter is missing or unknown, or a tensor has another shape or no numbers that the parameter
            could take. Nothing has changed then.
    """
    groups = _groups(optimizer, model)
    if not isinstance(optimizer, FusedOptimizer) and any("master_weights" in g for g in optimizer.param_groups):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass the optimizer of this package that it holds")
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}; pass the mapping that fp32_parameters gave")
    params = dict(model.named_parameters())
    if params.keys() != weights.keys():
        missing, unknown = sorted(params.keys() - weights.keys()), sorted(weights.keys() - params.keys())
        raise ValueError(f"weights lack {missing} and have unknown {unknown}; pass what fp32_parameters gave")
    for name, param in params.items():
        _check_weight(f"weights[{name!r}]", weights[name], param)
    for name, param in params.items():
        set_full_precision(optimizer, groups.get(param), param, sharding.part_held_here(weights[name], param))


def _check_weight(where: str, weight: Any, param: Tensor) -> None:
    """Raises ValueError or TypeError if a parameter cannot be set to something."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{where} is a {type(weight).__name__}; pass a tensor of shape {tuple(param.shape)}")
    if weight.shape != param.shape:
        raise ValueError(
            f"{where} has shape {tuple(weight.shape)} and the parameter {tuple(param.shape)}; "
            "pass the weights of the same model"
        )
    if weight.is_complex() and not param.is_complex():
        raise ValueError(f"{where} is {weight.dtype} and the parameter {param.dtype}; pass real numbers")
    if weight.device.type == "meta" or weight.layout != torch.strided:
        what = "on the meta device" if weight.device.type == "meta" else f"of layout {weight.layout}"
        raise ValueError(f"{where} is {what}; pass a dense tensor with values")


def set_full_precision(optimizer: FusedOptimizer, group: dict[str, Any] | None, param: Tensor, value: Tensor) -> None:
    """Sets what is held here of a parameter's weights, rounded to nearest where they cannot hold it."""
    local = sharding.local(param)
    kind = None if group is None else masters.kind_of(group.get("master_weights"), param)
    for other, key in masters.KEYS.items():  # what was kept as the group asked before
        if other != kind and param in optimizer.state:
            optimizer.state[param].pop(key, None)
    if kind is None or group is None:
        local.copy_(value)
        return
    index = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
    make_state(optimizer, [(index, param)])
    kept = sharding.local(optimizer.state[param][masters.KEYS[kind]])
    storage.write(kind, local, kept, value.to(device=local.device, dtype=torch.float32))
