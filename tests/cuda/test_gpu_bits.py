"""The CUDA kernels on a device have the bits of the CPU backend: rules, formats, masters, sizes, alignment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, FORMATS, ODD_SIZES, SHAPES_2D, Case, format_kwargs
from gpu import DRY, UNUSUAL_GRADS, assert_device_agrees, gpu, params_on
from matrices import (
    FACTORED_SHAPES,
    FACTORED_VARIANTS,
    each_rule,
    factored_formats,
    masters_of_all,
    rules_and_formats,
)

import fusedopt

pytestmark = gpu

SIZES = [n for n in ODD_SIZES if not DRY or n < 2000]
BLOCKED = [shape for shape in SHAPES_2D if not DRY or max(shape) < 2000]

UNUSUAL = [(300,), (7, 65), (40, 64)] if DRY else [(300,), (7, 257), (700, 100), (3, 4, 400), (2, 9000)]


def powers_of(kwargs: dict[str, Any]) -> str:
    return "the schedule of beta3" if "t_beta3" in kwargs else ""


@rules_and_formats
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    shapes = list(BLOCKED) if has_codes else [(n,) for n in SIZES]
    assert_device_agrees(
        lambda device, backend: case.ours(params_on(device, shapes, DTYPES[dtype]), **kwargs, backend=backend),
        3 if DRY else 6,
        powers_of=powers_of(kwargs),
    )


@masters_of_all
def test_masters_and_rounded_parameters(
    case: Case, kwargs: dict, dtype: str, rounding: str, master: str | None, state_format: str
) -> None:
    kwargs = {**kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
    shapes = [(n,) for n in SIZES] + [(7, 257), (4, 64), (2, 4000)]
    assert_device_agrees(
        lambda device, backend: case.ours(params_on(device, shapes, DTYPES[dtype]), **kwargs, backend=backend),
        2,
        powers_of=powers_of(kwargs),
    )


@factored_formats
def test_factored_second_moments(variant: str, dtype: str, state_format: str) -> None:
    kwargs = {**FACTORED_VARIANTS[variant], **FORMATS[state_format]}
    shapes = [shape for shape in FACTORED_SHAPES if not DRY or math.prod(shape) < 2000]
    assert_device_agrees(
        lambda device, backend: fusedopt.Adafactor(params_on(device, shapes, DTYPES[dtype]), **kwargs, backend=backend),
        4,
        powers_of="the decay of second moments",
    )


@pytest.mark.parametrize("grads", UNUSUAL_GRADS)
@pytest.mark.parametrize("state_format", ["fp32", "8bit-stochastic"])
@pytest.mark.parametrize(("case", "kwargs"), each_rule())
def test_gradients_of_zeros_and_in_buckets(case: Case, kwargs: dict, state_format: str, grads: str) -> None:
    kwargs = {**kwargs, **FORMATS[state_format], "max_grad_norm": 0.5}
    assert_device_agrees(
        lambda device, backend: case.ours(params_on(device, UNUSUAL, torch.bfloat16), **kwargs, backend=backend),
        3,
        powers_of=powers_of(kwargs),
        grads=UNUSUAL_GRADS[grads],
    )


@pytest.mark.parametrize("grads", UNUSUAL_GRADS)
@pytest.mark.parametrize("variant", FACTORED_VARIANTS)
def test_factored_gradients_of_zeros_and_in_buckets(variant: str, grads: str) -> None:
    kwargs = FACTORED_VARIANTS[variant]
    assert_device_agrees(
        lambda device, backend: fusedopt.Adafactor(
            params_on(device, UNUSUAL, torch.float32), **kwargs, backend=backend
        ),
        3,
        powers_of="the decay of second moments",
        grads=UNUSUAL_GRADS[grads],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_late_steps(case: Case) -> None:
    """Powers of beta and random bits far into a run."""

    def make(device: torch.device | str, backend: str) -> torch.optim.Optimizer:
        params = params_on(device, [(500,)], torch.float32)
        kwargs = {**case.kwargs, **case.late, "state_dtype": "bfloat16", "backend": backend}
        optimizer = case.ours(params, **kwargs)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        for param in params:
            optimizer.state[param]["step"].fill_(123_456)
        return optimizer

    assert_device_agrees(make, 2, powers_of=powers_of(case.late))
