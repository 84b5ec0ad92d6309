"""The Triton kernels on a device have the bits of the CPU backend, hence of the CUDA kernels, and wait for nothing."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, FORMATS, SHAPES_2D, Case, assert_same_bits, format_kwargs, make_params
from gpu import DEVICE, DRY, needs_cuda
from matrices import FACTORED_SHAPES, FACTORED_VARIANTS, factored_formats, masters, rules_and_formats

import fusedopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

# Interpreted, a tile takes tens of milliseconds.
BLOCKED = [shape for shape in SHAPES_2D if not DRY or math.prod(shape) < 2000]
SIZES = [(n,) for n in (1, 3, 1023, 1024, 1025, 65_537) if not DRY or n < 2000]


@pytest.fixture(autouse=True)
def _triton_at_hand(request: pytest.FixtureRequest) -> None:
    """Without a device the kernels are interpreted."""
    if DRY:
        request.getfixturevalue("interpreted")


def assert_device_agrees(
    kind: type[fusedopt.FusedOptimizer], kwargs: dict[str, Any], dtype: torch.dtype, shapes: list[Any]
) -> None:
    runs = []
    for device, backend in ((DEVICE, "triton"), ("cpu", "cpu")):
        params = [torch.nn.Parameter(param.detach().to(device)) for param in make_params(shapes, dtype)]
        optimizer = kind(params, **kwargs, backend=backend)
        for step in range(2 if DRY else 3):
            for i, param in enumerate(params):
                generator = torch.Generator().manual_seed(100 * step + i)
                param.grad = torch.randn(param.shape, generator=generator).to(dtype).to(device)
            optimizer.step()
        runs.append((params, optimizer))
    (params, ours), (twins, theirs) = runs
    for param, twin in zip(params, twins):
        assert_same_bits(param.cpu(), twin)
        for name, value in theirs.state[twin].items():
            assert_same_bits(ours.state[param][name].cpu(), value, name)
    if kwargs.get("max_grad_norm") is not None:
        assert_same_bits(ours.last_grad_norm.cpu(), theirs.last_grad_norm)


@rules_and_formats
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    if kwargs.get("t_beta3"):
        pytest.skip("the schedule of beta3 takes a logarithm, which may differ by one unit in the last place")
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    assert_device_agrees(case.ours, kwargs, DTYPES[dtype], BLOCKED if has_codes else SIZES)


@masters
def test_masters_and_rounded_parameters(dtype: str, rounding: str, master: str | None, state_format: str) -> None:
    kwargs = {**CASES[0].kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
    assert_device_agrees(CASES[0].ours, kwargs, DTYPES[dtype], [*SIZES, (7, 257), (40, 64)])


@factored_formats
def test_factored_second_moments(variant: str, dtype: str, state_format: str) -> None:
    """The decay is a power, which may differ by one unit in the last place of float32: once in millions of steps."""
    shapes = [shape for shape in FACTORED_SHAPES if not DRY or math.prod(shape) < 2000]
    assert_device_agrees(
        fusedopt.Adafactor, {**FACTORED_VARIANTS[variant], **FORMATS[state_format]}, DTYPES[dtype], shapes
    )


def test_clipping() -> None:
    assert_device_agrees(CASES[0].ours, {"max_grad_norm": 0.5}, torch.float32, [(300_000,), *SIZES, (7, 257)])


@needs_cuda
@pytest.mark.parametrize("kind", [fusedopt.AdamW, fusedopt.Adafactor])
def test_nothing_waits(kind: type[fusedopt.FusedOptimizer]) -> None:
    params = [torch.nn.Parameter(param.detach().cuda()) for param in make_params([(300, 64), (70,)], torch.float32)]
    relative = {} if kind is fusedopt.AdamW else {"beta1": 0.9, "relative_step": False}
    optimizer = kind(params, lr=1e-3, **relative, state_dtype="8bit", max_grad_norm=1.0, backend="triton")
    for step in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        torch.cuda.synchronize()
        optimizer.param_groups[0]["lr"] *= 0.9
        torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
