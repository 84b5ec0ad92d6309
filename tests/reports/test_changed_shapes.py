"""A parameter that changes its shape has state of the old one: that is said before anything moves.

Report: pytorch/pytorch#40769, where sizes happen to differ; where only their order does, nothing would notice.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ADAFACTOR, CASES, Case, assert_same_run, make_params, set_grads, train

import fusedopt

pytestmark = pytest.mark.usefixtures("exchange")

CLASSES = [*CASES, ADAFACTOR]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_a_transposed_parameter_is_refused(case: Case, state_dtype: str) -> None:
    params = make_params([(70,), (64, 128)], torch.float32)
    kwargs = {**case.kwargs, "momentum": 0.9} if case.name == "sgd" else case.kwargs
    if case.name != "adafactor":
        kwargs = {**kwargs, "state_dtype": state_dtype}
    optimizer = train(case.ours(params, **kwargs), 2)
    params[1].data = params[1].data.t().contiguous()
    for param in params:
        param.grad = None
    set_grads(params, 2)
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0, of shape \(128, 64\), has a state .*64"):
        optimizer.step()
    assert_same_run(optimizer, before)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_torchs], ids=lambda case: case.name)
def test_torchs_optimizers_refuse_it_too(case: Case) -> None:
    params = make_params([(64, 128)], torch.float32)
    kwargs = {**case.kwargs, "momentum": 0.9} if case.name == "sgd" else case.kwargs
    optimizer = train(case.build_theirs(params, kwargs), 2)
    params[0].data = params[0].data.t().contiguous()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="size"):
        train(optimizer, 1)


def test_a_reshaped_parameter_whose_state_is_gone_begins_anew() -> None:
    (param,) = make_params([(64, 128)], torch.float32)
    optimizer = train(fusedopt.AdamW([param], state_dtype="8bit"), 2)
    del optimizer.state[param]
    param.data = param.data.t().contiguous()
    param.grad = None
    train(optimizer, 1)
    assert optimizer.state[param]["exp_avg_codes"].shape == (128, 64)
    assert float(optimizer.state[param]["step"]) == 1
