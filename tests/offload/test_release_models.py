"""Gradient release in models: tied weights, checkpoints in the backward pass, processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import assert_same_bits, assert_same_run, needs_fsdp2, params_of
from released import Tied, fit
from torch import Tensor

import fusedopt
from fusedopt.offload.passes import check_reducers


@pytest.mark.parametrize("bucket", [1, 2000, 2**20])
def test_tied_and_unused_weights(bucket: int) -> None:
    released, losses = fit(True, bucket_numel=bucket)
    usual, expected = fit(False)
    assert losses == expected
    assert_same_run(released, usual)


def test_checkpoints_in_the_backward_pass() -> None:
    """Reentrant ones run passes of their own within the pass."""

    class Checkpointed(Tied):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.middle[:2]:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
            return self.middle[2](x).square().mean()  # comes first in the backward pass

    released, losses = fit(True, model=Checkpointed(), bucket_numel=1)
    usual, expected = fit(False, model=Checkpointed())
    assert losses == expected
    assert_same_run(released, usual)


# ---- processes -------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[None]:
    """A group of one process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2(world: None) -> None:
    needs_fsdp2()
    from torch.distributed.fsdp import fully_shard

    def model() -> torch.nn.Module:
        found = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 50))
        for layer in (*found[1:], found):
            fully_shard(layer)
        torch.manual_seed(0)
        for param in found.parameters():
            torch.nn.init.normal_(param.to_local())
        return torch.nn.ModuleList([found])

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.model,) = model()

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(self.model(x), x)

    released, losses = fit(True, model=Loss(), bucket_numel=1)
    usual, expected = fit(False, model=Loss())
    assert losses == expected
    for param, twin in zip(params_of(released), params_of(usual)):
        assert_same_bits(param.to_local(), twin.to_local())
        for key, value in usual.state[twin].items():
            ours = released.state[param][key]
            assert_same_bits(ours if key == "step" else ours.to_local(), value if key == "step" else value.to_local())


def test_distributed_data_parallel(world: None) -> None:
    """Whichever comes first, the wrapper or the handle."""
    model = Tied()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    message = "belong to a DistributedDataParallel, which averages gradients.*use FSDP2"
    with pytest.raises(ValueError, match=message):
        fusedopt.release_gradients(fusedopt.AdamW(model.parameters()))
    check_reducers(Tied().parameters())
    del wrapped
    model = Tied()
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.release_gradients(optimizer)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match=message):
        wrapped(torch.arange(8)).backward()
