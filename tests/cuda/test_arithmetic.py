"""Roots and quotients of the CUDA kernels, run on the CPU: of any size, they are those of IEEE.

A lane takes a shorter way if all of its numbers are in a middle range (csrc/cuda/numbers.cuh). So lanes get numbers of
one size, at the limits of that range too, and of all sizes.
"""

from __future__ import annotations

import pytest
import torch
from cases import assert_same_run
from torch import Tensor

import fusedopt

pytestmark = pytest.mark.usefixtures("emulated")

LANE = 8  # elements; those of float32 are two runs of four, half a tile apart
EXPONENTS = [*range(-149, -120), *range(-104, -90), *range(-66, -58), -35, 0, *range(25, 35), *range(60, 66), 126, 127]
ZEROS = [0.0, -0.0, float("inf"), float("nan")]


def numbers(seed: int, are_mixed: bool) -> Tensor:
    """For each exponent 64 numbers side by side, then zeros and what is not finite among ordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.tensor(EXPONENTS).repeat_interleave(64)
    fractions = 1 + torch.rand(exponents.shape, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    of_sizes = (signs * fractions * 2.0**exponents).float()
    ordinary = torch.randn(64 * len(ZEROS), generator=generator)
    ordinary[::3] = torch.tensor(ZEROS).repeat_interleave(64)[::3]
    found = torch.cat([of_sizes, ordinary, torch.zeros(64)])
    return found[torch.randperm(len(found), generator=generator)] if are_mixed else found


@pytest.mark.parametrize("are_mixed", [False, True], ids=["sizes apart", "sizes mixed"])
@pytest.mark.parametrize("eps", [1e-8, 1e-30, 1e20])
@pytest.mark.parametrize("name", ["Adagrad", "AdamW"])
def test_roots_and_quotients_of_any_size(name: str, eps: float, are_mixed: bool) -> None:
    runs = []
    for backend in ("cuda", "cpu"):
        param = torch.nn.Parameter(numbers(0, are_mixed))
        kwargs = {"betas": (0.0, 0.0)} if name == "AdamW" else {}
        optimizer = getattr(fusedopt, name)([param], lr=0.5, eps=eps, **kwargs, backend=backend)
        for seed in (1, 2):  # the second is of other sizes, so operands of one element differ
            param.grad = numbers(seed, are_mixed)
            optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)
