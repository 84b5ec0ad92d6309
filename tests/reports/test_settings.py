"""Settings as libraries make them: any real number, any sequence, any mapping.

Numbers of numpy: keras-team/keras#4304, NVIDIA-TAO/tao-pytorch#90. Containers of OmegaConf: pytorch/pytorch#167319,
hydra-ecosystem/hydra#1011.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, train

import fusedopt

SHAPES = [(64, 128), (70,)]


class Listed(Sequence):
    """A sequence that is neither a list nor a tuple, as a library for configurations has."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


class Mapped(Mapping):
    """A mapping that is no dict."""

    def __init__(self, **values: Any) -> None:
        self.values_by_key = values

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def resumed(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dict from a file, which is read without running anything."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "made",
    [np.float64, np.float32, np.asarray, lambda lr: Fraction(*lr.as_integer_ratio())],
    ids=["float64", "float32", "0-d", "fraction"],
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_real_number_is_a_learning_rate(case: Case, made: Any) -> None:
    lr = 0.015625  # exact in float32
    runs = []
    for make in (float, made):
        optimizer = case.ours(make_params(SHAPES, torch.float32), **{**case.kwargs, "lr": make(lr)})
        resumed(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, make=make: make(0.5**step))
        for _ in range(3):
            train(optimizer, 1)
            schedule.step()
        runs.append(optimizer)
    assert_same_run(*runs)
    with pytest.raises(TypeError, match=r"lr=.* is a bool"):
        case.ours(make_params(SHAPES, torch.float32), lr=np.bool_(True))


@pytest.mark.parametrize("betas", [(np.float64(0.5), np.float32(0.75)), [np.float64(0.5), 0.75], np.array([0.5, 0.75])])
def test_numbers_within_are_pythons_own(betas: Any) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), betas=betas)
    assert {type(beta) for beta in resumed(optimizer)["param_groups"][0]["betas"]} == {float}


def test_sequences_and_mappings_of_any_kind() -> None:
    theirs = fusedopt.AdamW(
        make_params(SHAPES, torch.float32),
        betas=Listed(np.float64(0.5), 0.9),
        state_dtype=Mapped(exp_avg="bfloat16"),
        state_rounding=Mapped(exp_avg="nearest"),
        eps=np.float32(2**-20),
    )
    ours = fusedopt.AdamW(
        make_params(SHAPES, torch.float32),
        betas=(0.5, 0.9),
        state_dtype={"exp_avg": "bfloat16"},
        state_rounding={"exp_avg": "nearest"},
        eps=2**-20,
    )
    assert {**theirs.param_groups[0], "params": None} == {**ours.param_groups[0], "params": None}
    assert_same_run(train(theirs, 3), train(ours, 3))
    ours.load_state_dict(resumed(theirs))
    assert_same_run(ours, theirs)
    with pytest.raises(ValueError, match="betas='ab' must be a pair"):
        fusedopt.AdamW(make_params(SHAPES, torch.float32), betas="ab")
