"""State dicts for torch.optim."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from ..engine import checkpoint
from ..engine.optimizer import FusedOptimizer
from ..engine.options import Options, TorchFlags
from ..storage import masters
from .shared import dense, members

_OWN_SETTINGS = {*Options.__annotations__, "compensation_buffer_dtype"} - {*TorchFlags.__annotations__}


@torch.no_grad()
def to_torch_state_dict(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The state dict with every state dense, for torch.optim's class of the same name or any reader of its kind.

    8-bit states are decoded and 16-bit ones widened, both exactly. What is kept of master weights is left out: it
    belongs to weights, and `fp32_parameters` gives those. `optimizer.load_state_dict` takes the result back.

    Args:
        optimizer: Any optimizer of this package.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: float32 tensor of the parameter's shape}}, "param_groups":
        groups without the settings that are this package's own}. Double and complex states keep their dtype. All
        tensors are new, DTensors where the parameter is one. Parameters that were never stepped have no state.

    Raises:
        ValueError: A state does not fit its parameter.
    """
    packed = optimizer.state_dict()
    state = {}
    for index, group, param in members(packed["param_groups"], optimizer.param_groups):
        held = packed["state"].get(index)
        if held is None:
            continue
        checkpoint.check_state(optimizer, group, param, held, f"parameter {index}")
        specs = optimizer.all_states(group)
        converted = {*masters.KEYS.values(), *(key for spec in specs for key in spec.keys_in(held))}
        others = {key: deepcopy(value) for key, value in held.items() if key not in converted}
        state[index] = optimizer.as_torchs_state(group, {**others, **dense(specs, param, held)})
    groups = [
        {key: deepcopy(value) for key, value in optimizer.as_torchs_group(group).items() if key not in _OWN_SETTINGS}
        for group in packed["param_groups"]
    ]
    return {**packed, "state": state, "param_groups": groups}
