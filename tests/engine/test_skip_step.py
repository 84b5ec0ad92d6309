"""skip_step_above: a step whose gradients are too large changes nothing and is not counted, on every path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import ADAFACTOR, CASES, assert_same_bits, assert_same_run, make_params, set_grads

import fusedopt

SHAPES = [(5, 128), (300,), (3, 100)]
PATHS = ["cpu", "eager", "triton", "cuda"]
FACTORS = {"ordinary": 1.0, "large": 1e6, "inf": math.inf, "NaN": math.nan}
LIMIT = 1e3  # above ordinary gradients'


def stepped(backend: str, factors: list[float], case: Any = CASES[0], **kwargs: Any) -> fusedopt.FusedOptimizer:
    """A step for each factor, which the gradients of the step are multiplied by."""
    params = make_params(SHAPES, torch.float32)
    optimizer = case.ours(params, **{**case.kwargs, **kwargs}, backend=backend)
    for factor in factors:
        set_grads(params, 0)
        for param in params:
            param.grad *= factor
        optimizer.step()
    return optimizer


@pytest.fixture
def backend(path: str, request: pytest.FixtureRequest) -> str:
    fixture = {"cuda": "emulated", "triton": "interpreted"}.get(path)
    if fixture is not None:
        request.getfixturevalue(fixture)
    return path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clips", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clips"])
@pytest.mark.parametrize("spoilt", ["large", "inf", "NaN"])
def test_a_step_above_is_left_out(backend: str, path: str, clips: dict[str, float], spoilt: str) -> None:
    found = stepped(backend, [1.0, FACTORS[spoilt], 1.0], skip_step_above=LIMIT, **clips)
    without = stepped(backend, [1.0, 1.0], **clips)
    assert_same_run(found, without)
    assert found.last_grad_norm < LIMIT
    if not clips:  # looking at the norm changes no bit
        assert_same_run(without, stepped("eager", [1.0, 1.0]))
    last = stepped(backend, [1.0, FACTORS[spoilt]], skip_step_above=LIMIT, **clips)
    assert not last.last_grad_norm <= LIMIT  # and so it tells that the step was left out


@pytest.mark.parametrize("path", PATHS)
def test_a_norm_of_just_the_limit_is_not_above(backend: str, path: str) -> None:
    for limit, is_taken in ((3.0, True), (math.nextafter(3.0, 0.0), False)):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.full((4,), 1.5)  # the norm is 3
        found = fusedopt.SGD([param], lr=1.0, skip_step_above=limit, backend=backend)
        found.step()
        assert (found.param_groups[0]["params"][0][0].item() == -0.5) == is_taken
        assert_same_bits(found.last_grad_norm, torch.tensor(3.0))


@pytest.mark.parametrize("path", PATHS)
def test_rules_that_take_sums_are_left_out_too(backend: str, path: str) -> None:
    assert_same_run(
        stepped(backend, [1.0, 1e6, 1.0], ADAFACTOR, skip_step_above=LIMIT), stepped(backend, [1.0, 1.0], ADAFACTOR)
    )


def test_with_a_loss_scale_the_norm_is_that_of_unscaled_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([param], lr=1.0, skip_step_above=3.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, expected in ((1.5, -0.5), (2.0, -0.5)):
        optimizer.zero_grad()
        scaler.scale((factor * param).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert param[0].item() == expected
    assert optimizer.last_grad_norm.item() == 4.0


def test_a_compiled_step_leaves_it_out() -> None:
    found = []
    for compiles in (False, True):
        params = make_params(SHAPES, torch.float32)
        optimizer = fusedopt.AdamW(params, skip_step_above=LIMIT)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for factor in (1.0, 1e6, 1.0):
            set_grads(params, 0)
            for param in params:
                param.grad *= factor
            step()
        found.append(optimizer)
    assert_same_run(*found)


def test_it_must_be_one_number_above_0() -> None:
    params = make_params(SHAPES, torch.float32)
    with pytest.raises(ValueError, match=r"skip_step_above=0\.0 is not positive; pass a number above 0"):
        fusedopt.AdamW(params, skip_step_above=0)
    groups = [{"params": params[:1], "skip_step_above": 1.0}, {"params": params[1:]}]
    optimizer = fusedopt.AdamW(groups)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"skip_step_above differs between param groups \(\[1\.0, None\]\)"):
        optimizer.step()


@pytest.mark.parametrize("path", PATHS)
def test_norms_stay_those_of_the_last_step_that_was_taken(backend: str, path: str) -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, skip_step_above=LIMIT, backend=backend)
    optimizer.record_norms()
    for factor in (1.0, 1e6, math.nan):
        set_grads(params, 0)
        for param in params:
            param.grad *= factor
        optimizer.step()
        if factor == 1.0:
            report = optimizer.norms_report()
            assert report.total.update > 0
        assert optimizer.norms_report() == report
    optimizer.record_norms()
    optimizer.step()
    with pytest.raises(ValueError, match="no norms were taken"):
        optimizer.norms_report()
