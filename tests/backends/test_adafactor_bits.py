"""Adafactor's compiled passes equal the reference path bit for bit: instruction sets, threads, formats, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FORMATS,
    SANITIZED,
    assert_paths_agree,
    assert_same_run,
    make_params,
    set_grads,
    shifted,
    train,
)
from matrices import FACTORED_SHAPES as SHAPES
from matrices import FACTORED_VARIANTS as VARIANTS
from matrices import factored_dtypes

from fusedopt import Adafactor

STEPS = 2 if SANITIZED else 3
SMALL_SHAPES = [shape for shape in SHAPES if shape != (641, 4100)]


def offset_params(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    """Each shape once, and the first ones once more at an address one element behind an aligned one."""
    params = make_params(list(shapes), dtype)
    return params + [shifted(param) for param in make_params(SHAPES[:2], dtype, seed=1)]


def assert_all_agree(
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> None:
    assert_paths_agree(
        lambda backend: train(Adafactor(offset_params(dtype, shapes), **kwargs, backend=backend), STEPS), monkeypatch
    )


@factored_dtypes
def test_every_path_gives_the_same_bits(variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # How matrices are cut into slabs and panels hangs on no format: the one that has most of both is in float32.
    shapes = SHAPES if dtype == "fp32" else SMALL_SHAPES
    assert_all_agree(VARIANTS[variant], DTYPES[dtype], monkeypatch, shapes)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_largest_shape_in_other_formats(variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_all_agree(VARIANTS[variant], DTYPES[dtype], monkeypatch, [(641, 4100)])


@pytest.mark.parametrize(
    "how",
    [
        *[{**FORMATS[name]} for name in ("bf16-nearest", "bf16-stochastic", "8bit-nearest", "8bit-stochastic")],
        {"master_weights": "split24", **FORMATS["8bit-stochastic"]},
        {"master_weights": "split32"},
        {"master_weights": "kahan", "rounding": "stochastic"},
        {"master_weights": "float32"},
        {"rounding": "stochastic", "seed": 5},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
@pytest.mark.parametrize("variant", ["relative", "momentum", "compat"])
def test_formats_of_weights_and_first_moments(
    variant: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_all_agree({**VARIANTS[variant], **how}, torch.bfloat16, monkeypatch, SMALL_SHAPES)


def test_the_core_takes_them() -> None:
    """What is compared above is not the reference path with itself."""
    optimizer = train(Adafactor(offset_params(torch.bfloat16), beta1=0.9, backend="cpu"), 1)
    set_grads(optimizer.param_groups[0]["params"], 1)
    gathered = optimizer._gather()
    assert len(gathered.sessions["cpu"]) == len(SHAPES) + 2


def test_a_gradient_that_is_not_finite_reaches_what_its_means_reach(isa: str) -> None:
    runs = []
    for backend in ("cpu", "eager"):
        params = make_params([(40, 30), (50,)], torch.float32)
        optimizer = Adafactor(params, backend=backend)
        train(optimizer, 2)
        set_grads(params, 2)
        params[0].grad[3, 4] = float("inf")
        params[1].grad[5] = float("nan")
        optimizer.step()
        assert params[0].isnan().all()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_health_is_counted_alike() -> None:
    reports = []
    for backend in ("cpu", "eager"):
        params = make_params([(80, 64), (50,), (70, 70)], torch.bfloat16)
        optimizer = Adafactor(params, beta1=0.9, state_dtype="8bit", backend=backend)
        train(optimizer, 2)
        optimizer.record_health()
        set_grads(params, 2)
        params[1].grad[5] = float("nan")
        optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1]
