"""Training of a small transformer in several processes, against the same run in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded.models import EIGHT_BIT, assert_same_whole, loss_of, params_of, shard, tokens, train, transformer
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import fusedopt

# Parameters' dtype, and what goes with it.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"state_dtype": "bfloat16", "rounding": "stochastic"}),
    "8bit": (torch.float32, EIGHT_BIT),
    "8bit-split24": (torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24"}),
    "8bit-split32": (torch.bfloat16, {**EIGHT_BIT, "master_weights": "split32"}),
    "kahan": (torch.bfloat16, {"master_weights": "kahan"}),
    "master": (torch.bfloat16, {"master_weights": "float32"}),
}


def _trains_as_one(rank: int, world: int, format_name: str, replicates: bool = False) -> None:
    dtype, kwargs = FORMATS[format_name]
    kwargs = {"lr": 1e-2, "seed": 3, **kwargs}
    model, twin = transformer(dtype=dtype), transformer(dtype=dtype)
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names) if replicates else None
    shard(model, **({} if mesh is None else {"mesh": mesh}))
    ours, theirs = fusedopt.AdamW(model.parameters(), **kwargs), fusedopt.AdamW(twin.parameters(), **kwargs)
    # Gradients' mean over replicas is taken apart; what is compared is the step, of the same numbers.
    for step in range(3):
        loss_of(model, tokens(step)).backward()
        loss_of(twin, tokens(step)).backward()
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            if param.grad is None:
                assert other.grad is None
            elif world == 3:  # the mean of three equal numbers is rounded: take what it was
                other.grad = param.grad.full_tensor()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert any("unused" in name for name, _ in model.named_parameters())
    assert all(param.grad is None for param in params_of(ours))
    assert_same_whole(ours, theirs)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("format_name", ["fp32", "bf16", "8bit-split24", "master"])
def test_fsdp2_trains_as_one_process(ranks: Ranks, world: int, format_name: str) -> None:
    ranks(world, _trains_as_one, format_name=format_name)


def _averages(rank: int, world: int, format_name: str) -> None:
    """Optimizers with two modes: weights are switched shard by shard."""
    dtype, kwargs = FORMATS[format_name]
    model, twin = transformer(dtype=dtype), transformer(dtype=dtype)
    shard(model)
    ours, theirs = (
        fusedopt.AdamWScheduleFree(m.parameters(), lr=1e-2, warmup_steps=2, seed=3, **kwargs) for m in (model, twin)
    )
    for step in range(3):
        for each, optimizer in ((model, ours), (twin, theirs)):
            train(each, optimizer, [step])
            optimizer.eval()
        assert_same_whole(ours, theirs)
        ours.train()
        theirs.train()
        assert_same_whole(ours, theirs)
    assert any("z" in held for held in ours.state.values())


@pytest.mark.parametrize("format_name", ["fp32", "8bit-split24"])
def test_averages_of_shards(ranks: Ranks, format_name: str) -> None:
    ranks(2, _averages, format_name=format_name)


@pytest.mark.thorough
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("format_name", ["8bit", "kahan"])
def test_fsdp2_trains_as_one_process_in_other_formats(ranks: Ranks, world: int, format_name: str) -> None:
    ranks(world, _trains_as_one, format_name=format_name)


def test_replicas_of_shards_train_as_one_process(ranks: Ranks) -> None:
    ranks(4, _trains_as_one, format_name="8bit-split24", replicates=True)


def _precision_policies(rank: int, world: int) -> None:
    """float32 parameters whose forward and backward passes are in bfloat16; gradients arrive in float32."""
    model, twin = transformer(), transformer()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    kwargs = {"lr": 1e-2, **EIGHT_BIT}
    ours, theirs = fusedopt.AdamW(model.parameters(), **kwargs), fusedopt.AdamW(twin.parameters(), **kwargs)
    for step in range(3):
        loss_of(model, tokens(step + rank)).backward()
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            other.grad = None if param.grad is None else param.grad.full_tensor()
            assert param.grad is None or param.grad.dtype == torch.float32
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert_same_whole(ours, theirs)


def test_mixed_precision_policies(ranks: Ranks) -> None:
    ranks(2, _precision_policies)


def _accumulates(rank: int, world: int) -> None:
    """Two micro-batches, whose gradients are only reduced with the second."""
    model, twin = transformer(), transformer()
    shard(model)
    ours, theirs = fusedopt.AdamW(model.parameters(), lr=1e-2), fusedopt.AdamW(twin.parameters(), lr=1e-2)
    for step in range(2):
        for part in (0, 1):
            model.set_requires_gradient_sync(part == 1)
            loss_of(model, tokens(2 * step + part)).backward()
            loss_of(twin, tokens(2 * step + part)).backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_same_whole(ours, theirs)


def test_accumulated_gradients(ranks: Ranks) -> None:
    ranks(2, _accumulates)


def _data_parallel(rank: int, world: int, zero: bool) -> list[float]:
    """DDP, and the optimizer's states shared out (ZeRO-1), which is resumed in the middle."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    kwargs = {"lr": 1e-2, "seed": 3, **EIGHT_BIT}
    model, twin = transformer(), transformer()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)

    def make() -> torch.optim.Optimizer:
        params = [param for param in model.parameters() if param.requires_grad]
        if not zero:
            return fusedopt.AdamW(params, **kwargs)
        return ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.AdamW, **kwargs)

    ours, theirs = make(), fusedopt.AdamW([p for p in twin.parameters() if p.requires_grad], **kwargs)
    train(parallel, ours, range(2))
    if zero:
        ours.consolidate_state_dict(0)
        states = [ours.state_dict() if rank == 0 else None]
        torch.distributed.broadcast_object_list(states)
        ours = make()
        ours.load_state_dict(states[0])
    else:
        states = ours.state_dict()
        ours = make()
        ours.load_state_dict(states)
    losses = train(parallel, ours, range(2, 4))
    # find_unused_parameters leaves zeros where the twin has no gradient: those are not compared.
    train(twin, theirs, range(4))
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "unused" not in name:
            assert torch.equal(param, other), name
    return losses


@pytest.mark.parametrize("zero", [False, True], ids=["ddp", "zero1"])
def test_data_parallel_replicas(ranks: Ranks, zero: bool) -> None:
    first, second = ranks(2, _data_parallel, zero=zero)
    assert first == second
