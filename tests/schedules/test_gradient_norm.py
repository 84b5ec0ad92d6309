"""What the rule of the gradient norm measures: the norm of the gradients that the step took, whoever scaled them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.schedules import get_scheduler


def measured(scheduler: Any) -> float:
    """The first measurement is the average."""
    scheduler.step()
    return scheduler.state["average"]


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_grad_norm": 0.5}], ids=str)
def test_gradients_are_unscaled(options: dict[str, Any], unscales: bool) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([param], lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for _ in range(3):  # whose scale grows after each step
        scheduler = get_scheduler("gradient_norm", optimizer)
        optimizer.zero_grad()
        scaler.scale(param.sum()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert measured(scheduler) == 2.0
    scheduler = get_scheduler("gradient_norm", optimizer)
    optimizer.zero_grad()
    (3 * param).sum().backward()  # without the scaler
    optimizer.step()
    assert measured(scheduler) == 6.0


@pytest.mark.parametrize("limit", ["max_grad_norm", "skip_step_above"])
@pytest.mark.parametrize("releases", [False, True])
def test_a_norm_that_steps_find_no_more_is_measured(limit: str, releases: bool) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([param], lr=0.1, **{limit: 5.0})
    for factor, expected in ((1.0, 2.0), (3.0, 6.0)):
        scheduler = get_scheduler("gradient_norm", optimizer)
        optimizer.zero_grad()
        (factor * param).sum().backward()
        optimizer.step()
        assert measured(scheduler) == expected
        if factor == 1.0:
            assert optimizer.last_grad_norm == expected
        optimizer.param_groups[0][limit] = None
    assert optimizer.last_grad_norm is None
    if releases:
        optimizer.last_grad_norm = torch.ones(())
        with fusedopt.release_gradients(optimizer):
            param.sum().backward()
            optimizer.step()
        assert optimizer.last_grad_norm is None


def test_sparse_gradients_have_a_norm() -> None:
    table, dense = nn.Embedding(5, 4, sparse=True), nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([table.weight, dense], lr=0.1)
    scheduler = get_scheduler("gradient_norm", optimizer)
    ((table(torch.tensor([1, 1, 2])) + dense).sum()).backward()
    optimizer.step()
    assert measured(scheduler) == pytest.approx((4 * (2**2 + 1**2 + 3**2)) ** 0.5)  # the rows of one token are added
