"""The Triton kernels on a device have the bits of the CPU backend, hence of the CUDA kernels, and wait for nothing."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, FORMATS, SHAPES_2D, Case, format_kwargs, make_params
from gpu import DRY, UNUSUAL_GRADS, assert_device_agrees, needs_cuda, params_on
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


def assert_agrees(kind: Any, kwargs: dict[str, Any], dtype: torch.dtype, shapes: list[Any], **how: Any) -> None:
    assert_device_agrees(
        lambda device, backend: kind(params_on(device, shapes, dtype), **kwargs, backend=backend),
        2 if DRY else 3,
        backend="triton",
        **how,
    )


@rules_and_formats
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    powers_of = "the schedule of beta3" if kwargs.get("t_beta3") else ""
    assert_agrees(case.ours, kwargs, DTYPES[dtype], BLOCKED if has_codes else SIZES, powers_of=powers_of)


@masters
def test_masters_and_rounded_parameters(dtype: str, rounding: str, master: str | None, state_format: str) -> None:
    kwargs = {**CASES[0].kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
    assert_agrees(CASES[0].ours, kwargs, DTYPES[dtype], [*SIZES, (7, 257), (40, 64)])


@factored_formats
def test_factored_second_moments(variant: str, dtype: str, state_format: str) -> None:
    shapes = [shape for shape in FACTORED_SHAPES if not DRY or math.prod(shape) < 2000]
    kwargs = {**FACTORED_VARIANTS[variant], **FORMATS[state_format]}
    powers_of = "the decay of second moments"
    assert_agrees(fusedopt.Adafactor, kwargs, DTYPES[dtype], shapes, powers_of=powers_of)


@pytest.mark.parametrize("grads", UNUSUAL_GRADS)
@pytest.mark.parametrize("state_format", ["fp32", "8bit-stochastic"])
@pytest.mark.parametrize("kind", [fusedopt.AdamW, fusedopt.Lion, fusedopt.Adafactor])
def test_gradients_of_zeros_and_in_buckets(kind: Any, state_format: str, grads: str) -> None:
    shapes = [(300,), (5, 65)] if DRY else [(300,), (7, 257), (700, 100), (3, 4, 400), (2, 9000)]
    powers_of = "the decay of second moments" if kind is fusedopt.Adafactor else ""
    kwargs = {**FORMATS[state_format], "max_grad_norm": 0.5}
    assert_agrees(kind, kwargs, torch.bfloat16, shapes, powers_of=powers_of, grads=UNUSUAL_GRADS[grads])


def test_clipping() -> None:
    assert_agrees(CASES[0].ours, {"max_grad_norm": 0.5}, torch.float32, [(300_000,), *SIZES, (7, 257)])


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
