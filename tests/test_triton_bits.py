"""The Triton kernels, interpreted, have the bits of the CPU backend: rules, formats, sizes, alignment, lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FORMATS,
    Case,
    assert_same_run,
    each_variant,
    format_kwargs,
    make_params,
    train,
)

pytestmark = pytest.mark.usefixtures("interpreted")

# A whole tile of 16 blocks and a ragged one; rows of whole blocks, and ragged ones over two tiles; nothing at all.
SHAPES = [(1100,), (3,), (0,)]
SHAPES_2D = [(17, 64), (9, 130), (3, 4, 20), (6, 0)]


def offset_params(dtype: torch.dtype, shapes: list[Any]) -> list[torch.nn.Parameter]:
    """The first shape once more, one element behind an aligned address."""
    params = make_params([*shapes, shapes[0]], dtype)
    memory = torch.empty(params[-1].numel() + 1, dtype=dtype)
    memory[1:] = params[-1].detach().flatten()
    params[-1] = torch.nn.Parameter(memory[1:].view(params[-1].shape))
    return params


def assert_kernels_agree(case: Case, kwargs: dict[str, Any], dtype: torch.dtype, shapes: list[Any]) -> None:
    runs = [train(case.ours(offset_params(dtype, shapes), **kwargs, backend=b), 2) for b in ("triton", "cpu")]
    assert len(runs[0]._sessions()["triton"]._tables) == 1
    assert_same_run(*runs)


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "kwargs"), each_variant())
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    assert_kernels_agree(case, kwargs, DTYPES[dtype], SHAPES_2D if has_codes else SHAPES)
