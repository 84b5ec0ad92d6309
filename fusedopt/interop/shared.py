"""What converters of state dicts share.

No converter knows an optimizer by name: everything follows from the states that it declares. What is read becomes
dense float32 states, which `load_state_dict` stores as each group asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine import checkpoint, sharding
from ..engine.optimizer import FusedOptimizer
from ..storage.quantization import decode
from ..storage.state import StateSpec, keeps_own_precision

Settings = Callable[[dict[str, Any], str], dict[str, Any]]  # of a group, and what errors call it
States = Callable[[Sequence[StateSpec], Tensor, dict[str, Any], str], dict[str, Any]]  # of a parameter


def read(optimizer: FusedOptimizer, state_dict: Any, settings: Settings, states: States) -> dict[str, Any]:
    """Another package's state dict with our settings and dense states."""
    _check_optimizer(optimizer)
    checkpoint.check_groups(optimizer, state_dict)
    saved_groups = state_dict["param_groups"]
    groups = [deepcopy(settings(saved, f"state_dict: group {i}")) for i, saved in enumerate(saved_groups)]
    # Settings decide which states there are.
    merged = [
        optimizer.checked_group({**ours, **new, "params": ours["params"]})
        for ours, new in zip(optimizer.param_groups, groups)
    ]
    state = {}
    for index, group, param in members(saved_groups, merged):
        held = state_dict["state"].get(index)
        if not held:
            continue
        where = f"state_dict: parameter {index}"
        if "step" not in held:
            raise ValueError(f"{where} has no 'step'; load a state dict as it was saved")
        step = torch.tensor(float(held["step"]), dtype=torch.float32, device="cpu")
        new = {"step": step, **states(optimizer.states(group), param, held, where)}
        checkpoint.check_state(optimizer, group, param, new, where)
        state[index] = new
    return {"state": state, "param_groups": groups}


def written(optimizer: FusedOptimizer, package: str, settings: Settings, states: States) -> dict[str, Any]:
    """Our state dict with another package's settings and states."""
    _check_optimizer(optimizer)
    packed = Optimizer.state_dict(optimizer)  # with all settings, whatever their defaults
    groups = []
    for i, group in enumerate(packed["param_groups"]):
        others = {key: deepcopy(value) for key, value in group.items() if key not in optimizer.defaults}
        groups.append({**others, **settings(group, f"param group {i}")})
    state = {}
    for index, group, param in members(packed["param_groups"], optimizer.param_groups):
        held = packed["state"].get(index)
        if not held:
            continue
        where = f"parameter {index}, of shape {tuple(param.shape)},"
        checkpoint.check_state(optimizer, group, param, held, where)
        if keeps_own_precision(param):
            raise ValueError(f"{where} is {param.dtype}, and {package} steps in float32; use to_torch_state_dict")
        specs = optimizer.states(group)
        missing = [spec.name for spec in specs if not spec.keys_in(held)]
        if missing or "step" not in held:
            raise ValueError(f"{where} has no state {', '.join(missing) or 'step'} yet; take a step before converting")
        state[index] = states(specs, param, {"step": held["step"], **dense(specs, param, held)}, where)
    return {"state": state, "param_groups": groups}


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass an optimizer of fusedopt")


def members(
    packed: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
    """(its key in a state dict, its group, itself) for every parameter, given the groups of both."""
    for saved, group in zip(packed, groups):
        for index, param in zip(saved["params"], group["params"]):
            yield index, group, param


def dense(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any]) -> dict[str, Tensor]:
    """The states that a parameter has, at least in float32, new and placed as the parameter is."""
    found = {}
    for spec in specs:
        parts = [sharding.local(held[key]) for key in spec.keys_in(held)]
        if len(parts) == 2:
            value = decode(parts[0], parts[1], is_signed=spec.is_signed).contiguous()  # may be a slice of whole blocks
        elif parts:
            value = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
        else:
            continue
        found[spec.name] = sharding.like_param(value, param, spec.shape_for(param.shape), spec.dims_for(param.dim()))
    return found


def plain(group: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Those of some settings that a group has, tensors of one element as numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return value.item() if isinstance(value, Tensor) else value

    return {key: plain(group[key]) for key in keys if key in group}


def checked_tensor(held: dict[str, Any], key: str, shape: torch.Size, where: str) -> Tensor:
    """A tensor of a state dict. Raises ValueError if it is missing or has another shape."""
    value = held.get(key)
    if not isinstance(value, Tensor) or value.shape != shape:
        found = f"has {key!r} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"has no tensor {key!r}"
        raise ValueError(
            f"{where} {found}; it must be of shape {tuple(shape)}: "
            "load a state dict of the same model, of an optimizer of the same equation"
        )
    return value


def imported(module: str, package: str) -> Any:
    """A module of a package that only writing its format needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"a state dict for {package} is written with {package}: pip install {package}") from error
    except Exception as error:  # of whatever kind, if it is made for another torch
        raise ImportError(
            f"a state dict for {package} is written with {package}, which does not load: {error}; install a version of "
            f"it that is made for torch {torch.__version__}"
        ) from error
