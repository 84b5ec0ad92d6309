"""What frameworks do with optimizers: torchtitan's container, Accelerate's FSDP2, FSDP of version 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import assert_same_bits
from sharded.models import (
    EIGHT_BIT,
    assert_same_whole,
    loss_of,
    params_of,
    set_grads,
    shard,
    tokens,
    transformer,
    whole,
)
from sharded.ranks import Ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import fusedopt
from fusedopt.storage.state import FLAT_NUMEL


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """One optimizer for each part of a model, with one state dict, keyed by names: as torchtitan has it.

    Args:
        parts: The parts of the model that are on this rank.
        cls: The optimizers' class.
        **kwargs: Of each of them.
    """

    def __init__(self, parts: list[torch.nn.Module], cls: Any, **kwargs: Any) -> None:
        self.parts, self.optimizers, every = parts, [], []
        for part in parts:
            params = [p for p in part.parameters() if p.requires_grad]
            self.optimizers.append(cls(params, **kwargs))
            every += params
        torch.optim.Optimizer.__init__(self, every, kwargs)
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)

    def step(self, *args: Any, **kwargs: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        super().zero_grad(*args, **kwargs)
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, optimizer in zip(self.parts, self.optimizers):
            found |= get_optimizer_state_dict(part, optimizer, options=self.options)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state_dict, options=self.options)


def _container(rank: int, world: int, folder: str) -> None:
    kwargs = {"lr": 1e-2, "seed": 3, **EIGHT_BIT, "max_grad_norm": 0.5}

    def build() -> OptimizersContainer:
        model = shard(transformer())
        model.embedding.weight.requires_grad_(False)  # shared parameters are in two parts
        parts = [torch.nn.ModuleDict({str(i): block}) for i, block in enumerate(model.blocks)]
        return OptimizersContainer(parts, fusedopt.AdamW, **kwargs)

    container = build()
    scheduler = torch.optim.lr_scheduler.LambdaLR(container.optimizers[0], lambda step: 1 / (1 + step))
    for step in range(2):
        for optimizer in container.optimizers:
            set_grads(optimizer, step)
        container.step()
        scheduler.step()
        container.zero_grad()
    names = container.state_dict().keys()
    assert "state.1.query.weight.exp_avg_codes" in names
    assert "param_groups.0.query.weight.state_dtype" in names
    dcp.save({"optimizer": container}, checkpoint_id=folder)
    other = build()
    dcp.load({"optimizer": other}, checkpoint_id=folder)
    for ours, theirs in zip(other.optimizers, container.optimizers):
        for param, twin in zip(params_of(ours), params_of(theirs)):
            assert ours.state[param].keys() == theirs.state[twin].keys()
            for key, value in theirs.state[twin].items():
                assert_same_bits(whole(ours.state[param][key]), whole(value), key)
    assert other.optimizers[0].param_groups[0]["lr"] == container.optimizers[0].param_groups[0]["lr"] < 1e-2


def test_torchtitans_container(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2, _container, folder=str(tmp_path))


def _param_names(rank: int, world: int) -> None:
    """Groups of named parameters give state dicts keyed by name, sharded or not."""
    model, twin = shard(transformer()), transformer()
    ours = fusedopt.AdamW(model.named_parameters(), lr=1e-2)
    theirs = fusedopt.AdamW(twin.named_parameters(), lr=1e-2)
    for optimizer in (ours, theirs):
        set_grads(optimizer, 0)
        optimizer.step()
        optimizer.zero_grad()
    assert ours.state_dict()["param_groups"][0]["param_names"] == theirs.state_dict()["param_groups"][0]["param_names"]
    states = get_optimizer_state_dict(model, ours)
    assert {"embedding.weight", "blocks.1.mix"} < states["state"].keys()
    set_optimizer_state_dict(model, ours, states)
    assert_same_whole(ours, theirs)


def test_states_are_keyed_by_name(ranks: Ranks) -> None:
    ranks(2, _param_names)


def _swapped(rank: int, world: int) -> None:
    """Accelerate shards a model that an optimizer has already, and puts the new parameters in its groups.

    Its own way needs devices: on CPUs it leaves the plugin for FSDP unused.
    """
    model, twin = transformer(), transformer()
    kwargs = {"lr": 1e-2, "max_grad_norm": 0.5, **EIGHT_BIT}
    optimizer, theirs = fusedopt.AdamW(model.parameters(), **kwargs), fusedopt.AdamW(twin.parameters(), **kwargs)
    names = {id(param): name for name, param in model.named_parameters()}
    shard(model)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(param)]] for param in group["params"]]
    for step in range(2):
        for each, net in ((optimizer, model), (theirs, twin)):
            loss_of(net, tokens(step)).backward()
            each.step()
            each.zero_grad()
    listed = {id(param) for param in params_of(optimizer)}
    assert {id(param) for param in optimizer.state} <= listed, "state of parameters that are gone"
    assert all(type(param).__name__ == "DTensor" for param in optimizer.state)
    assert torch.allclose(optimizer.last_grad_norm, theirs.last_grad_norm, rtol=1e-5)


def test_parameters_that_are_swapped_for_shards(ranks: Ranks) -> None:
    ranks(2, _swapped)


def _flat(rank: int, world: int) -> None:
    """FSDP of version 1 hands over flat vectors, the biases of a model among them: they are kept in 8 bits."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(700, 800), torch.nn.ReLU(), torch.nn.Linear(800, 7))
    flat = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    optimizer = fusedopt.AdamW(flat.parameters(), lr=1e-3, state_dtype="8bit")
    losses = []
    for _ in range(4):
        loss = flat(torch.ones(3, 700)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    (param,) = params_of(optimizer)
    assert param.dim() == 1
    assert param.numel() >= FLAT_NUMEL
    held = optimizer.state[param]
    assert held["exp_avg_codes"].shape == param.shape
    assert held["exp_avg_sq_scales"].shape == (-(-param.numel() // 64),)
    assert losses[-1] < losses[0]
    optimizer.load_state_dict(optimizer.state_dict())
    dist.barrier()


def test_flat_shards_are_quantized(ranks: Ranks) -> None:
    ranks(2, _flat)
