from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from sharded.ranks import Ranks

# FSDP2 of torch 2.6 does not run on the CPU, which most of these tests do.
has_all = dist.is_available() and dist.is_gloo_available() and hasattr(torch.cpu.Stream, "record_event")
collect_ignore_glob = [] if has_all else ["test_*.py"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function of the test's file on every rank of a world: ranks(world, function, **kwargs)."""
    found = Ranks()
    yield found
    found.close()
