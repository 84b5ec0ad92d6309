"""Released gradients of shards: clipped to norms over all ranks, with the bits of one process."""

from __future__ import annotations

import weakref
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
    whole,
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


def sharded_after(model: torch.nn.Module, optimizer: fusedopt.FusedOptimizer) -> None:
    """As accelerate does: the optimizer is there before the shards, which then take the places of its parameters."""
    names = {param: name for name, param in model.named_parameters()}
    shard(model)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[param]] for param in group["params"]]


def _places_taken(rank: int, world: int, clip: str | None, by_handle: bool) -> None:
    model, twin = transformer(), transformer()
    options = {"lr": 1e-2} if clip is None else {"lr": 1e-2, "max_grad_norm": 0.1, "clip": clip}
    ours, theirs = (fusedopt.create_optimizer("lomo", of.parameters(), **options) for of in (model, twin))
    before = [weakref.ref(param) for param in model.parameters()]
    sharded_after(model, ours)
    shards = params_of(ours)
    for step in range(3):
        for optimizer, of in ((ours, model), (theirs, twin)):
            loss, handle = loss_of(of, tokens(step)), optimizer.release_handle
            if by_handle or step:
                handle.backward(loss)
                assert sum(param.grad is not None for param in params_of(optimizer)) < len(shards)
                assert handle._settings is not None or handle._pending, "no hook has seen a gradient"
            elif optimizer is ours or clip != "exact":
                loss.backward()  # without hooks: step() finds the gradients
            else:
                handle.backward(loss)
            optimizer.step()
    assert all(param is place for param, place in zip(ours.release_handle._places, shards, strict=True))
    assert all(param is hooked for param, hooked in zip((p for p in shards if p.requires_grad), ours._release._hooks))
    assert not any(ref() is not None and not isinstance(ref(), DTensor) for ref in before), "a parameter is kept"
    assert_same_whole(ours, theirs)
    assert not torch.equal(whole(params_of(ours)[0]), next(transformer().parameters()))


@pytest.mark.parametrize(("clip", "by_handle"), [(None, True), (None, False), ("exact", True), ("exact", False)])
def test_shards_take_the_places_of_parameters(ranks: Ranks, clip: str | None, by_handle: bool) -> None:
    ranks(2, _places_taken, clip=clip, by_handle=by_handle)


def _sums_taken(rank: int, world: int, by_handle: bool) -> None:
    model = transformer()
    optimizer = fusedopt.create_optimizer("adalomo", model.parameters())
    sharded_after(model, optimizer)
    before = [whole(param).clone() for param in params_of(optimizer)]
    loss = loss_of(model, tokens(0))
    if not by_handle:
        loss.backward()
    with pytest.raises(ValueError, match=r"Adafactor sums over the shards of DTensors"):
        optimizer.release_handle.backward(loss) if by_handle else optimizer.step()
    assert by_handle is all(param.grad is None for param in params_of(optimizer))
    assert all(torch.equal(whole(param), old) for param, old in zip(params_of(optimizer), before))


@pytest.mark.parametrize("by_handle", [True, False])
def test_shards_that_are_summed_over_are_refused_later_too(ranks: Ranks, by_handle: bool) -> None:
    ranks(2, _sums_taken, by_handle=by_handle)


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
