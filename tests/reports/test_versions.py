"""A step writes parameters, and autograd must know: a graph that saved them cannot be differentiated any more.

Reports: thuml/Anomaly-Transformer#8, where torch.optim makes the second backward pass an error. A kernel that writes
past torch makes it a silent wrong gradient instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, make_params

import fusedopt

# Numbers of dimensions: torch keeps the sizes of up to five inside of a tensor, others elsewhere.
SHAPES = [(), (5,), (64, 128), (2, 3, 4), (2, 1, 2, 2), (1, 2, 2, 1, 2), (1, 2, 1, 2, 1, 2), (0, 3)]


def differentiated_late(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    late = (weight**3).sum()
    weight.sum().backward()
    make([weight]).step()
    weight.grad = None
    late.backward()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_graph_that_saved_a_parameter_cannot_be_differentiated_after_a_step(case: Case, backend: str) -> None:
    for make in (
        lambda params: case.build_theirs(params, case.kwargs),
        lambda params: case.ours(params, **case.kwargs, backend=backend),
    ):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            differentiated_late(make)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_parameter_that_is_stepped_counts_and_no_other(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "eager":
        pytest.skip("the reference path steps it")
    params = make_params(SHAPES, dtype)
    params.append(torch.nn.Parameter(torch.ones(8, 6, dtype=dtype).t()))  # not contiguous: stepped in a copy
    params.append(Subclass(torch.ones(3, dtype=dtype)))
    optimizer = fusedopt.AdamW(params, backend=backend)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i != step else None
        before = [param._version for param in params]
        optimizer.step()
        assert [param._version > version for param, version in zip(params, before)] == [
            param.grad is not None for param in params
        ]


class Subclass(torch.nn.Parameter):
    """As users derive them to attach something of their own."""


def test_a_parameter_whose_tensor_was_exchanged_counts_as_well() -> None:
    """What a Python object stands for may become another tensor, as `Module.to` does where it is told to."""
    param, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = fusedopt.SGD([param])
    for _ in range(3):
        param.grad = torch.ones(4)
        before = param._version
        optimizer.step()
        assert param._version > before
        param.grad = None
        torch.utils.swap_tensors(param, other)


def test_a_parameter_made_in_inference_mode_counts_nothing_and_is_stepped() -> None:
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    param.grad = torch.ones(4)
    with torch.inference_mode():
        fusedopt.SGD([param], lr=0.5).step()
    assert param.tolist() == [0.5] * 4


@pytest.mark.long
def test_a_compiled_step_counts() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = fusedopt.SGD([weight], lr=0.5)
    step = torch.compile(optimizer.step, backend="aot_eager")
    weight.sum().backward()
    step()
    late = (weight**3).sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_sharded_parameter_counts(mesh: Any) -> None:
    """Autograd looks at the DTensor; kernels write what it wraps."""
    from torch.distributed.tensor import DTensor, Replicate

    weight = torch.nn.Parameter(DTensor.from_local(torch.full((4, 2), 2.0), mesh, [Replicate()], run_check=False))
    late = (weight**3).sum()
    weight.grad = DTensor.from_local(torch.ones(4, 2), mesh, [Replicate()], run_check=False)
    fusedopt.SGD([weight], lr=0.5).step()
    weight.grad = None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
