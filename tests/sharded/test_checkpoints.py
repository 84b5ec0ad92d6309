"""Checkpoints of sharded optimizers: resharded in mid-run, gathered whole, torch's."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import assert_same_bits
from sharded.models import (
    EIGHT_BIT,
    assert_same_whole,
    full_params,
    params_of,
    placed,
    shard,
    step_both,
    transformer,
    whole,
)
from sharded.ranks import Ranks, RanksFailedError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fusedopt

KWARGS: dict[str, Any] = {"lr": 1e-2, "seed": 3, **EIGHT_BIT, "master_weights": "split24"}
DTYPE = torch.bfloat16


def _options(flattens: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flattens)


def _twins(**kwargs: Any) -> tuple[Any, Any, Any]:
    """A sharded model and its optimizer, and the optimizer of one that is not."""
    model = shard(transformer(dtype=DTYPE))
    kwargs = {**KWARGS, **kwargs}
    theirs = fusedopt.AdamW(transformer(dtype=DTYPE).parameters(), **kwargs)
    return model, fusedopt.AdamW(model.parameters(), **kwargs), theirs


def _goes_on(rank: int, world: int, folder: str, part: int, flattens: bool) -> None:
    """One part of a run: loads where the last stopped, takes two steps, saves; equals the run that never stops."""
    model, ours, theirs = _twins()
    for step in range(2 * part):
        step_both(None, theirs, [step], DTYPE)
    if part > 0:
        weights, states = get_state_dict(model, ours, options=_options(flattens))
        assert all(float(held["step"]) == 0 for held in ours.state.values())
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{part - 1}")
        set_state_dict(model, ours, model_state_dict=weights, optim_state_dict=states, options=_options(flattens))
        assert_same_whole(ours, theirs)
    step_both(ours, theirs, range(2 * part, 2 * part + 2), DTYPE)
    assert_same_whole(ours, theirs)
    weights, states = get_state_dict(model, ours, options=_options(flattens))
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{part}")


@pytest.mark.parametrize("flattens", [False, True], ids=["nested", "flattened"])
def test_a_run_is_resharded_and_goes_on(ranks: Ranks, tmp_path: Path, flattens: bool) -> None:
    """With 8-bit states and 24-bit weights, uneven and empty shards: the bits of never stopping."""
    for part, world in enumerate((2, 3, 1, 4) if not flattens else (3, 2)):
        ranks(world, _goes_on, folder=str(tmp_path), part=part, flattens=flattens)


@pytest.mark.thorough
@pytest.mark.parametrize("worlds", [(1, 2), (1, 3), (2, 1), (3, 1), (2, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("flattens", [False, True], ids=["nested", "flattened"])
def test_every_direction(ranks: Ranks, tmp_path: Path, worlds: tuple[int, ...], flattens: bool) -> None:
    for part, world in enumerate(worlds):
        ranks(world, _goes_on, folder=str(tmp_path), part=part, flattens=flattens)


def _before_steps(rank: int, world: int) -> None:
    """State that is asked for explicitly, or as torch does, by a step of zeros with a learning rate of 0."""
    _, ours, theirs = _twins()
    model, asked, _ = _twins()
    ours.init_state()
    theirs.init_state()
    get_optimizer_state_dict(model, asked)
    for optimizer in (ours, asked):
        assert_same_whole(optimizer, theirs)
        assert all(float(held["step"]) == 0 for held in optimizer.state.values())
    step_both(ours, theirs, [0], DTYPE)
    assert_same_whole(ours, theirs)


def test_state_before_the_first_step(ranks: Ranks) -> None:
    ranks(3, _before_steps)


def _full_state_dicts(rank: int, world: int, master: str) -> None:
    """A state dict gathered whole goes into the optimizer of one process, and back into shards."""
    model, ours, theirs = _twins(master_weights=master)
    step_both(ours, theirs, range(2), DTYPE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, ours, options=options)
    if rank == 0:
        alone = transformer(seed=1, dtype=DTYPE)
        single = fusedopt.AdamW(alone.parameters(), **{**KWARGS, "master_weights": master})
        set_model_state_dict(alone, weights)
        set_optimizer_state_dict(alone, single, states)
        assert_same_whole(single, theirs)
    again, other, _ = _twins(master_weights=master)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, weights, options=options)
    set_optimizer_state_dict(again, other, states, options=options)
    assert_same_whole(other, theirs)
    step_both(other, theirs, [2], DTYPE)
    assert_same_whole(other, theirs)


@pytest.mark.parametrize("master", ["split24", "split32"])
def test_full_state_dicts(ranks: Ranks, master: str) -> None:
    ranks(3, _full_state_dicts, master=master)


def _killed(rank: int, world: int, folder: str) -> None:
    """One rank is killed while a checkpoint is written, with some of its files there."""
    model, ours, theirs = _twins()
    step_both(ours, theirs, range(2), DTYPE)

    def saved(name: str) -> None:
        weights, states = get_state_dict(model, ours)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{name}")

    saved("0")
    step_both(ours, theirs, [2], DTYPE)
    if rank == 1:
        write = dcp.FileSystemWriter.write_data

        def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
            write(self, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        dcp.FileSystemWriter.write_data = dies
    saved("1")


def test_a_rank_that_is_killed_leaves_the_checkpoint_before(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError):
        ranks(2, _killed, folder=str(tmp_path))
    assert not (tmp_path / "1" / ".metadata").exists(), "a checkpoint that is not whole would pass for one"
    ranks(2, _goes_on, folder=str(tmp_path), part=1, flattens=False)


def _torchs_checkpoint(rank: int, world: int, folder: str) -> None:
    """What torch.optim.AdamW has saved is loaded by ours, and the other way round."""
    model = shard(transformer())
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step_both(theirs, None, range(2))
    dcp.save({"optimizer": get_optimizer_state_dict(model, theirs)}, checkpoint_id=f"{folder}/theirs")

    ours = fusedopt.AdamW(model.parameters())
    states = get_optimizer_state_dict(model, ours)
    dcp.load({"optimizer": states}, checkpoint_id=f"{folder}/theirs")
    set_optimizer_state_dict(model, ours, states)
    assert ours.param_groups[0]["lr"] == 1e-2
    _assert_same_moments(ours, theirs)

    dcp.save({"optimizer": get_optimizer_state_dict(model, ours)}, checkpoint_id=f"{folder}/ours")
    again = torch.optim.AdamW(model.parameters())
    states = get_optimizer_state_dict(model, again)
    dcp.load({"optimizer": states}, checkpoint_id=f"{folder}/ours")
    set_optimizer_state_dict(model, again, states)
    _assert_same_moments(again, theirs)


def _assert_same_moments(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for param in params_of(theirs):
        assert ours.state[param].keys() == theirs.state[param].keys()
        for key, value in theirs.state[param].items():
            assert_same_bits(whole(ours.state[param][key]), whole(value), key)


def test_torchs_checkpoints_both_ways(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _torchs_checkpoint, folder=str(tmp_path))


def _from_any_mesh(rank: int, world: int) -> None:
    """State dicts and full weights between models that are whole, sharded, and sharded on another mesh."""
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))

    def models() -> list[Any]:
        return [transformer(seed=1, dtype=DTYPE), *(shard(transformer(1, DTYPE), **kw) for kw in ({}, {"mesh": mesh}))]

    for model, source in zip(models(), ("whole", "sharded", "another mesh")):
        ours = fusedopt.AdamW(model.parameters(), **KWARGS)
        step_both(ours, None, range(2), DTYPE)
        weights = fusedopt.fp32_parameters(ours, model)
        for other, target in zip(models(), ("whole", "sharded", "another mesh")):
            again = fusedopt.AdamW(other.parameters(), **KWARGS)
            again.load_state_dict(ours.state_dict())
            fusedopt.load_fp32_parameters(again, other, weights)
            for name, value in fusedopt.fp32_parameters(again, other).items():
                assert_same_bits(whole(value), whole(weights[name]), f"{name}, {source} to {target}")
            for param, twin in zip(params_of(again), params_of(ours), strict=True):
                for key, value in ours.state.get(twin, {}).items():
                    assert_same_bits(whole(again.state[param][key]), whole(value), f"{key}, {source} to {target}")


def test_states_and_weights_come_from_any_mesh_or_none(ranks: Ranks) -> None:
    """Rows that each rank has one of would have been spread over the whole without an error."""
    ranks(2, _from_any_mesh)


def _blocks_that_are_cut(rank: int, world: int) -> None:
    """Codes for shards of columns whose edges lie within blocks, which keep float32 states."""
    mesh = init_device_mesh("cpu", (world,))
    weights = full_params([(64, 96), (13, 192), (5, 256)])  # three blocks, or four, for two ranks or three
    theirs = fusedopt.AdamW([torch.nn.Parameter(weight) for weight in weights], **EIGHT_BIT)
    step_both(None, theirs, range(2))
    by_rows, by_columns = (
        fusedopt.AdamW([torch.nn.Parameter(placed(weight, mesh, [Shard(dim)])) for weight in weights], **EIGHT_BIT)
        for dim in (0, 1)
    )
    expected = fusedopt.to_torch_state_dict(theirs)["state"]
    by_rows.load_state_dict(theirs.state_dict())
    for source in (theirs, by_rows):
        by_columns.load_state_dict(source.state_dict())
        found = fusedopt.to_torch_state_dict(by_columns)["state"]
        for number, param in enumerate(params_of(by_columns)):
            columns = param.shape[1]
            assert ("exp_avg" in by_columns.state[param]) == (columns % (64 * world) != 0), f"{columns} columns"
            for key in ("exp_avg", "exp_avg_sq"):
                assert_same_bits(whole(found[number][key]), expected[number][key], f"{key}, {columns} columns")


@pytest.mark.parametrize("world", [2, 3])
def test_codes_whose_blocks_are_cut_are_decoded_whole(ranks: Ranks, world: int) -> None:
    ranks(world, _blocks_that_are_cut)
