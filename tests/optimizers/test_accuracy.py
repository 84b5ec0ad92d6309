"""Against torch.optim, with float64 as the judge."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, each_variant, make_params, set_grads, train


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@pytest.mark.parametrize(("case", "kwargs"), each_variant())
def test_error_is_at_most_torchs(case: Case, kwargs: dict) -> None:
    """After 1, 10 and 100 steps of 2**16 elements.

    The rms error is at most 1.1 times that of torch's own, or as its row says why. The judge is the same run in
    float64, by torch, from the same float32 numbers.
    """
    (ours,), (theirs,), (start,) = (make_params([(1 << 16,)], torch.float32) for _ in range(3))
    exact = torch.nn.Parameter(start.detach().double())
    plain = {"foreach": False} if case.is_torchs else {}
    runs = [case.ours([ours], **kwargs), case.build_theirs([theirs], kwargs, **plain)]
    judge = case.build_theirs([exact], kwargs)
    for step in range(100):
        for run in runs:
            train(run, 1, first=step)
        set_grads([start], step)
        exact.grad = start.grad.double()
        judge.step()
        if step + 1 in (1, 10, 100):
            errors = [rms(param.detach() - exact.detach()) for param in (ours, theirs)]
            if torch.equal(exact.detach(), start.detach().double()):  # RAdam's first steps may stand still
                assert errors == [0.0, 0.0]
                continue
            assert 0 < errors[0] <= case.error_ratio * errors[1], f"after {step + 1} steps"


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
