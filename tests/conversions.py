"""What the tests of others' state dicts share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import copied, params_of, train
from torch import Tensor

import fusedopt
from fusedopt.storage.quantization import decode

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"state_dtype": "float32"},
    "bf16": {"state_dtype": "bfloat16"},
    "fp16": {"state_dtype": "float16"},
    "8bit": {"state_dtype": "8bit", "min_quantized_numel": 64},
}


def named(rows: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [pytest.param(*row, id="-".join((row[0], *map(str, list(row[1])[1:])))) for row in rows]


def copies(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return copied(params_of(optimizer))


def dense(optimizer: fusedopt.FusedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """What the states of a parameter stand for."""
    held = optimizer.state[param]
    values = {}
    for spec in optimizer.STATES:
        keys = spec.keys_in(held)
        if len(keys) == 2:
            values[spec.name] = decode(*(held[key] for key in keys), is_signed=spec.is_signed)
        elif keys:
            values[spec.name] = held[spec.name].float()
    return values


def assert_same_step(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, first: int) -> None:
    """One step of both, from the same weights and states.

    Both compute in float32, in another order: some ten roundings of an update that is below 1, and one of the
    weight, 2^-24 of it each.
    """
    before = copies(ours)
    train(ours, 1, first=first)
    train(theirs, 1, first=first)
    assert max((param - old).abs().max().item() for param, old in zip(params_of(ours), before)) > 5e-4
    for param, twin in zip(params_of(ours), params_of(theirs)):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def assert_within(values: Tensor, exact: Tensor, qmap: Tensor) -> None:
    """Codes in blocks of 256: off by at most half the widest gap of the map, in units of the block's largest.

    The largest itself, where negative, has a code that is as far away. A millionth is for the division by it.
    """
    error, sizes = (values - exact).abs().flatten(), exact.abs().flatten()
    missing = -len(sizes) % 256
    largest = torch.nn.functional.pad(sizes, (0, missing)).view(-1, 256).amax(1).repeat_interleave(256)[: len(sizes)]
    assert (error <= (qmap.diff().max() / 2 + 1e-6) * largest).all()


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank of two, whose collectives do nothing."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def sharded(mesh: Any, **kwargs: Any) -> tuple[fusedopt.AdamW, torch.nn.Parameter, fusedopt.AdamW, torch.nn.Parameter]:
    """The first 64 of 127 rows of a parameter, and the same rows whole, both stepped."""
    from torch.distributed.tensor import DTensor, Shard

    whole = torch.randn(127, 128, generator=torch.Generator().manual_seed(0))

    def shard(tensor: Tensor) -> Tensor:
        return DTensor.from_local(
            tensor[:64].clone(), mesh, [Shard(0)], run_check=False, shape=(127, 128), stride=(128, 1)
        )

    param, twin = torch.nn.Parameter(shard(whole)), torch.nn.Parameter(whole.clone())
    ours, theirs = fusedopt.AdamW([param], **kwargs), fusedopt.AdamW([twin], **kwargs)
    param.grad, twin.grad = shard(whole.sin()), whole.sin()
    ours.step()
    theirs.step()
    return ours, param, theirs, twin
