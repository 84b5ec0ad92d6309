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
        TypeError: The optimizer is not one of this package.
    """
    if not all("master_weights" in group for group in optimizer.param_groups):  # wrappers show the groups of ours
        _check_optimizer(optimizer)
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    weights = {}
    for name, param in model.named_parameters():
        value = full_precision(optimizer, groups.get(param), param).clone()
        weights[name] = sharding.like_param(value, param, param.shape)
    return weights


def full_precision(optimizer: FusedOptimizer, group: dict[str, Any] | None, param: Tensor) -> Tensor:
    """What is held here of a parameter's weights, at least in float32; may share its memory."""
    kind = None if group is None else masters.kind_of(group["master_weights"], param)
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
        TypeError: What is passed is no such optimizer or mapping.
        ValueError: A parameter is missing or unknown, or a tensor has another shape or no numbers that the parameter
            could take. Nothing has changed then.
    """
    _check_optimizer(optimizer)
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is a {type(weights).__name__}; pass the mapping that fp32_parameters gave")
    params = dict(model.named_parameters())
    if params.keys() != weights.keys():
        missing, unknown = sorted(params.keys() - weights.keys()), sorted(weights.keys() - params.keys())
        raise ValueError(f"weights lack {missing} and have unknown {unknown}; pass what fp32_parameters gave")
    for name, param in params.items():
        _check_weight(f"weights[{name!r}]", weights[name], param)
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for name, param in params.items():
        set_full_precision(optimizer, groups.get(param), param, sharding.part_held_here(weights[name], param))


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"optimizer is of the class {type(optimizer).__name__}, which is not one of this package; pass the "
            "optimizer that a wrapper holds, or take the parameters as they are"
        )


def _check_weight(where: str, weight: Any, param: Tensor) -> None:
    """Raises ValueError if a parameter cannot be set to a tensor."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"{where} is a {type(weight).__name__}; pass a tensor of shape {tuple(param.shape)}")
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
    kind = None if group is None else masters.kind_of(group["master_weights"], param)
    if kind is None or group is None:
        local.copy_(value)
        return
    index = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
    make_state(optimizer, [(index, param)])
    kept = sharding.local(optimizer.state[param][masters.KEYS[kind]])
    storage.write(kind, local, kept, value.to(device=local.device, dtype=torch.float32))
