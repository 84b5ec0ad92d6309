"""DTensor parameters: a shard is stepped as the slice that it is of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits, train

import fusedopt

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
ROWS, COLUMNS = 11, 300


# Worlds of different sizes: torch caches what it works out about a mesh, and one process has one rank.
@pytest.fixture(params=[(0, 2), (1, 3), (3, 4)], ids=str)
def world(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """One rank of several, whose collectives do nothing: (rank, world size)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=request.param[0], world_size=request.param[1], store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def whole(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(ROWS, COLUMNS, generator=generator).bfloat16() for _ in range(2))


EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": ROWS * COLUMNS, "master_weights": "split24"}


@pytest.mark.parametrize("state_format", [{"state_dtype": "bfloat16"}, EIGHT_BIT], ids=["bf16", "8bit"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_shard_equals_its_slice(world: tuple[int, int], backend: str, state_format: dict) -> None:
    """Uneven shards and stochastic rounding included: random bits hang on the global index."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world[1],))
    share = -(-ROWS // world[1])
    rows = slice(world[0] * share, min((world[0] + 1) * share, ROWS))  # the last share is smaller

    def shard(tensor: torch.Tensor) -> DTensor:
        local = tensor[rows].clone()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())

    kwargs = {"lr": 1e-2, **state_format, "seed": 3, "backend": backend}
    sharded = fusedopt.AdamW([torch.nn.Parameter(shard(whole(0)[0]))], **kwargs)
    full = fusedopt.AdamW([torch.nn.Parameter(whole(0)[0])], **kwargs)
    train(sharded, 3, grads=lambda params, step: setattr(params[0], "grad", shard(whole(step)[1])))
    train(full, 3, grads=lambda params, step: setattr(params[0], "grad", whole(step)[1]))

    param, twin = sharded.param_groups[0]["params"][0], full.param_groups[0]["params"][0]
    assert_same_bits(param.to_local(), twin.detach()[rows])
    assert sharded.state[param].keys() == full.state[twin].keys()
    for name in sharded.state[param].keys() - {"step"}:
        state = sharded.state[param][name]
        assert isinstance(state, DTensor)
        assert state.shape == full.state[twin][name].shape
        assert state.placements == (Shard(0),)
        assert_same_bits(state.to_local(), full.state[twin][name][rows])
    assert not isinstance(sharded.state[param]["step"], DTensor)


def test_parts_of_sums_are_an_error(world: tuple[int, int]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (world[1],))

    def optimizer(placement: object, **kwargs: object) -> fusedopt.AdamW:
        param = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [placement], run_check=False))
        param.grad = torch.ones_like(param)
        return fusedopt.AdamW([param], **kwargs)

    message = r"placement is Partial.*, whose numbers are parts that are still to be summed; redistribute it"
    with pytest.raises(ValueError, match=message):
        optimizer(Partial()).step()
    optimizer(Replicate()).step()


def test_state_dicts_keep_dtensors(world: tuple[int, int]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world[1],))
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)], run_check=False))
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.AdamW([param], state_dtype="bfloat16")
    optimizer.step()
    before = optimizer.state[param]["exp_avg"].to_local().clone()
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state[param]["exp_avg"]
    assert isinstance(after, DTensor)
    assert_same_bits(after.to_local(), before)
    optimizer.step()
