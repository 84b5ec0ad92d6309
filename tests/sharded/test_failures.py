"""A step that fails on one rank: what it leaves behind, and what the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases import assert_same_bits
from sharded.models import EIGHT_BIT, assert_same_whole, params_of, set_grads, shard, step_both, transformer
from sharded.ranks import Ranks
from torch.distributed.tensor import DTensor

import fusedopt
from fusedopt.storage import allocation

KWARGS: dict[str, Any] = {"lr": 1e-2, "seed": 3, **EIGHT_BIT, "master_weights": "split24"}
DTYPE = torch.bfloat16


def _no_memory_after(calls: int, of: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which finds no memory any more after some calls."""
    left = iter(range(calls))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("pretended")
        return of(*args, **kwargs)

    return function


def _all_held(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What a step writes of this rank's shards."""
    found = [*params_of(optimizer), *(value for held in optimizer.state.values() for value in held.values())]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in found]


def _fails_on_one_rank(rank: int, world: int, new: bool) -> None:
    """Rank 1 finds no memory for its state, or for that of a parameter that it has not stepped before."""
    model = shard(transformer(dtype=DTYPE))
    ours = fusedopt.AdamW(model.parameters(), **KWARGS)
    theirs = fusedopt.AdamW(transformer(dtype=DTYPE).parameters(), **KWARGS)
    step = 0
    if not new:  # one parameter has no gradient in the first step, and no state before the second
        for optimizer in (ours, theirs):
            set_grads(optimizer, step, DTYPE)
            params_of(optimizer)[0].grad = None
            optimizer.step()
        step = 1
    for optimizer in (ours, theirs):
        set_grads(optimizer, step, DTYPE)
    if rank == 1:
        known = set(ours.state)
        before = [tensor.clone() for tensor in _all_held(ours)]
        allocate = _no_memory_after(1 if new else 0, allocation._zeroed)
        with mock.patch.object(allocation, "_zeroed", allocate), pytest.raises(torch.OutOfMemoryError):
            ours.step()
        assert set(ours.state) == known
        for now, then in zip(_all_held(ours), before, strict=True):
            assert_same_bits(now, then)
    ours.step()  # what failed is done again, and nothing but that
    theirs.step()
    assert_same_whole(ours, theirs)
    step_both(ours, theirs, [step + 1], DTYPE)
    assert_same_whole(ours, theirs)


@pytest.mark.parametrize("new", [True, False], ids=["all of its state", "one parameter's"])
def test_a_rank_without_memory_changes_nothing_and_steps_again(ranks: Ranks, new: bool) -> None:
    ranks(2, _fails_on_one_rank, new=new)
