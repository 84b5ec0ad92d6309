"""Released gradients of shards: clipped to norms over all ranks, with the bits of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded.models import (
    SHAPES,
    assert_same_whole,
    full_grads,
    full_params,
    loss_of,
    params_of,
    placed,
    shard,
    tokens,
    transformer,
)
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt

CLIPS = ("exact", "previous", "parameter")


def same_everywhere(value: Any) -> None:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == values[0] for other in values), values


def assert_same_clipping(ours: Any, theirs: Any) -> None:
    """Norms are sums of doubles in another order; in float32, as multipliers are, they round to the same."""
    assert_same_whole(ours, theirs)
    assert torch.equal(ours.last_grad_norm, theirs.last_grad_norm)
    same_everywhere(ours._release.state_dict())


def counted_meetings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of what ranks gather, each time."""
    from fusedopt.engine import collectives

    found: list[int] = []
    gathered = collectives.gathered

    def counting(row: torch.Tensor, group: Any) -> torch.Tensor:
        found.append(row.numel())
        return gathered(row, group)

    monkeypatch.setattr(collectives, "gathered", counting)
    return found


def _models(rank: int, world: int, clip: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _train_models(clip, monkeypatch)


def _train_models(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = transformer(), transformer()
    shard(model)
    ours, theirs = (fusedopt.AdamW(of.parameters(), lr=1e-2, max_grad_norm=0.1) for of in (model, twin))
    # FSDP2 has gradients in another order, and what "previous" expects goes by those that are there.
    numel = 2**20 if clip == "previous" else 6000
    handles = [fusedopt.release_gradients(each, bucket_numel=numel, clip=clip) for each in (ours, theirs)]
    meetings = counted_meetings(monkeypatch)
    for step in range(3):
        meetings.clear()
        for optimizer, of, handle in zip((ours, theirs), (model, twin), handles):
            handle.backward(loss_of(of, tokens(step)))
            assert clip == "previous" or sum(param.grad is not None for param in params_of(optimizer)) < 5
            optimizer.step()
        # In the first step ranks compare what they are about to do as well. All gradients are in one bucket of
        # "previous" here, as they are measured at once with "exact".
        if clip != "parameter":
            assert len(meetings) == (2 if step == 0 else 1)
    assert_same_clipping(ours, theirs)


@pytest.mark.parametrize("clip", CLIPS)
def test_fsdp(ranks: Ranks, clip: str) -> None:
    ranks(2, _models, clip=clip)


class Loss:
    """What gives parameters the gradients of a step, the last ones first, for as many passes as are asked for."""

    def __init__(self, params: Sequence[Any], step: int) -> None:
        self.params = params
        grads = full_grads([tuple(param.shape) for param in params], step)
        self.grads = [
            placed(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad
            for param, grad in zip(params, grads)
        ]

    def backward(self, retain_graph: bool = False) -> None:
        for param, grad in reversed([*zip(self.params, self.grads)]):
            torch.autograd.backward([param], [grad])

    def detach(self) -> Loss:
        return self


def _layouts(rank: int, world: int, clip: str) -> None:
    """Shards, replicas of shards, replicas and plain parameters beside each other, each counted once."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    layouts = [(mesh, [Shard(0)]), (square, [Replicate(), Shard(0)]), (mesh, [Replicate()]), None]
    params: list[list[Any]] = [[], []]
    for i, full in enumerate(full_params(SHAPES)):
        layout = layouts[i % len(layouts)]
        params[0].append(torch.nn.Parameter(full.clone() if layout is None else placed(full, *layout)))
        params[1].append(torch.nn.Parameter(full.clone()))
    optimizers = [fusedopt.AdamW(each, lr=1e-2, max_grad_norm=0.5) for each in params]
    handles = [fusedopt.release_gradients(each, bucket_numel=3000, clip=clip) for each in optimizers]
    for step in range(3):
        for optimizer, each, handle in zip(optimizers, params, handles):
            handle.backward(lambda each=each, step=step: Loss(each, step))
            optimizer.step()
    assert_same_clipping(*optimizers)


@pytest.mark.parametrize("clip", CLIPS)
def test_shards_and_replicas(ranks: Ranks, clip: str) -> None:
    ranks(4, _layouts, clip=clip)


def _disagreement(rank: int, world: int) -> None:
    """In the second step, where nothing is compared but what ranks gather for the norm."""
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params(SHAPES[:2])]
    optimizer = fusedopt.AdamW(params, max_grad_norm=0.5)
    fusedopt.release_gradients(optimizer, clip="parameter")
    Loss(params, 0).backward()
    optimizer.step()
    before = [param.full_tensor().detach().clone() for param in params]
    Loss(params[rank:], 1).backward()
    with pytest.raises(
        ValueError, match="ranks disagree about the gradient of parameter 0 of group 0: 'one' on rank 0"
    ):
        optimizer.step()
    assert all(torch.equal(param.full_tensor(), old) for param, old in zip(params, before))


def _other_options(rank: int, world: int) -> None:
    """One rank changes an option after the first step: what it then compares is met by the norm of the other."""
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params(SHAPES[:2])]
    params.append(torch.nn.Parameter(full_params(SHAPES[2:3])[0]))
    optimizer = fusedopt.AdamW(params, max_grad_norm=0.5)
    fusedopt.release_gradients(optimizer, clip="parameter")
    Loss(params, 0).backward()
    optimizer.step()
    optimizer.param_groups[0]["seed"] = rank
    Loss(params, 1).backward()
    with pytest.raises(ValueError, match="seed of group 0: 0 on rank 0, 1 on rank 1"):
        optimizer.step()


def test_ranks_with_other_options_find_out(ranks: Ranks) -> None:
    ranks(2, _other_options)


def test_ranks_with_other_gradients_find_out(ranks: Ranks) -> None:
    ranks(2, _disagreement)
