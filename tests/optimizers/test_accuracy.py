"""Against torch.optim, with float64 as the judge."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, each_variant, make_params, set_grads, train


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def exact(case: Case, kwargs: dict, numel: int, steps: int) -> torch.Tensor:
    """The same run in float64, by torch, from the same float32 numbers."""
    (start,) = make_params([(numel,)], torch.float32)
    param = torch.nn.Parameter(start.detach().double())
    optimizer = case.build_theirs([param], kwargs)
    for step in range(steps):
        set_grads([start], step)
        param.grad = start.grad.double()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize(("case", "kwargs"), each_variant())
def test_error_is_at_most_torchs(case: Case, kwargs: dict, steps: int) -> None:
    """The rms error of a run over 2**18 elements is at most 1.1 times torch's own, or as its row says why."""
    numel = 1 << 18
    judge = exact(case, kwargs, numel, steps)
    errors = {}
    plain = {"foreach": False} if case.is_torchs else {}
    for name in ("ours", "theirs"):
        params = make_params([(numel,)], torch.float32)
        optimizer = case.ours(params, **kwargs) if name == "ours" else case.build_theirs(params, kwargs, **plain)
        train(optimizer, steps)
        errors[name] = rms(params[0] - judge)
    assert 0 < errors["ours"] <= case.error_ratio * errors["theirs"]


@pytest.mark.parametrize(("case", "kwargs"), each_variant())
def test_float64_and_complex_parameters_follow_torch(case: Case, kwargs: dict) -> None:
    """On the reference path in their own precision; a few ulps from torch's order of operations."""
    for dtype in (torch.float64, torch.complex64, torch.complex128):
        if dtype.is_complex and not case.is_torchs:
            continue  # lion_pytorch and pytorch_optimizer take no complex numbers

        def run(cls: type, dtype: torch.dtype = dtype) -> torch.nn.Parameter:
            param = torch.nn.Parameter(torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1)))
            optimizer = cls([param], **kwargs) if cls is case.ours else case.build_theirs([param], kwargs)
            for step in range(5):
                param.grad = torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(10 + step))
                optimizer.step()
            if cls is case.ours:
                assert all(v.dtype == dtype for k, v in optimizer.state[param].items() if k != "step")
            return param.detach()

        tolerance = 1e-5 if dtype == torch.complex64 else 1e-13
        torch.testing.assert_close(run(case.ours), run(case.theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_torchs], ids=lambda case: case.name)
def test_defaults_are_torchs(case: Case) -> None:
    """Names, defaults and order of torch's arguments; ours follow, keyword-only."""
    import inspect

    ours = inspect.signature(case.ours.__init__).parameters
    for name, parameter in inspect.signature(case.theirs.__init__).parameters.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    for name in ours.keys() - inspect.signature(case.theirs.__init__).parameters.keys():
        assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY, name
