"""Parameters that are spread over ranks without being DTensors, of whose norm somebody has to say where the rest is."""

from __future__ import annotations

from typing import Any

from . import callers
from .contract import Contract


def refuse_unknown(param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError for a norm over parameters that are spread over ranks of which nobody says which."""
    for index, group in enumerate(param_groups):
        if not Contract.takes_norm(group) or group["grad_norm_group"] is not None:
            continue
        asked = "max_grad_norm" if group["max_grad_norm"] is not None else "skip_step_above"
        asked = f"{asked}={group[asked]!r}"
        if _is_shared_out():
            raise ValueError(
                f"ZeroRedundancyOptimizer gives each rank some of the parameters, and {asked} of group {index} would "
                "go by the norm of these; pass grad_norm_group=torch.distributed.group.WORLD with it, or the group "
                "that it has, or clip with torch.nn.utils.clip_grad_norm_ before the step"
            )
        for position, param in enumerate(group["params"]):
            if hasattr(param, "_is_flat_param") or hasattr(param, "_fsdp_flattened"):
                raise ValueError(
                    f"parameter {position} of group {index} is a shard of FullyShardedDataParallel, of version 1, and "
                    f"{asked} would go by the norm of this shard; pass grad_norm_group=model.process_group with it, or "
                    "clip with model.clip_grad_norm_"
                )


def _is_shared_out() -> bool:
    """Whether torch's ZeroRedundancyOptimizer takes this step, of the parameters that are this rank's among several."""
    found = callers.locals_in("torch.distributed.optim.zero_redundancy_optimizer")
    return found is not None and getattr(found.get("self"), "world_size", 1) > 1
