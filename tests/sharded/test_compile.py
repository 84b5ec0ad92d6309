"""Compiled steps of DTensors: the bits of uncompiled ones, without recompiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import assert_same_bits, params_of
from sharded.models import EIGHT_BIT, full_params, loss_of, placed, set_grads, shard, tokens, transformer
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fusedopt

SHAPES = ((64, 128), (7, 71), (2, 70), (31,))
OPTIMIZERS: dict[str, tuple[type[fusedopt.FusedOptimizer], torch.dtype, dict[str, Any]]] = {
    "8bit": (fusedopt.AdamW, torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24", "lr": 1e-2}),
    "clipped": (fusedopt.Lion, torch.float32, {"max_grad_norm": 0.01, "lr": 1e-2}),
    "sums": (fusedopt.Adafactor, torch.float32, {"lr": 1e-2, "relative_step": False, "scale_parameter": True}),
}


def _same_bits(rank: int, world: int, name: str) -> None:
    cls, dtype, kwargs = OPTIMIZERS[name]
    mesh = init_device_mesh("cpu", (world,))
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    runs = []
    for is_compiled in (False, True):
        params = [
            torch.nn.Parameter(placed(full, mesh, [Shard(i % 2 if full.dim() > 1 else 0)]))
            for i, full in enumerate(full_params(SHAPES, dtype))
        ]
        optimizer = cls([*params, torch.nn.Parameter(torch.ones(3, dtype=dtype))], **kwargs)
        if name == "8bit":
            optimizer.param_groups[0]["lr"] = torch.tensor(0.01)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        take = torch.compile(step, backend=counter, fullgraph=True) if is_compiled else step
        for i in range(4):
            set_grads(optimizer, i, dtype)
            take()
            if name == "8bit":
                optimizer.param_groups[0]["lr"].mul_(0.9)
        runs.append(optimizer)
    assert counter.frame_count == 1
    for param, twin in zip(*map(params_of, runs)):
        for ours, theirs in ((param, twin), *((runs[0].state[param][k], v) for k, v in runs[1].state[twin].items())):
            assert isinstance(ours, DTensor) == isinstance(theirs, DTensor)
            assert_same_bits(*(x.to_local() if isinstance(x, DTensor) else x for x in (ours, theirs)))
    if name == "clipped":
        assert torch.equal(runs[0].last_grad_norm, runs[1].last_grad_norm)


@pytest.mark.parametrize("name", ["8bit", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("clipped", "sums"))])
def test_compiled_steps_have_the_same_bits(ranks: Ranks, name: str) -> None:
    ranks(2, _same_bits, name=name)


def _whole_train_step(rank: int, world: int) -> None:
    """The step, backward pass included; where torch cannot follow, it compiles what it can."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    runs = []
    for is_compiled in (False, True):
        model = shard(transformer())
        optimizer = fusedopt.AdamW(model.parameters(), lr=torch.tensor(0.01), **EIGHT_BIT)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def train_step(batch: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        take = torch.compile(train_step, backend=counter) if is_compiled else train_step
        frames = 0
        for step in range(4):
            take(tokens(step))
            scheduler.step()
            if step == 1:
                frames = counter.frame_count
        assert counter.frame_count == frames, "a later step was compiled again"
        runs.append(optimizer)
    for param, twin in zip(*map(params_of, runs)):
        assert torch.allclose(param.full_tensor(), twin.full_tensor(), rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_a_compiled_train_step(ranks: Ranks) -> None:
    ranks(2, _whole_train_step)
