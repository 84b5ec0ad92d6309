"""What callbacks report, without a trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.integrations.watching import Watch, unwrapped


def steps(watch: Watch, optimizer: Any, gradients: list[float], is_reported: bool = False) -> None:
    """One step for each gradient, of which the parameter has four elements."""
    (param,) = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        param.grad = torch.full_like(param, gradient)
        watch.before_step(optimizer, is_reported)
        optimizer.step()
        watch.after_step(optimizer)


def make(**kwargs: Any) -> fusedopt.SGD:
    return fusedopt.SGD([torch.nn.Parameter(torch.zeros(4))], lr=1e-3, **kwargs)


def test_the_norm_and_its_largest() -> None:
    optimizer, watch = make(max_grad_norm=1.0), Watch()
    steps(watch, optimizer, [1.0, 3.0, 0.5])
    assert watch.report(optimizer) == ({"grad_norm": 1.0, "grad_norm_max": 6.0, "nonfinite_steps": 0.0}, [])
    steps(watch, optimizer, [2.0])
    assert watch.report(optimizer)[0]["grad_norm_max"] == 4.0  # since the last report
    assert watch.report(optimizer) == ({}, [])


def test_spikes_and_norms_that_are_not_finite() -> None:
    optimizer, watch = make(max_grad_norm=1.0), Watch(spike=5.0)
    steps(watch, optimizer, [1.0] * 50)
    assert watch.report(optimizer)[1] == []
    assert float(watch.average) == pytest.approx(2.0)
    steps(watch, optimizer, [6.0, torch.nan, 1.0])
    scalars, notes = watch.report(optimizer)
    assert scalars["nonfinite_steps"] == 1
    assert notes == [
        "the gradient norm was inf or NaN in 1 of the last 3 steps; record_health() and health_report() say whose "
        "gradients",
        "a gradient norm of the last 3 steps was 6 times its average",
    ]
    # The spike counted for five times the average, and what is not finite for nothing.
    assert float(watch.average) == pytest.approx(0.98 * (0.98 * 2 + 0.02 * 10) + 0.02 * 2)
    steps(watch, optimizer, [4.0])
    assert watch.report(optimizer)[1] == []


def test_the_first_norm_may_be_zero_or_infinite() -> None:
    for first in (0.0, torch.inf):
        optimizer, watch = make(max_grad_norm=1.0), Watch()
        steps(watch, optimizer, [first, 1.0, 1.0])
        scalars, _ = watch.report(optimizer)
        assert scalars["grad_norm"] == 2.0
        assert 0 < float(watch.average) <= 2.0


def test_without_clipping_there_is_no_norm() -> None:
    optimizer, watch = make(), Watch(health=True)
    steps(watch, optimizer, [1.0, torch.inf], is_reported=True)
    scalars, notes = watch.report(optimizer)
    assert scalars.keys() == {"stalled_weights", "saturated_codes"}
    assert notes == ["the gradient of parameter 0 of group 0 was inf or NaN in 4 elements"]
    assert optimizer._health is None  # the steps after it are not counted
    steps(watch, optimizer, [1.0])
    assert watch.report(optimizer) == ({}, [])


def test_it_goes_on_from_its_state() -> None:
    runs = []
    for resumes in (False, True):
        optimizer, watch = make(max_grad_norm=1.0), Watch()
        steps(watch, optimizer, [1.0, 5.0])
        if resumes:
            state = watch.state()
            watch = Watch()
            watch.load(state)
        steps(watch, optimizer, [2.0])
        runs.append(watch.state())
    assert runs[0] == runs[1]
    assert Watch().state() == {"average": None}


def test_wrappers_are_looked_into() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    inner = make()
    assert unwrapped(Wrapper(Wrapper(inner))) is inner
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert unwrapped(Wrapper(other)) is other


def test_what_cannot_be_watched() -> None:
    with pytest.raises(ValueError, match=r"spike=0\.5 would report ordinary steps; pass a number above 1, or None"):
        Watch(spike=0.5)
    with pytest.raises(TypeError, match="health=1 is a int; pass True or False"):
        Watch(health=1)
