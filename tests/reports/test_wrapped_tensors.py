"""Tensors whose class wraps others have no memory of their own: a kernel must not follow their pointer.

Report: microsoft/dion#84, where a kernel wrote through the pointer of a quantized weight.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt


def two(value: float) -> TwoTensor:
    return TwoTensor(torch.full((64, 128), value), torch.full((64, 128), value))


@pytest.mark.parametrize("backend", ["auto", "cpu", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrapped_parameter_is_refused(case: Case, backend: str) -> None:
    param = torch.nn.Parameter(two(1.0))
    param.grad = two(2.0)
    plain = torch.nn.Parameter(torch.ones(3))
    plain.grad = torch.ones(3)
    optimizer = case.ours([plain, param], **case.kwargs, backend=backend)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.* it is a TwoTensor.*torch\.optim"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3))
    assert torch.equal(param.a, torch.ones(64, 128))
    assert not optimizer.state


@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_optimizers_call_its_operators(theirs: type[torch.optim.Optimizer]) -> None:
    """That is what the sentence advises."""
    param, plain = torch.nn.Parameter(two(1.0)), torch.nn.Parameter(torch.ones(64, 128))
    for each, grad in ((param, two(2.0)), (plain, torch.full((64, 128), 2.0))):
        each.grad = grad
        theirs([each], lr=0.1).step()
    assert torch.equal(param.a, plain)
    assert torch.equal(param.b, plain)


def test_a_wrapped_gradient_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = fusedopt.AdamW([param])
    param.grad = torch.ones(64, 128)
    optimizer.step()
    before = param.detach().clone()
    param.grad = two(2.0)
    with pytest.raises(ValueError, match="its gradient is a TwoTensor"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_subclass_with_memory_of_its_own_is_stepped() -> None:
    class Mine(torch.nn.Parameter):
        pass

    mine, plain = Mine(torch.ones(64, 128)), torch.nn.Parameter(torch.ones(64, 128))
    for param in (mine, plain):
        param.grad = torch.ones(64, 128)
        fusedopt.AdamW([param]).step()
    assert torch.equal(mine, plain)
