"""State that is cleared or moved between steps is freed at once, and steps go on from what is there.

Reports: modelscope/ms-swift#7821 and NVIDIA/Megatron-LM#3112: reinforcement learning moves optimizer state off the
device for every round of generation, and memory that something else refers to is not freed.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, train
from torch import Tensor

import fusedopt

pytestmark = pytest.mark.usefixtures("exchange")

SHAPES = [(64, 128), (70,), ()]


def made(case: Case, backend: str) -> fusedopt.FusedOptimizer:
    params = make_params(SHAPES, torch.bfloat16)
    return case.ours(params, **case.kwargs, state_dtype="8bit", master_weights="split24", backend=backend)


def weak(optimizer: torch.optim.Optimizer) -> list[weakref.ref[Tensor]]:
    return [weakref.ref(value) for held in optimizer.state.values() for value in held.values()]


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_nothing_keeps_what_was_cleared(case: Case, backend: str) -> None:
    optimizer = train(made(case, backend), 2)
    tensors = weak(optimizer)
    assert tensors
    optimizer.state.clear()
    assert all(tensor() is None for tensor in tensors)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_torchs], ids=lambda case: case.name)
def test_a_step_after_clearing_is_a_first_one_as_torchs(case: Case) -> None:
    # torch's Adagrad makes its state when it is constructed only, and has none to go on with.
    for of in (case.ours, case.theirs) if case.theirs is not torch.optim.Adagrad else (case.ours,):
        runs = []
        for clears in (True, False):
            params = make_params(SHAPES, torch.float32)
            optimizer = train(of(params, **case.kwargs), 2)
            if clears:
                optimizer.state.clear()
            else:
                optimizer = of(params, **case.kwargs)
            runs.append(train(optimizer, 1, first=2))
        for param, twin in zip(*(run.param_groups[0]["params"] for run in runs)):
            assert torch.equal(param, twin)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_nothing_keeps_what_was_replaced_and_steps_go_on(case: Case, backend: str) -> None:
    optimizer = train(made(case, backend), 2)
    expected = train(copy.deepcopy(optimizer), 2, first=2)
    tensors = weak(optimizer)
    for held in optimizer.state.values():
        for key in held:
            held[key] = held[key].clone()
    assert all(tensor() is None for tensor in tensors)
    assert_same_run(train(optimizer, 2, first=2), expected)


def test_state_whose_data_is_rebound_is_read_anew() -> None:
    optimizer = train(made(CASES[0], "cpu"), 2)
    expected = train(copy.deepcopy(optimizer), 2, first=2)
    for held in optimizer.state.values():
        for value in held.values():
            value.data = value.data.clone()
    assert_same_run(train(optimizer, 2, first=2), expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_state_of_none_is_one_that_is_not_there(case: Case, backend: str) -> None:
    """Thus momentum is begun anew in torch's SGD, whose state is None before there is any."""
    runs = []
    for is_none in (True, False):
        optimizer = train(case.ours(make_params(SHAPES, torch.float32), **case.kwargs, backend=backend), 2)
        for held in optimizer.state.values():
            for key in [key for key in held if key != "step"]:
                held[key] = None
                if not is_none:
                    del held[key]
        runs.append(train(optimizer, 2, first=2))
    assert_same_run(*runs)


def test_momentum_of_none_begins_anew_as_in_torch() -> None:
    runs = []
    for cls in (fusedopt.SGD, torch.optim.SGD):
        optimizer = train(cls(make_params(SHAPES, torch.float32), lr=0.5, momentum=0.5, dampening=0.25), 2)
        for held in optimizer.state.values():
            held["momentum_buffer"] = None
        runs.append(train(optimizer, 2, first=2))
    for ours, theirs in zip(*(run.param_groups[0]["params"] for run in runs)):
        torch.testing.assert_close(ours, theirs)  # the order of roundings is another
