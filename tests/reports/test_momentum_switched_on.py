"""Momentum that is switched on, off and on again during a run begins, and goes on, as in torch.

torch's first buffer is the whole gradient, whenever that is: dampening is for those that follow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedopt

FIRST, SECOND = {"momentum": 0.5, "dampening": 0.25}, {"momentum": 0.0, "dampening": 0.0}


def trained(cls: type[torch.optim.Optimizer], **options: Any) -> list[torch.Tensor]:
    """Powers of two, so that nothing is rounded."""
    params = [torch.nn.Parameter(torch.arange(8.0)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = cls(params, lr=0.5, **options)
    for step in range(8):
        if step in (2, 5, 6):
            optimizer.param_groups[0].update(SECOND if step == 5 else FIRST)
        for number, param in enumerate(params):  # the second has its first gradients later, and one that is missing
            param.grad = torch.full_like(param, 2.0**-step) if number == 0 or step in (1, 4, 5, 7) else None
        optimizer.step()
    return params


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.5}, {"maximize": True}], ids=str)
def test_as_in_torch(options: dict[str, Any], backend: str) -> None:
    for ours, theirs in zip(trained(fusedopt.SGD, backend=backend, **options), trained(torch.optim.SGD, **options)):
        assert torch.equal(ours, theirs)


def test_in_a_compiled_step() -> None:
    found = []
    for compiles in (False, True):
        param = torch.nn.Parameter(torch.arange(8.0))
        optimizer = fusedopt.SGD([param], lr=0.5)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for number in range(4):
            if number == 2:
                optimizer.param_groups[0].update(FIRST)
            param.grad = torch.ones(8)
            step()
        found.append(param.detach())
        assert optimizer.state[param]["step"] == 2
    assert torch.equal(*found)
