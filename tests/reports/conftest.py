"""What several kinds of reports are tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusedopt.backends.table import bind_torch


@pytest.fixture(params=[True, False], ids=["table", "attributes"])
def exchange(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors are read through DLPack's table, and by asking their Python objects, as with older torch."""
    bind_torch(exchange=request.param)
    yield
    bind_torch()


@pytest.fixture(params=["cpu", "eager", "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend's name; those of devices step CPU tensors."""
    if request.param in ("cuda", "triton"):
        request.getfixturevalue({"cuda": "emulated", "triton": "interpreted"}[request.param])
    return request.param
