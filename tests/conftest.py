from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated import emulated as emulated  # a fixture
from gpu import kernels_at_hand as kernels_at_hand  # a fixture

from fusedopt import _core


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Whatever a test does to the thread count or to flushing of subnormals ends with it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this machine runs."""
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", request.param)
    assert _core.selected_isa() == request.param
    return request.param
