"""Loading state dicts without losing formats.

torch's load_state_dict casts every state to its parameter's dtype, which would turn the float32 state of
a bfloat16 parameter into bfloat16. So the tensors are wrapped while it runs and converted afterwards to
what the param group asks for.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding
from .state import DTYPES, Request, allocate, stored_dtype

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

# Which machine a run is on is not part of the run.
_NOT_RESTORED = ("backend",)


class _Kept:
    """A tensor on its way through torch's load_state_dict, which looks into tensors, dicts and iterables."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def check_state(
    optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, held: dict[str, Any], where: str
) -> None:
    """Raises ValueError if a state that `param` has, or is about to get, is not of its shape."""
    for spec in optimizer.states(group):
        value = held.get(spec.name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != param.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"{where} has a state {spec.name!r} of {found}; it must be a tensor of the parameter's shape "
                f"{tuple(param.shape)}: load a state dict of the same model"
            )
        if value.dtype not in DTYPES.values() and value.dtype != param.dtype:
            raise ValueError(
                f"{where} has a state {spec.name!r} of dtype {value.dtype}; it must be one of {', '.join(DTYPES)}"
            )
    step = held.get("step", 0)
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"{where} has a state 'step' of shape {tuple(step.shape)}; it must have one element")


def prepare(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: checks a state dict, fills its groups and wraps its tensors."""
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has param groups of {saved_sizes} parameters and the optimizer of {sizes}; "
            "build the optimizer with the groups that it was saved with"
        )
    filled = []
    for group, saved in zip(groups, saved_groups):
        merged = {**{key: group[key] for key in optimizer.defaults}, **saved}
        merged.update({key: group[key] for key in _NOT_RESTORED})
        filled.append(optimizer._checked(merged))
    members = chain.from_iterable(((group, p) for p in group["params"]) for group in groups)
    ids = chain.from_iterable(group["params"] for group in saved_groups)
    state = dict(state_dict["state"])
    for saved_id, (group, param) in zip(ids, members):
        if saved_id not in state:
            continue
        held = state[saved_id]
        check_state(optimizer, group, param, held, f"state_dict: parameter {saved_id}")
        state[saved_id] = {k: _Kept(v) if isinstance(v, Tensor) else v for k, v in held.items()}
    return {**state_dict, "state": state, "param_groups": filled}


def restore(optimizer: FusedOptimizer) -> None:
    """Unwraps what `prepare` wrapped and copies it into fresh memory of the stored format."""
    sources: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    requests: list[Request] = []
    for group in optimizer.param_groups:
        specs = {spec.name: spec for spec in optimizer.STATES}
        for param in group["params"]:
            held = optimizer.state.get(param)
            if held is None:
                continue
            for name, value in held.items():
                if name == "step" and not isinstance(value, (_Kept, Tensor)):
                    value = held[name] = _Kept(torch.tensor(float(value)))
                if not isinstance(value, _Kept):
                    continue
                local = sharding.local(param)
                if name in specs:
                    source = _local_part(value.tensor, param)
                    requests.append(
                        Request(local.shape, stored_dtype(specs[name], group["state_dtype"], param), local.device)
                    )
                elif name == "step":
                    source = value.tensor.reshape(())
                    requests.append(Request(torch.Size(), torch.float32, local.device))
                else:  # not a state of this optimizer; kept for whoever put it there
                    held[name] = value.tensor
                    continue
                sources.append((held, name, source, param))
    for (held, name, source, param), tensor in zip(sources, allocate(requests)):
        tensor.copy_(source)
        held[name] = tensor if name == "step" else sharding.like_param(tensor, param)


def _local_part(tensor: Tensor, param: Tensor) -> Tensor:
    """What this rank holds of a state, which may come as a DTensor or whole."""
    if sharding.is_dtensor(param) and not sharding.is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        tensor = distribute_tensor(tensor.to(param.device), mesh, placements)
    return sharding.local(tensor)
