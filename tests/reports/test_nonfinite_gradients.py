"""Which parameter it was whose gradient became inf or NaN, and when: Lightning-AI/pytorch-lightning#8313."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import make_params, set_grads

import fusedopt
from fusedopt.engine.reports import HealthReport

SHAPES = [(64, 128), (70,), (8, 9), (5, 64)]
NAMES = ["embed.weight", "head.bias", "gate", "head.weight"]
INF, NAN = float("inf"), float("nan")
# (step, parameter, elements, value)
FAULTS = [(1, 2, 3, NAN), (2, 0, 1, INF), (2, 2, 1, -INF), (2, 1, 70, NAN), (4, 0, 2, NAN)]


def counted(params: list[Any], order: list[int], **kwargs: Any) -> HealthReport:
    """The report of five steps in which the gradients of some of the `order`-ed parameters are not finite."""
    optimizer = fusedopt.AdamW(params, **kwargs)
    optimizer.record_health()
    listed = [param for group in optimizer.param_groups for param in group["params"]]
    by_shape = [listed[i] for i in order]
    for step in range(5):
        set_grads(listed, step)
        for at, which, elements, value in FAULTS:
            if at == step:
                by_shape[which].grad.flatten()[:elements] = value
        optimizer.step()
    return optimizer.health_report()


def found(report: HealthReport) -> list[tuple[str, int, int, int]]:
    return [(f.where, f.elements, f.steps, f.first_step) for f in report.nonfinite]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit", "min_quantized_numel": 1}], ids=["fp32", "8bit"])
def test_named(backend: str, kwargs: dict[str, Any]) -> None:
    report = counted(list(zip(NAMES, make_params(SHAPES, torch.float32))), [0, 1, 2, 3], backend=backend, **kwargs)
    # From the first step; of the same step, most elements first. Steps are counted from 1.
    assert found(report) == [("gate", 4, 2, 2), ("head.bias", 70, 1, 3), ("embed.weight", 3, 2, 3)]
    assert sum(f.elements for f in report.nonfinite) == report.totals["nonfinite_grads"]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_without_names_and_in_two_groups(backend: str) -> None:
    params = make_params(SHAPES, torch.float32)
    groups = [{"params": [params[3], params[0]]}, {"params": [params[2], params[1]], "lr": 0.1}]
    expected = [("parameter 0 of group 1", 4, 2, 2), ("parameter 1 of group 1", 70, 1, 3)]
    assert found(counted(groups, [1, 3, 2, 0], backend=backend)) == [*expected, ("parameter 1 of group 0", 3, 2, 3)]
    groups = [{"params": [(NAMES[3], params[3]), (NAMES[0], params[0])]}, {"params": [(NAMES[2], params[2])]}]
    assert found(counted(groups, [1, 0, 2, 0], backend=backend))[0] == ("gate", 4, 2, 2)


def test_the_report_in_text() -> None:
    text = str(counted(list(zip(NAMES, make_params(SHAPES, torch.float32))), [0, 1, 2, 3]))
    table = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1  # columns line up
    assert [line.split() for line in table[2:]] == [
        ["gate", "4", "2", "2"],
        ["head.bias", "70", "1", "3"],
        ["embed.weight", "3", "2", "3"],
    ]


def test_the_text_has_an_end() -> None:
    params = make_params([(3,)] * 1500, torch.float32)
    optimizer = fusedopt.SGD(params)
    optimizer.record_health()
    for param in params:
        param.grad = torch.full_like(param, NAN)
    optimizer.step()
    report = optimizer.health_report()
    assert len(report.nonfinite) == 1500
    lines = str(report).splitlines()
    assert len(lines) == 20
    assert lines[11].split("  ")[0] == "parameter 0 of group 0"
    assert lines[-1] == "and 1,492 more parameters, in `nonfinite` of the report"


def test_nothing_is_said_where_all_are_finite() -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    optimizer.record_health()
    set_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert optimizer.health_report().nonfinite == ()
    assert len(str(optimizer.health_report()).splitlines()) == 8


def test_recording_anew_begins_anew() -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = fusedopt.AdamW(params)
    optimizer.record_health()
    set_grads(params, 0)
    params[1].grad[0] = NAN
    optimizer.step()
    before = copy.deepcopy(optimizer.health_report().nonfinite)
    optimizer.record_health()
    set_grads(params, 1)
    optimizer.step()
    assert [f.where for f in before] == ["parameter 1 of group 0"]
    assert optimizer.health_report().nonfinite == ()
