"""How far a step moves parameters that are spread over processes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded.models import EIGHT_BIT, SHAPES, full_grads, full_params, placed, set_grads
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import fusedopt


def _update_norms(rank: int, world: int, kwargs: dict[str, Any]) -> None:
    """Shards, replicas of shards, replicas and plain parameters beside each other, each counted once and wholly."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    layouts = [(mesh, [Shard(0)]), (square, [Replicate(), Shard(0)]), (mesh, [Replicate()]), None]
    layouts += [(square["shards"], [Shard(0)])]
    reports = []
    for is_placed in (True, False):
        params = []
        for i, full in enumerate(full_params(SHAPES)):
            layout = layouts[i % len(layouts)] if is_placed else None
            params.append(torch.nn.Parameter(full if layout is None else placed(full, *layout)))
        idle = torch.nn.Parameter(placed(torch.ones(8, 4), mesh, [Shard(0)]) if is_placed else torch.ones(8, 4))
        optimizer = fusedopt.AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=1e-2, **kwargs)
        for step in range(2):
            set_grads(optimizer, step)
            optimizer.record_norms(step == 1)
            optimizer.step()
        optimizer.add_param_group({"params": [idle]})  # without a gradient
        set_grads(optimizer, 2)
        idle.grad = None
        optimizer.step()
        reports.append(optimizer.norms_report())
    ours, whole = reports
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, dataclasses.astuple(ours))
    assert all(other == everywhere[0] for other in everywhere)
    assert len(ours.parameters) == len(whole.parameters) == len(full_params(SHAPES))
    found, expected = ([each.total, *each.groups, *each.parameters] for each in reports)
    for one, other in zip(found, expected, strict=True):
        assert (one.where, one.elements) == (other.where, other.elements)
        # Weights have the same bits; in a shard blocks begin elsewhere, and each norm is within 2.7e-7 of the exact one
        # (engine/test_norms.py).
        assert one.update == pytest.approx(other.update, rel=5.4e-7)
        assert one.weight == pytest.approx(other.weight, rel=5.4e-7)
        assert one.update > 0 or not one.elements


@pytest.mark.parametrize("kwargs", [{}, EIGHT_BIT], ids=["fp32", "8bit"])
def test_norms_are_of_whole_parameters(kwargs: dict[str, Any], ranks: Ranks) -> None:
    ranks(4, _update_norms, kwargs=kwargs)


def _goes_on(rank: int, world: int, path: str) -> None:
    """One rank has the file of a run that ended with step 5; the eleventh step is one in which ranks meet."""
    from fusedopt.training import Monitor
    from fusedopt.training.monitor_runs import Reader

    mesh = init_device_mesh("cpu", (world,))
    params = [torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params(SHAPES)]
    params[-1] = torch.nn.Parameter(full_params(SHAPES)[-1])
    optimizer = fusedopt.AdamW(params)
    asked = []
    for steps in (5, 8):
        monitor = Monitor(path if rank == 0 else None, optimizer)
        for step in range(steps):
            set_grads(optimizer, step)
            asked.append(optimizer.records_norms)
            optimizer.step()
            monitor.step(1.0)
        assert monitor.last_step == len(asked)
    assert [step for step, is_asked in enumerate(asked, 1) if is_asked] == [1, 11]
    if rank == 0:
        record = next(each for each in Reader(path).read().records if each["step"] == 11)
        grads = full_grads([tuple(param.shape) for param in params], 5)
        expected = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))
        assert record["grad_norm"] == pytest.approx(expected, rel=1e-6)  # norms of parameters are float32
        assert record["update_norm"] > 0


def _alone(rank: int, world: int) -> None:
    from fusedopt.training import Monitor

    mesh = init_device_mesh("cpu", (world,))
    optimizer = fusedopt.AdamW([torch.nn.Parameter(placed(full, mesh, [Shard(0)])) for full in full_params(SHAPES)])
    monitor = Monitor(None, optimizer, norms_every=None) if rank == 0 else None
    set_grads(optimizer, 0)
    optimizer.step()
    if monitor is not None:
        monitor.step(1.0)
    dist.barrier()


def test_one_rank_may_watch_alone_what_needs_no_others(ranks: Ranks) -> None:
    pytest.importorskip("pydantic")
    pytest.importorskip("ruamel.yaml")
    ranks(2, _alone)


def test_a_run_that_goes_on_looks_at_the_same_steps_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    pytest.importorskip("ruamel.yaml")
    ranks(2, _goes_on, path=str(tmp_path / "run.jsonl"))
