"""The step count set by hand to a number: pytorch/pytorch#127197."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, set_grads, train

import fusedopt

SHAPES = [(64, 128), (70,)]


@pytest.mark.parametrize("step", [0, 5, 2.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_number_is_taken_for_the_count(case: Case, step: float) -> None:
    runs = []
    for made in (step, torch.tensor(float(step))):
        optimizer = train(case.ours(make_params(SHAPES, torch.float32), **case.kwargs), 2)
        optimizer.state[optimizer.param_groups[0]["params"][1]]["step"] = made
        runs.append(train(optimizer, 2, first=2))
    assert_same_run(*runs)


@pytest.mark.parametrize(("step", "error"), [("five", TypeError), (-1, ValueError), (None, TypeError)])
def test_what_is_no_count_is_refused_before_anything_moves(step: object, error: type[Exception]) -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 2)
    params = optimizer.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]]["step"] = step
    set_grads(params, 2)
    with pytest.raises(error, match=r"parameter 1 of group 0, of shape \(70,\), state\['step'\]"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before))
