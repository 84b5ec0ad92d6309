"""Adafactor of sharded parameters: sums over rows, columns and the whole go over all shards."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded.models import (
    EIGHT_BIT,
    assert_same_whole,
    full_grads,
    full_params,
    params_of,
    placed,
    set_grads,
    whole,
)
from sharded.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt
from fusedopt.backends import eager
from fusedopt.engine import collectives
from fusedopt.engine import optimizer as optimizer_module
from fusedopt.engine.shard_sums import shard_sums

# Fewer rows than ranks, one element, nothing, several matrices, slabs of rows in each shard, many panels of columns.
SHAPES = ((67, 71), (2, 300), (31,), (1,), (5, 0), (7, 6, 64), (2100, 5), (4, 16500))
VARIANTS: dict[str, dict[str, Any]] = {
    "relative": {},
    "momentum": {"beta1": 0.9, "clip_threshold": 0.1, "weight_decay": 0.1, "max_grad_norm": 1.0},
    "torch": {"variant": "torch", "lr": 1e-2, "weight_decay": 0.1},
    "formats": {"beta1": 0.9, "master_weights": "split24", "seed": 3, **EIGHT_BIT},
}
DTYPES = {"formats": torch.bfloat16}


def _layouts(world: int) -> list[tuple[Any, list[Any]]]:
    line = init_device_mesh("cpu", (world,))
    found = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [(square, [Shard(0), Shard(1)]), (square, [Replicate(), Shard(0)]), (square, [Shard(1), Replicate()])]
    return found


def _params(full: list[Tensor], mesh: Any, placements: list[Any]) -> list[Any]:
    """Parameters in those placements, whole where they have too few dimensions for them."""
    fits = [all(p.is_replicate() or p.dim < each.dim() for p in placements) for each in full]
    return [nn.Parameter(placed(each, mesh, placements) if fit else each) for each, fit in zip(full, fits)]


def _assert_same_on_all_ranks(optimizer: fusedopt.Adafactor, world: int) -> None:
    for param in params_of(optimizer):
        weights = whole(param).float()
        everywhere = [torch.empty_like(weights) for _ in range(world)]
        dist.all_gather(everywhere, weights.contiguous())
        assert all(torch.equal(other, weights) for other in everywhere), "replicas have gone apart"


def _assert_near(ours: fusedopt.Adafactor, theirs: fusedopt.Adafactor) -> None:
    """The states and weights of one process, but for the order of additions."""
    for param, twin in zip(params_of(ours), params_of(theirs)):
        assert torch.allclose(whole(param), twin, rtol=1e-6, atol=1e-6)
        for key, value in theirs.state[twin].items():
            held = ours.state[param][key]
            assert isinstance(held, DTensor) or key == "step" or not isinstance(param, DTensor)
            assert whole(held).shape == value.shape
            # A first moment near 0 is what is left of larger numbers; second moments are sums of squares.
            least = 1e-6 * float(value.abs().max()) if key == "exp_avg" and value.numel() else 1e-12
            assert torch.allclose(whole(held), value, rtol=1e-6, atol=least)
    assert ours.actual_lrs() == pytest.approx(theirs.actual_lrs(), rel=1e-9)


def _equals_one_process(rank: int, world: int, variants: list[str]) -> None:
    for mesh, placements in _layouts(world):
        for variant in variants:
            dtype = DTYPES.get(variant, torch.float32)
            compiled, plain = (
                fusedopt.Adafactor(
                    _params(full_params(SHAPES, dtype), mesh, placements), **VARIANTS[variant], backend=backend
                )
                for backend in ("cpu", "eager")
            )
            alone = fusedopt.Adafactor([nn.Parameter(p) for p in full_params(SHAPES, dtype)], **VARIANTS[variant])
            for optimizer in (compiled, plain, alone):
                optimizer.record_health()
                for step in range(3):
                    set_grads(optimizer, step, dtype)
                    optimizer.step()
            assert_same_whole(compiled, plain)
            assert str(compiled.health_report()) == str(plain.health_report())
            _assert_same_on_all_ranks(compiled, world)
            if dtype == torch.float32:  # the matrix compares other formats, whose rounding makes much of a difference
                _assert_near(compiled, alone)


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.thorough)])
def test_shards_give_what_one_process_gives(ranks: Ranks, world: int) -> None:
    """And compiled passes the bits of plain torch."""
    ranks(world, _equals_one_process, variants=["momentum", "torch"])


@pytest.mark.thorough
def test_shards_give_what_one_process_gives_in_all_variants(ranks: Ranks) -> None:
    ranks(2, _equals_one_process, variants=list(VARIANTS))


def _exact(rank: int, world: int) -> None:
    """Squares of gradients are 1 and weights are eighths, so no sum is rounded."""
    for mesh, placements in _layouts(world):
        full = [(each * 8).round() / 8 for each in full_params(SHAPES)]
        ours = fusedopt.Adafactor(_params(full, mesh, placements), clip_threshold=0.3, beta1=0.9)
        theirs = fusedopt.Adafactor([nn.Parameter(each.clone()) for each in full], clip_threshold=0.3, beta1=0.9)
        for optimizer in (ours, theirs):
            set_grads(optimizer, 0)
            for param in params_of(optimizer):
                param.grad = param.grad.sign()
            optimizer.step()
        assert_same_whole(ours, theirs)


def test_exact_sums_give_the_bits_of_one_process(ranks: Ranks) -> None:
    ranks(3, _exact)


def _compiled_is_used(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(1), Replicate()):
        optimizer = fusedopt.Adafactor(_params(full_params(SHAPES), mesh, [placement]))
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("summing_step", "step_param"):
                monkeypatch.delattr(eager, name)  # nothing is left to plain torch
            for step in range(2):
                set_grads(optimizer, step)
                optimizer.step()
        assert all(float(optimizer.state[param]["step"]) == 2.0 for param in params_of(optimizer))


def test_shards_are_stepped_by_compiled_passes(ranks: Ranks) -> None:
    ranks(2, _compiled_is_used)


def _counted(rank: int, world: int) -> list[list[int]]:
    """How many numbers ranks gather in each collective of a step, by layout."""
    found: list[list[int]] = []
    sizes: list[int] = []
    gathered = collectives.gathered

    def counting(row: Tensor, group: Any) -> Tensor:
        sizes.append(row.numel())
        return gathered(row, group)

    for placement in (Shard(0), Shard(1)):
        params = _params(full_params([(6, 4), (5, 2), (4, 2)]), init_device_mesh("cpu", (world,)), [placement])
        optimizer = fusedopt.Adafactor(params)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(collectives, "gathered", counting)
            for step in range(2):
                sizes.clear()
                set_grads(optimizer, step)
                optimizer.step()
        found.append(list(sizes))
    return found


def test_ranks_meet_once_in_a_round_for_all_parameters(ranks: Ranks) -> None:
    """What they agree on; sums of columns, of rows' averages and of weights' squares; sums of updates' squares.

    Where columns are cut, sums of rows come first, and those of columns are all here.
    """
    by_rows, by_columns = ranks(2, _counted)[0]
    assert by_rows == [5, (4 + 1 + 1) + (2 + 1 + 1) + (2 + 1 + 1), 3]
    assert by_columns == [5, 6 + 5 + 4, 3, 3]


def _asked(rank: int, world: int, placement: Any) -> tuple[int, int]:
    """How often a step asks where the rest of a parameter is, and how often ranks meet."""
    optimizer = fusedopt.Adafactor(_params(full_params(SHAPES), init_device_mesh("cpu", (world,)), [placement]))
    set_grads(optimizer, 0)
    optimizer.step()
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked, met = mock.Mock(side_effect=shard_sums), mock.Mock(side_effect=collectives.gathered)
        monkeypatch.setattr(optimizer_module, "shard_sums", asked)
        monkeypatch.setattr(collectives, "gathered", met)
        set_grads(optimizer, 1)
        optimizer.step()
    return asked.call_count, met.call_count


def test_nothing_is_asked_of_parameters_that_are_all_here(ranks: Ranks) -> None:
    """In Python it would be asked of each, of which there may be thousands."""
    assert ranks(1, _asked, placement=Shard(0)) == [(0, 0)]
    assert ranks(2, _asked, placement=Replicate()) == [(0, 1)] * 2  # they compare whether all have gradients
    assert ranks(2, _asked, placement=Shard(0)) == [(len(SHAPES), 3)] * 2


def _cut_later(rank: int, world: int) -> None:
    """Replicas that are cut into shards between two steps, and whole again later: sums go over ranks meanwhile."""
    mesh = init_device_mesh("cpu", (world,))
    (full,) = full_params([(31,)])
    options = {"clip_threshold": 0.1}
    ours, plain = (
        fusedopt.Adafactor([nn.Parameter(placed(full.clone(), mesh, [Replicate()]))], backend=backend, **options)
        for backend in ("cpu", "eager")
    )
    alone = fusedopt.Adafactor([nn.Parameter(full.clone())], **options)
    for step, placement in enumerate([Replicate(), Shard(0), Replicate()]):
        for optimizer in (ours, plain):
            (param,) = params_of(optimizer)
            held = optimizer.state[param]
            held.update({k: placed(whole(v), mesh, [placement]) for k, v in held.items() if isinstance(v, DTensor)})
            torch.utils.swap_tensors(param, nn.Parameter(placed(whole(param), mesh, [placement])))
        for optimizer in (ours, plain, alone):
            set_grads(optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
        assert_same_whole(ours, plain)
    _assert_near(ours, alone)


def test_replicas_may_be_cut_later(ranks: Ranks) -> None:
    ranks(2, _cut_later)


def _differ_in_backend(rank: int, world: int) -> None:
    """Plain torch on one rank and compiled passes on the other ask for the same sums in the same order."""
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Shard(1)):
        mixed, same = (
            fusedopt.Adafactor(_params(full_params(SHAPES), mesh, [placement]), backend=backend)
            for backend in ("eager" if rank == 0 else "cpu", "cpu")
        )
        for optimizer in (mixed, same):
            for step in range(2):
                set_grads(optimizer, step)
                optimizer.step()
        assert_same_whole(mixed, same)


def test_ranks_may_differ_in_backends(ranks: Ranks) -> None:
    ranks(2, _differ_in_backend)


def _odd(rank: int, world: int) -> None:
    """Cut along the last two of three dimensions: no evenly spread runs, beside shards that are."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    shapes = [(7, 6, 64), (67, 71), (31,)]
    placements = [[Shard(1), Shard(2)], [Shard(0), Shard(1)], [Replicate(), Shard(0)]]

    def of(backend: str) -> fusedopt.Adafactor:
        params = [nn.Parameter(placed(p, mesh, where)) for p, where in zip(full_params(shapes), placements)]
        return fusedopt.Adafactor(params, backend=backend)

    ours, plain = of("auto"), of("eager")
    alone = fusedopt.Adafactor([nn.Parameter(p) for p in full_params(shapes)])
    for optimizer in (ours, plain, alone):
        for step in range(2):
            set_grads(optimizer, step)
            optimizer.step()
    assert_same_whole(ours, plain)
    _assert_same_on_all_ranks(ours, world)
    _assert_near(ours, alone)
    refused = of("cpu")
    set_grads(refused, 0)
    with pytest.raises(ValueError, match=r"cannot be stepped by backend='cpu' as it is sharded.*use backend='auto'"):
        refused.step()


def test_shards_that_are_not_even_are_left_to_plain_torch(ranks: Ranks) -> None:
    ranks(4, _odd)


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
    folded = stepped(Shard(0), fold_conv=True, backend="cpu")
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
