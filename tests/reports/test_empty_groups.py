"""Param groups without parameters, as Trainer makes one for models without biases.

Reports: pytorch/pytorch#191666, pytorch/pytorch#116061 (compiled).
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, set_grads

SHAPES = [(64, 128), (70,)]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=["plain", "clip"])
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_a_compiled_step_is_that_without_them(case: Case, options: dict, position: int) -> None:
    torch._dynamo.reset()
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compilations.append(1)
        return graph

    runs = []
    for empty in (True, False):
        params = make_params(SHAPES, torch.float32)
        groups = [{"params": [param]} for param in params]
        if empty:
            groups.insert(position, {"params": []})
        optimizer = case.ours(groups, **case.kwargs, **options)
        step = torch.compile(optimizer.step, backend=backend) if empty else optimizer.step
        for i in range(4):
            set_grads(params, i)
            step()
        if empty:
            del optimizer.param_groups[position]
        runs.append(optimizer)
    assert_same_run(*runs)
    assert len(compilations) <= 2  # the first step makes state


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_that_are_all_empty_are_a_step_of_nothing(case: Case, compiled: bool) -> None:
    torch._dynamo.reset()
    optimizer = case.ours([{"params": []}, {"params": []}], **case.kwargs, max_grad_norm=1.0)
    (torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step)()
    assert not optimizer.state
