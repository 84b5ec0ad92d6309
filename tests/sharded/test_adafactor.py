"""Adafactor of sharded parameters: sums over rows, columns and the whole go over all shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded.models import full_grads, full_params, params_of, placed, set_grads, whole
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt

SHAPES = ((67, 71), (2, 300), (31,), (1,), (5, 0), (7, 6, 64), (700, 5))
VARIANTS: dict[str, dict[str, Any]] = {
    "relative": {},
    "momentum": {"beta1": 0.9, "clip_threshold": 0.1, "weight_decay": 0.1},
    "torch": {"variant": "torch", "lr": 1e-2, "weight_decay": 0.1},
}


def _layouts(world: int) -> list[tuple[Any, list[Any]]]:
    line = init_device_mesh("cpu", (world,))
    found = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [(square, [Shard(0), Shard(1)]), (square, [Replicate(), Shard(0)]), (square, [Shard(1), Replicate()])]
    return found


def _equals_one_process(rank: int, world: int, variants: list[str]) -> None:
    for mesh, placements in _layouts(world):
        for variant in variants:
            options = VARIANTS[variant]
            params = []
            for full in full_params(SHAPES):
                fits = all(p.is_replicate() or p.dim < full.dim() for p in placements)
                params.append(torch.nn.Parameter(placed(full, mesh, placements) if fits else full))
            twins = [torch.nn.Parameter(full) for full in full_params(SHAPES)]
            ours, theirs = fusedopt.Adafactor(params, **options), fusedopt.Adafactor(twins, **options)
            for step in range(3):
                for optimizer in (ours, theirs):
                    set_grads(optimizer, step)
                    optimizer.step()
            for param, twin in zip(params, twins):
                weights = whole(param)
                assert torch.allclose(weights, twin, rtol=1e-6, atol=1e-6)
                for key, value in theirs.state[twin].items():
                    held = ours.state[param][key]
                    assert isinstance(held, DTensor) or key == "step" or not isinstance(param, DTensor)
                    assert whole(held).shape == value.shape
                    assert torch.allclose(whole(held), value, rtol=1e-6, atol=1e-12)
                everywhere = [torch.empty_like(weights) for _ in range(world)]
                dist.all_gather(everywhere, weights.contiguous())
                assert all(torch.equal(other, weights) for other in everywhere), "replicas have gone apart"
            # Sums are the same but for the order of additions.
            assert ours.actual_lrs() == pytest.approx(theirs.actual_lrs(), rel=1e-9)


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.thorough)])
def test_shards_give_what_one_process_gives(ranks: Ranks, world: int) -> None:
    ranks(world, _equals_one_process, variants=["momentum", "torch"])


@pytest.mark.thorough
def test_shards_give_what_one_process_gives_in_all_variants(ranks: Ranks) -> None:
    ranks(2, _equals_one_process, variants=list(VARIANTS))


def _refusals(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    (full,) = full_params([(7, 6, 64)])
    (grad,) = full_grads([(7, 6, 64)], 0)

    def stepped(placement: Any, **options: Any) -> fusedopt.Adafactor:
        param = torch.nn.Parameter(placed(full.clone(), mesh, [placement]))
        param.grad = placed(grad, mesh, [placement])
        optimizer = fusedopt.Adafactor([param], **options)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"sharded along dimension 1, which fold_conv=True folds into the columns"):
        stepped(Shard(1), fold_conv=True)
    with pytest.raises(ValueError, match=r"cannot be stepped by backend='cpu' as it is sharded.*use backend='auto'"):
        stepped(Shard(0), backend="cpu")
    folded = stepped(Shard(0), fold_conv=True)
    twin = torch.nn.Parameter(full.clone())
    twin.grad = grad
    fusedopt.Adafactor([twin], fold_conv=True).step()
    assert torch.allclose(whole(params_of(folded)[0]), twin, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_summed_is_refused(ranks: Ranks) -> None:
    ranks(2, _refusals)


def _disagreement(rank: int, world: int) -> None:
    """A gradient that one rank lacks would leave the others waiting for its sums."""
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params([(7, 3), (5, 2)])]
    optimizer = fusedopt.Adafactor(params)
    set_grads(optimizer, 0)
    optimizer.step()
    set_grads(optimizer, 1)
    if rank == 0:
        params[1].grad = None
    with pytest.raises(ValueError, match="the gradient of parameter 1 of group 0: 'none' on rank 0, 'one' on rank 1"):
        optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1.0


def test_ranks_that_lack_gradients_all_raise(ranks: Ranks) -> None:
    ranks(2, _disagreement)
