"""Which backward passes gradients come from, and whether they ran to their end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Passes:
    """The backward passes since a step, as far as hooks on parameters see them."""

    def __init__(self) -> None:
        self._ended: dict[int, bool] = {}

    def clear(self) -> None:
        """Forgets them."""
        self._ended = {}

    def enter(self) -> bool:
        """Notes the pass that is running, by a hook in it; False if one before it never ended: it has raised."""
        number = torch._C._current_graph_task_id()
        if number < 0 or number in self._ended:  # FSDP2 calls hooks after the pass, too
            return True
        raised = not all(self._ended.values()) and not _is_within_a_checkpoint()
        if raised:
            self.clear()
        ended = self._ended
        ended[number] = False
        # It is called at the end of the pass, and not if the pass raises.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: ended.__setitem__(number, True))
        return not raised


def _is_within_a_checkpoint() -> bool:
    """Whether a pass runs inside another, as torch's reentrant checkpoints do."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def reducer_of(params: Iterable[Tensor]) -> str | None:
    """The name of a wrapper that reduces the gradients of some of these parameters itself; None if there is none.

    Such a wrapper leaves no mark on parameters, so the objects of the process are searched.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    wrappers: list[type] = [torch.nn.parallel.DistributedDataParallel]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        wrappers.append(fsdp.FullyShardedDataParallel)
    wanted = {id(param) for param in params}
    for found in gc.get_objects():
        if issubclass(type(found), tuple(wrappers)) and any(id(param) in wanted for param in found.parameters()):
            return type(found).__name__
    return None


def check_shards(optimizer: Any, params: Iterable[Tensor]) -> None:
    """Raises ValueError if an optimizer sums over shards of some of these parameters, one parameter at a time."""
    if optimizer.takes_sums and any(hasattr(param, "placements") for param in params):
        raise ValueError(
            f"{type(optimizer).__name__} sums over the shards of DTensors, for which all processes have to step a "
            "parameter at the same time, and gradients come in an order of their own; do not release them"
        )


def check_reducers(params: Iterable[Tensor]) -> None:
    """Raises ValueError if gradients of some of these parameters are reduced between processes where hooks miss it."""
    wrapper = reducer_of(params)
    if wrapper is not None:
        raise ValueError(
            f"the parameters belong to a {wrapper}, which averages gradients between processes after the hooks that "
            "would step them, so that every process would step with its own; use FSDP2 (fully_shard), whose hooks "
            "come after the reduction"
        )
