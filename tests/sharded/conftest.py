from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from sharded.ranks import Ranks

collect_ignore_glob = [] if dist.is_available() and dist.is_gloo_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function of the test's file on every rank of a world: ranks(world, function, **kwargs)."""
    found = Ranks()
    yield found
    found.close()
