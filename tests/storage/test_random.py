"""The random bits: one hash for each run of 64 elements, and a Weyl sequence within it.

Runs, steps, states and seeds must not know each other. Within a run, bits are spread evenly on purpose; a sum of
rounded numbers must then err no more than with independent bits.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fusedopt.reference.random import random_bits

RUN = 64
RUNS = 1 << 15


@functools.cache
def drawn(*, step: int = 1, state: int = 0, seed: int = 3, runs: int = RUNS, first_index: int = 0) -> Tensor:
    """Uniform numbers, -1/2 to 1/2, as (runs, RUN)."""
    shape = torch.Size([runs * RUN])
    bits = random_bits(shape, torch.device("cpu"), seed=seed, step=step, first_index=first_index, state=state)
    return (bits.float() * 2.0**-16 - 0.5).reshape(runs, RUN)


def correlation(a: Tensor, b: Tensor) -> float:
    return 12.0 * (a * b).double().mean().item()  # the variance of each is 1/12


# Pairs of runs that are compared have one random distance, whose correlation has a standard deviation of .45; the mean
# of 2^15 of them has .0025.
LIMIT = 0.01


def test_elements_are_uniform() -> None:
    for state in (0, 1):
        draws = drawn(state=state)
        assert abs(draws.mean().item()) < LIMIT * 0.5
        assert (12.0 * draws.square().mean(dim=0) - 1.0).abs().max().item() < 2 * LIMIT  # each place in a run; sd .005
        assert draws.unique().numel() == 1 << 16  # all that 16 bits can be


@pytest.mark.parametrize(
    "other",
    [{"step": 2}, {"step": 65}, {"state": 1}, {"state": 2}, {"seed": 4}],
    ids=str,
)
def test_steps_states_and_seeds_are_independent(other: dict[str, int]) -> None:
    assert abs(correlation(drawn(), drawn(**other))) < LIMIT


@pytest.mark.parametrize("state", [0, 1])
@pytest.mark.parametrize("lag", [1, 63, 64, 65, 4096])
def test_no_lag_reaches_another_run(lag: int, state: int) -> None:
    """Pairs of elements of different runs, `lag` apart."""
    draws = drawn(state=state).flatten()
    near, far = draws[:-lag], draws[lag:]
    run = torch.arange(draws.numel()) // RUN
    apart = run[:-lag] != run[lag:]
    # Few pairs of neighbouring elements belong to different runs: one of each two runs, with full variance.
    limit = LIMIT if lag >= RUN else 5.0 / RUNS**0.5
    assert abs(correlation(near[apart], far[apart])) < limit


@pytest.mark.parametrize("state", [0, 1])
@pytest.mark.parametrize("part", [0.5, 0.1, 0.003])
def test_a_sum_errs_no_more_than_with_independent_bits(part: float, state: int) -> None:
    """How many of 2^16 elements are rounded up, if each is with a chance of `part`, in 32 draws.

    Independent bits would give a variance of n part (1 - part), of which 32 draws see up to 1.5. Bits that are the same
    throughout a run would give 64 times as much.
    """
    runs = 1024
    draws = RUNS // runs
    counts = (drawn(state=state).reshape(draws, -1) + 0.5 < part).double().sum(dim=1)
    n = runs * RUN
    variance = n * part * (1 - part)
    assert abs(counts.mean().item() - n * part) < 4 * (variance / draws) ** 0.5 + n * 2.0**-16
    assert counts.var().item() < 1.5 * variance


def test_bits_hang_on_the_global_index() -> None:
    """A shard that begins in the middle of a run, and one that passes 2^32, where the key changes."""
    whole = drawn(runs=4).flatten()
    part = random_bits(torch.Size([100]), torch.device("cpu"), seed=3, step=1, first_index=37, state=0)
    assert torch.equal(part.float() * 2.0**-16 - 0.5, whole[37:137])
    last = 1 << 32
    passing = drawn(runs=2, first_index=last - RUN).flatten()
    beyond = drawn(runs=1, first_index=last).flatten()
    assert torch.equal(passing[RUN:], beyond)
    assert not torch.equal(beyond, drawn(runs=1).flatten())
