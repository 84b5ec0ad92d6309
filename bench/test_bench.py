"""The benchmark's cases under pytest-benchmark: that every contender runs, and how long a step takes.

    pytest bench/test_bench.py                                          W3 in float32, ours and torch's
    FUSEDOPT_BENCH="W2 W3" FUSEDOPT_BENCH_PEERS=1 pytest bench          more workloads, other packages

Timings here are for looking at one contender; `python -m bench` is what compares them.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from torch.nn import Parameter

from .contenders import CONTENDERS, PEER, Contender, UnavailableError, start
from .harness import orders
from .workloads import DTYPES, WORKLOADS

pytest.importorskip("pytest_benchmark")

_NAMES = os.environ.get("FUSEDOPT_BENCH", "W3").split()
_PEERS = os.environ.get("FUSEDOPT_BENCH_PEERS", "0") == "1"
_DTYPE = "float32"
_ENTERED = [c for c in CONTENDERS if _DTYPE in c.dtypes and (_PEERS or c.family != PEER)]


@pytest.fixture(scope="module", params=_NAMES)
def params(request: pytest.FixtureRequest) -> list[Parameter]:
    """A workload's parameters, shared by all contenders as in the harness."""
    return WORKLOADS[request.param].params(DTYPES[_DTYPE])


@pytest.mark.parametrize("contender", _ENTERED, ids=lambda contender: contender.name)
def test_step(benchmark: Any, contender: Contender, params: list[Parameter]) -> None:
    try:
        running = start(contender, params, first_step_limit=300)
    except UnavailableError as error:
        pytest.skip(str(error))
    numel = sum(param.numel() for param in params)
    benchmark.extra_info.update(parameters=numel, state_bytes_per_parameter=running.state_bytes)
    benchmark.pedantic(running.step, rounds=3)  # its first step is taken
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("count", [2, 5, 6, 7])
def test_orders_are_balanced(count: int) -> None:
    design = list(itertools.islice(orders(count), count * (1 + count % 2)))
    assert all(sorted(order) == list(range(count)) for order in design)
    pairs = [pair for order in design for pair in itertools.pairwise(order)]
    assert {pairs.count(pair) for pair in itertools.permutations(range(count), 2)} == {1 + count % 2}
