"""The gradient norm of parameters that are spread over processes, and clipping to it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded.layouts import LAYOUTS
from sharded.models import EIGHT_BIT, SHAPES, full_grads, full_params, placed, set_grads, shard, train, transformer
from sharded.ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import fusedopt

# FSDP2 takes no other shards of what tensor parallelism has cut along its first dimension already.
SHARDED_EVENLY = ((128, 256), (64, 12), (7, 192), (31,))


def exact_norm(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))


def same_everywhere(value: Any) -> None:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == values[0] for other in values), values


def recorded_norms(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norms that steps find, in double: `last_grad_norm` has them in float32."""
    from fusedopt.engine import gather

    found: list[float] = []
    clip = gather.clip

    def recording(square_sum: float, multiplier: float, max_grad_norm: float) -> tuple[float, float]:
        result = clip(square_sum, multiplier, max_grad_norm)
        found.append(result[1])
        return result

    monkeypatch.setattr(gather, "clip", recording)
    return found


def _norms(rank: int, world: int) -> None:
    """Shards, replicas of shards, replicas and plain parameters beside each other, each counted once."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    layouts = [(mesh, [Shard(0)]), (square, [Replicate(), Shard(0)]), (mesh, [Replicate()]), None]
    layouts += [(square["shards"], [Shard(0)])]
    with pytest.MonkeyPatch.context() as monkeypatch:
        norms = recorded_norms(monkeypatch)
        params = []
        for i, full in enumerate(full_params(SHAPES)):
            layout = layouts[i % len(layouts)]
            params.append(torch.nn.Parameter(full if layout is None else placed(full, *layout)))
        optimizer = fusedopt.AdamW(params, max_grad_norm=0.5)
        for step in range(3):
            set_grads(optimizer, step)
            optimizer.step()
            expected = exact_norm(full_grads(SHAPES, step))
            assert abs(norms[-1] - expected) <= 1e-12 * expected
            same_everywhere(norms[-1])
            assert optimizer.last_grad_norm.item() == torch.tensor(norms[-1], dtype=torch.float32).item()
        assert len(norms) == 3


def test_the_norm_counts_everything_once(ranks: Ranks) -> None:
    ranks(4, _norms)


def _norms_of_a_layout(rank: int, world: int, layout: str) -> None:
    full = full_params(SHARDED_EVENLY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        norms = recorded_norms(monkeypatch)
        optimizer = fusedopt.AdamW(LAYOUTS[layout][1](world, full), max_grad_norm=0.5)
        set_grads(optimizer, 0)
        optimizer.step()
    expected = exact_norm(full_grads(SHARDED_EVENLY, 0))
    assert norms == [pytest.approx(expected, rel=1e-12)]
    same_everywhere(norms[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_norm_of_what_frameworks_shard(ranks: Ranks, layout: str) -> None:
    ranks(LAYOUTS[layout][0], _norms_of_a_layout, layout=layout)


def _clipped_run(rank: int, world: int, steps: int, kwargs: dict[str, Any]) -> None:
    """FSDP2, clipped, against one process; from the same tokens on every rank."""
    kwargs = {"lr": 1e-2, "max_grad_norm": 0.5, **kwargs}
    model, twin = shard(transformer()), transformer()
    with pytest.MonkeyPatch.context() as monkeypatch:
        norms = recorded_norms(monkeypatch)
        losses = train(model, fusedopt.AdamW(model.parameters(), **kwargs), range(steps))
        ours = list(norms)
        expected = train(twin, fusedopt.AdamW(twin.parameters(), **kwargs), range(steps))
        theirs = norms[len(ours) :]
    assert max(theirs) > 0.5, "nothing was clipped"
    # The first gradients are the same numbers; later ones come from weights that differ by the norm's last bit.
    assert abs(ours[0] - theirs[0]) <= 1e-12 * theirs[0]
    assert max(abs(a - b) for a, b in zip(losses, expected)) <= 1e-6
    same_everywhere((ours, losses))


@pytest.mark.parametrize("kwargs", [{}, EIGHT_BIT], ids=["fp32", "8bit"])
def test_clipped_runs(ranks: Ranks, kwargs: dict[str, Any]) -> None:
    ranks(2, _clipped_run, steps=8, kwargs=kwargs)


@pytest.mark.thorough
@pytest.mark.parametrize("kwargs", [{}, EIGHT_BIT], ids=["fp32", "8bit"])
def test_clipped_runs_of_fifty_steps(ranks: Ranks, kwargs: dict[str, Any]) -> None:
    ranks(2, _clipped_run, steps=50, kwargs=kwargs)


def _stages(rank: int, world: int) -> None:
    """Stages of a pipeline: other parameters on each rank, a mesh of its own on the first two and the last two."""
    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    across, within = meshes["stages"].get_group(), meshes["shards"]
    stage = rank // 2
    shapes = SHAPES[:3] if stage == 0 else SHAPES[3:]
    params = [torch.nn.Parameter(placed(full, within, [Shard(0)])) for full in full_params(shapes)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        norms = recorded_norms(monkeypatch)
        optimizer = fusedopt.AdamW(params, max_grad_norm=0.5, grad_norm_group=across)
        set_grads(optimizer, stage)
        optimizer.step()
        expected = exact_norm(full_grads(SHAPES[:3], 0) + full_grads(SHAPES[3:], 1))
        assert abs(norms[-1] - expected) <= 1e-12 * expected
        same_everywhere(norms[-1])
    assert "grad_norm_group" not in optimizer.state_dict()["param_groups"][0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["grad_norm_group"] is across
    for copied in (copy.deepcopy(optimizer), copy.copy(optimizer)):
        assert copied.param_groups[0]["grad_norm_group"] is copied.defaults["grad_norm_group"] is across
    assert optimizer.param_groups[0]["grad_norm_group"] is optimizer.defaults["grad_norm_group"] is across
    with pytest.raises(TypeError, match=r"grad_norm_group cannot be pickled.*save optimizer\.state_dict\(\)"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match=r"grad_norm_group='stages' is a str; pass a process group"):
        fusedopt.AdamW(params, grad_norm_group="stages")


def test_an_explicit_group(ranks: Ranks) -> None:
    ranks(4, _stages)


def _found_inf(rank: int, world: int, value: float, clips: bool) -> None:
    """A gradient that is not finite on one rank is seen by all: none steps."""
    from torch.amp import GradScaler

    mesh = init_device_mesh("cpu", (world,))
    scaler = GradScaler("cpu", init_scale=64.0)
    param = torch.nn.Parameter(placed(torch.ones(5, 3), mesh, [Shard(0)]))
    options = {"max_grad_norm": 1.0} if clips else {"fused": True}
    optimizer = fusedopt.AdamW([param], lr=0.5, **options)
    scaler.scale(torch.ones(()))
    param.grad = placed(torch.full((5, 3), 64.0), mesh, [Shard(0)])
    if rank == 1:
        param.grad.to_local()[0, 0] = value
    scaler.step(optimizer)
    assert not any(optimizer.state.values()) or float(optimizer.state[param]["step"]) == 0.0
    assert torch.equal(param.full_tensor(), torch.ones(5, 3))
    scaler.update()
    optimizer.grad_scale = torch.tensor(64.0)
    param.grad = placed(torch.full((5, 3), 64.0), mesh, [Shard(0)])
    for knowing in range(world):  # as scalers do that know of one rank only
        optimizer.found_inf = torch.tensor(float(rank == knowing))
        optimizer.step()
        assert torch.equal(param.full_tensor(), torch.ones(5, 3))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1.0
    if clips:
        assert optimizer.last_grad_norm.item() == pytest.approx(math.sqrt(15), rel=1e-6)


@pytest.mark.parametrize("clips", [False, True], ids=["scaled", "clipped"])
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_what_is_not_finite_is_seen_by_all_ranks(ranks: Ranks, value: float, clips: bool) -> None:
    ranks(2, _found_inf, value=value, clips=clips)


def _flat_shards(rank: int, world: int) -> None:
    """FSDP of version 1, whose flat shards are plain tensors; ShardedGradScaler's flag as the step finds it."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(0)
    model = FullyShardedDataParallel(torch.nn.Linear(9, 5), device_id=torch.device("cpu"))
    model(torch.ones(1, 9)).sum().backward()
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=0.1)
    message = r"is a shard of FullyShardedDataParallel.*grad_norm_group=model\.process_group"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=0.1, grad_norm_group=model.process_group)
    optimizer.step()
    # The gradient of each weight is 1, and of each bias.
    assert optimizer.last_grad_norm.item() == pytest.approx(math.sqrt(9 * 5 + 5), rel=1e-6)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=model.process_group)
    scaler.scale(torch.ones(()))
    before = [param.detach().clone() for param in model.parameters()]
    if rank == 0:
        next(model.parameters()).grad[0] = math.inf
    scaler.step(optimizer)
    assert all(torch.equal(param, held) for param, held in zip(model.parameters(), before))


def test_flat_shards(ranks: Ranks) -> None:
    ranks(2, _flat_shards)


def _shared_out(rank: int, world: int, option: str) -> None:
    """torch's ZeroRedundancyOptimizer, under which each rank steps some of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def new(params: Any, **kwargs: Any) -> ZeroRedundancyOptimizer:
        kwargs = {"optimizer_class": fusedopt.AdamW, option: 0.5, **kwargs}
        return ZeroRedundancyOptimizer([torch.nn.Parameter(p.clone()) for p in params], **kwargs)

    params = full_params(SHAPES)
    optimizer = new(params)
    set_grads(optimizer, 0)
    with pytest.raises(ValueError, match=rf"ZeroRedundancyOptimizer gives.*{option}=0\.5.*grad_norm_group=.*WORLD"):
        optimizer.step()
    for param, before in zip(optimizer.param_groups[0]["params"], params):
        assert torch.equal(param, before), "the step was refused"
    optimizer = new(params, grad_norm_group=torch.distributed.group.WORLD)
    set_grads(optimizer, 0)
    optimizer.step()
    expected = exact_norm(full_grads(SHAPES, 0))
    assert optimizer.optim.last_grad_norm.item() == pytest.approx(expected, rel=1e-6)  # is a float32
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict() if rank == 0 else {}
    for group in state.get("param_groups", ()):  # as docs/distributed.md says
        del group["grad_norm_group"]
    shared = [pickle.dumps(state)]
    torch.distributed.broadcast_object_list(shared)
    again = new(params, grad_norm_group=torch.distributed.group.WORLD)
    again.load_state_dict(pickle.loads(shared[0]))
    set_grads(again, 1)
    again.step()
    expected = exact_norm(full_grads(SHAPES, 1))
    assert again.optim.last_grad_norm.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_step_above"])
def test_parameters_that_are_shared_out(ranks: Ranks, option: str) -> None:
    ranks(2, _shared_out, option=option)


def _disagreement(rank: int, world: int, kwargs: list[dict[str, Any]], message: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params([(7, 3), (5, 2)])]
    optimizer = fusedopt.AdamW(params, **kwargs[rank])
    set_grads(optimizer, 0)
    if "gradient" in message and rank == 1:
        params[1].grad = None
    before = [param.to_local().clone() for param in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not any(optimizer.state.values())
    assert all(torch.equal(param.to_local(), held) for param, held in zip(params, before))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ([{}, {"max_grad_norm": 1.0}], r"max_grad_norm of group 0: None on rank 0, 1.0 on rank 1"),
        ([{"state_dtype": "bfloat16"}, {}], r"state_dtype of group 0: 'bfloat16' on rank 0, 'float32' on rank 1"),
        ([{}, {}], r"the gradient of parameter 1 of group 0: 'one' on rank 0, 'none' on rank 1"),
    ],
    ids=["norm", "format", "gradients"],
)
def test_ranks_that_disagree_all_raise(ranks: Ranks, kwargs: list[dict[str, Any]], message: str) -> None:
    ranks(2, _disagreement, kwargs=kwargs, message=message)


def _later_disagreement(rank: int, world: int) -> None:
    """A gradient that one rank lacks in a later step, and options that all ranks change at a time."""
    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params([(7, 3), (5, 2)])]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    set_grads(optimizer, 0)
    optimizer.step()
    if rank == 0:
        params[0].grad = None
    with pytest.raises(ValueError, match="the gradient of parameter 0 of group 0: 'none' on rank 0, 'one' on rank 1"):
        optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 1.0
    set_grads(optimizer, 1)
    optimizer.step()
    optimizer.param_groups[0]["seed"] = rank
    with pytest.raises(ValueError, match="seed of group 0: 0 on rank 0, 1 on rank 1"):
        optimizer.step()
    optimizer.param_groups[0]["seed"] = 0
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 3.0


def test_ranks_that_come_to_disagree_all_raise(ranks: Ranks) -> None:
    ranks(2, _later_disagreement)
