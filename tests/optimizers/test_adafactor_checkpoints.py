"""Adafactor's states: what they are, and how a run is continued from them, ours or somebody else's."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_same_run, copied, make_params, peer, saved, train
from matrices import ADAFACTOR_LOW as LOW
from matrices import ADAFACTOR_SHAPES as SHAPES
from matrices import EXTERNAL

import fusedopt
from fusedopt import Adafactor

sys.path.append(str(Path(__file__).resolve().parents[2]))
from bench.workloads import WORKLOADS


def test_shapes_of_the_states() -> None:
    params = make_params(SHAPES, torch.float16)
    optimizer = train(Adafactor(params, beta1=0.9), 1)
    folded = train(Adafactor(copied(params), fold_conv=True), 1)
    for param, twin in zip(params, folded.param_groups[0]["params"]):
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[param].items()}
        if param.dim() < 2:
            assert shapes == {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
            continue
        row, col = param.shape[:-1], (*param.shape[:-2], param.shape[-1])
        assert shapes == {"step": (), "exp_avg": param.shape, "exp_avg_sq_row": row, "exp_avg_sq_col": col}
        held = folded.state[twin]
        assert held["exp_avg_sq_row"].shape == (row if param.dim() == 2 else param.shape[:1])
        assert held["exp_avg_sq_col"].shape == (col if param.dim() == 2 else (param.shape[1:].numel(),))


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_state_stays_float32_when_it_is_reloaded(beta1: float | None) -> None:
    optimizer = train(Adafactor(make_params(SHAPES, torch.bfloat16), beta1=beta1, state_dtype="bfloat16"), 3)
    resumed = Adafactor(make_params(SHAPES, torch.bfloat16))
    for param, twin in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"]):
        twin.data.copy_(param.data)
    state_dict = saved(optimizer.state_dict())
    resumed.load_state_dict(state_dict)
    assert_same_run(resumed, optimizer)
    for held in resumed.state.values():
        for key, value in held.items():
            assert value.dtype == (torch.bfloat16 if key == "exp_avg" else torch.float32), key
    # state that was rounded by another loader is float32 again
    for held in state_dict["state"].values():
        held.update({key: value.bfloat16() for key, value in held.items() if key != "step"})
    resumed.load_state_dict(state_dict)
    assert all(v.dtype == torch.float32 for h in resumed.state.values() for k, v in h.items() if "_sq" in k)


@pytest.mark.parametrize("kwargs", [{}, {"beta1": 0.9, **EXTERNAL}], ids=["relative", "momentum"])
def test_a_run_of_transformers_is_continued_and_goes_back(kwargs: dict) -> None:
    theirs = train(peer("transformers.optimization").Adafactor(make_params(SHAPES, torch.float32), **kwargs), 4)
    ours = Adafactor(copied(theirs.param_groups[0]["params"]), compat=True)
    ours.load_state_dict(saved(theirs.state_dict()))
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        held = theirs.state[twin]
        assert ours.state[param].keys() == held.keys() - {"RMS"}
        for key, value in ours.state[param].items():
            assert torch.equal(value, torch.tensor(4.0) if key == "step" else held[key])
    for name, value in theirs.param_groups[0].items():
        assert name == "params" or ours.param_groups[0][name] == value
    back = peer("transformers.optimization").Adafactor(copied(theirs.param_groups[0]["params"]))
    back.load_state_dict(saved(ours.state_dict()))
    for run in (ours, theirs, back):
        train(run, 3, first=4)
    for param, *twins in zip(*(run.param_groups[0]["params"] for run in (ours, theirs, back))):
        for twin in twins:
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_run_with_the_schedule_of_transformers_is_continued() -> None:
    """Which leaves in the param groups what it reports."""
    theirs = peer("transformers.optimization").Adafactor(make_params(SHAPES, torch.float32), warmup_init=True)
    schedule = peer("transformers.optimization").AdafactorSchedule(theirs)
    train(theirs, 1)
    schedule.step()
    state_dict = saved(theirs.state_dict())
    assert state_dict["param_groups"][0]["lr"] > 0
    ours = Adafactor(copied(theirs.param_groups[0]["params"]))
    ours.load_state_dict(state_dict)
    assert ours.param_groups[0]["lr"] is None
    train(ours, 1, first=1)
    train(theirs, 1, first=1)
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_run_of_torch_is_continued() -> None:
    theirs = train(torch.optim.Adafactor(make_params(SHAPES, torch.float32), lr=0.1, beta2_decay=-0.5, d=2.0), 4)
    ours = Adafactor(copied(theirs.param_groups[0]["params"]), variant="torch")
    ours.load_state_dict(saved(theirs.state_dict()))
    (group,) = ours.param_groups
    assert (group["lr"], group["decay_rate"], group["clip_threshold"]) == (0.1, -0.5, 2.0)
    assert not {"d", "beta2_decay"} & group.keys()
    train(ours, 3, first=4)
    train(theirs, 3, first=4)
    for param, twin in zip(group["params"], theirs.param_groups[0]["params"]):
        assert not {"row_var", "col_var", "variance"} & ours.state[param].keys()
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
    other = Adafactor(make_params(SHAPES, torch.float32))
    with pytest.raises(ValueError, match="is a knob of torch's; pass variant='torch'"):
        other.load_state_dict(saved(theirs.state_dict()))
    assert not other.state


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("kwargs", [{}, {**LOW, "fold_conv": True}], ids=["default", "low"])
def test_copies_continue_bit_for_bit(kwargs: dict, how: str) -> None:
    optimizer = train(Adafactor(make_params([*SHAPES, (64, 65)], torch.bfloat16), **kwargs), 4)
    if how == "state_dict":
        twin = Adafactor(copied(optimizer.param_groups[0]["params"]))
        twin.load_state_dict(saved(optimizer.state_dict()))
    else:
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    train(optimizer, 3, first=4)
    train(twin, 3, first=4)
    assert_same_run(optimizer, twin)
    assert ("exp_avg_codes" in optimizer.state[optimizer.param_groups[0]["params"][-1]]) == bool(kwargs)


def test_a_state_of_another_layout_is_refused() -> None:
    params = [(8, 4, 3, 3)]
    folded = train(Adafactor(make_params(params, torch.float32), fold_conv=True), 1).state_dict()
    folded["param_groups"][0]["fold_conv"] = False
    with pytest.raises(ValueError, match=r"'exp_avg_sq_row' of shape \(8,\); it must be .* \(8, 4, 3\)"):
        Adafactor(make_params(params, torch.float32)).load_state_dict(folded)


@pytest.mark.parametrize("kwargs", [{}, {"variant": "torch"}, {**EXTERNAL, "beta1": 0.9}], ids=["own", "torch", "lr"])
def test_state_is_made_for_a_distributed_checkpoint(kwargs: dict) -> None:
    """By a step with gradients of 0 and lr 0, which weight decay must not see either."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models, optimizers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(torch.nn.Linear(5, 4))
        optimizers.append(Adafactor(models[-1].parameters(), weight_decay=0.1, **kwargs))
    train(optimizers[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    before = [param.detach().clone() for param in models[1].parameters()]
    state_dict = get_optimizer_state_dict(models[0], optimizers[0])
    set_optimizer_state_dict(models[1], optimizers[1], state_dict)
    assert all(torch.equal(param, value) for param, value in zip(models[1].parameters(), before))
    assert optimizers[1].param_groups[0]["lr"] == kwargs.get("lr", 1e-2 if kwargs else None)
    for optimizer in optimizers:
        train(optimizer, 1, first=2)
    assert_same_run(*optimizers)


def test_packages_that_have_no_such_states_are_refused() -> None:
    optimizer = train(Adafactor(make_params([(64, 64)], torch.float32)), 1)
    for convert in (fusedopt.to_bitsandbytes, fusedopt.to_torchao):
        with pytest.raises((ValueError, ImportError), match=r"exp_avg_sq_row|is written with"):
            convert(optimizer)
    dense = fusedopt.to_torch_state_dict(optimizer)
    twin = Adafactor(make_params([(64, 64)], torch.float32))
    twin.load_state_dict(saved(dense))
    for held, other in zip(optimizer.state.values(), twin.state.values()):
        assert held.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in held.items())


def test_memory_of_gpt2() -> None:
    # Without values: only shapes count.
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in WORKLOADS["W2"].shapes()]
    report = Adafactor(params, state_dtype="8bit").memory_report()
    assert report.numel == WORKLOADS["W2"].numel
    assert report.state_bytes / report.numel <= 0.02
    assert report.unquantized.keys() == {"Adafactor's second moments are few numbers, or those of a vector"}
    assert Adafactor(params, state_dtype="8bit", beta1=0.9).memory_report().bytes_per_param["exp_avg"] < 1.02


def test_memory_report_counts_the_bytes_that_are_there() -> None:
    optimizer = Adafactor(make_params(SHAPES, torch.bfloat16), beta1=0.9, fold_conv=True)
    planned = optimizer.memory_report()
    train(optimizer, 1)
    held = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert optimizer.memory_report() == planned
    assert planned.state_bytes == sum(v.numel() * v.element_size() for v in held)
