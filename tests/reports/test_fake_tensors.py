"""Fake tensors have shapes and no memory: steps make fake state, compute nothing, and touch nothing.

Reports: pytorch/pytorch#93654 (optimizers under FakeTensorMode), pytorch/pytorch#122514 (kernels that take data_ptr of
fake tensors crash). torch's own estimators of memory run a training step that way.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ADAFACTOR, CASES, Case
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedopt

CLASSES = [*CASES, ADAFACTOR]


def trained(case: Case, options: dict) -> torch.optim.Optimizer:
    place = {"dtype": torch.bfloat16}
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, **place), torch.nn.LayerNorm(64, **place))
    optimizer = case.ours(model.parameters(), **case.kwargs, **options)
    for _ in range(2):
        model(torch.ones(2, 128, **place)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def described(optimizer: torch.optim.Optimizer) -> list:
    return [
        {key: (value.shape, value.dtype, value.device.type) for key, value in held.items()}
        for held in optimizer.state.values()
    ]


@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "8bit"}, {"master_weights": "float32"}, {"max_grad_norm": 1.0}], ids=str
)
@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.name)
def test_fake_state_is_that_of_a_real_run(case: Case, options: dict) -> None:
    if case.name == "adafactor" and "state_dtype" in options:
        options = {"state_dtype": {"exp_avg": "8bit"}}
        case = replace(case, kwargs={**case.kwargs, "beta1": 0.9})
    real = trained(case, options)
    with FakeTensorMode():
        fake = trained(case, options)
    assert described(fake) == described(real)
    assert all(isinstance(value, FakeTensor) for held in fake.state.values() for value in held.values())
    assert fake.memory_report() == real.memory_report()


def test_state_lies_on_the_device_that_is_not_there() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(64, 128, device="cuda"))
        param.grad = torch.ones(64, 128, device="cuda")
        optimizer = fusedopt.AdamW([param], state_dtype="8bit")
        optimizer.step()
    assert {value.device for value in optimizer.state[param].values()} == {param.device}


def test_after_the_mode_state_stays_fake() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(64, 128))
        param.grad = torch.ones(64, 128)
    optimizer = fusedopt.AdamW([param], max_grad_norm=1.0)
    optimizer.step()
    assert all(isinstance(value, FakeTensor) for value in optimizer.state[param].values())
    assert isinstance(optimizer.last_grad_norm, FakeTensor)


def test_a_real_parameter_is_refused_under_the_mode() -> None:
    param = torch.nn.Parameter(torch.ones(64, 128))
    param.grad = torch.ones(64, 128)
    optimizer = fusedopt.AdamW([param])
    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensorMode is on"):
        optimizer.step()
    assert torch.equal(param, torch.ones(64, 128))
    assert not optimizer.state
