"""The Triton kernels on a device have the bits of the CUDA kernels on it, for every rule."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from cases import FORMATS, assert_same_run, train
from gpu import DEVICE, DRY, assert_same_norm, gpu, params_on
from matrices import FACTORED_VARIANTS as VARIANTS
from matrices import each_rule

import fusedopt

pytestmark = [
    *gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(torch.version.hip is not None, reason="needs CUDA kernels, which there are for NVIDIA only"),
]

SHAPES = [(17, 64), (33, 40), (3, 130)] if DRY else [(700, 640), (330, 130), (3, 4, 400), (2, 9000), (65_537,)]


@pytest.fixture(autouse=True)
def _triton_at_hand(request: pytest.FixtureRequest) -> None:
    """Without a device the kernels are interpreted."""
    if DRY:
        request.getfixturevalue("interpreted")


def assert_backends_agree(kind: Any, dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    ours, theirs = (
        train(kind(params_on(DEVICE, SHAPES, dtype), **kwargs, max_grad_norm=1.0, backend=backend), 2)
        for backend in ("triton", "cuda")
    )
    assert_same_run(ours, theirs)
    assert_same_norm(ours, theirs)


@pytest.mark.parametrize("state_format", ["fp32", "8bit-stochastic"])
@pytest.mark.parametrize(("case", "kwargs"), each_rule())
def test_rules(case: Any, kwargs: dict[str, Any], state_format: str) -> None:
    """Both take powers and logarithms in the same library, so they may differ in no bit."""
    assert_backends_agree(case.ours, torch.bfloat16, {**kwargs, **FORMATS[state_format]})


@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_that_normalize(variant: str) -> None:
    kwargs = {key: value for key, value in VARIANTS[variant].items() if key != "max_grad_norm"}
    assert_backends_agree(fusedopt.Adafactor, torch.float32, kwargs)
