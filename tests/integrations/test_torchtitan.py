"""torchtitan: its container makes our optimizers, and keeps their state by the names of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import peer
from torch import nn
from trainers import same

import fusedopt
from fusedopt.integrations import torchtitan as ours
from fusedopt.integrations.torchtitan import config

peer("torchtitan.components.optimizer")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(torch.randn(4, 128, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_ours_steps_and_resumes_from_its_flat_state() -> None:
    made = config(lr=1e-2)
    model = network()
    container = made.build(model_parts=[model])
    assert isinstance(container, ours.OptimizersContainer)
    (optimizer,) = container
    assert type(optimizer) is fusedopt.AdamW
    assert {optimizer.defaults[key] for key in ("state_dtype",)} == {"8bit"}
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    alone = network()
    loop = fusedopt.AdamW(alone.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, state_dtype="8bit")
    train(model, container, range(3))
    train(alone, loop, range(3))
    assert same(model, alone)
    saved, weights = container.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    saved = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in saved.items()}
    assert saved["state.0.weight.exp_avg_codes"].dtype == torch.uint8
    train(model, container, range(3, 6))
    resumed = network()
    resumed.load_state_dict(weights)
    again = made.build(model_parts=[resumed])
    again.load_state_dict(saved)
    train(resumed, again, range(3, 6))
    assert same(model, resumed)


def test_torchtitans_schedule_sets_the_lr() -> None:
    from torchtitan.components.optimizer import LRSchedulersContainer

    optimizer = config("adamw_8bit", lr=8e-4)
    assert optimizer.param_groups[0].optimizer_name == "adamw_8bit"
    model = network()
    container = config("lion", lr=1e-2).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=None, decay_type="linear")
    schedulers = schedule.build(optimizers=container, training_steps=6)
    lrs = []
    for step in range(6):
        lrs.append(next(iter(container)).param_groups[0]["lr"])
        train(model, container, range(step, step + 1))
        schedulers.step()
    assert lrs[0] < lrs[1]
    assert max(lrs) == 1e-2
    assert lrs[-1] < lrs[-2]


def test_names_of_torchtitan_stay_its_own() -> None:
    from torchtitan.components.optimizer import ParamGroupConfig

    groups = [
        ParamGroupConfig(pattern=r"\.weight$", optimizer_name="adamw_bf16", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3, "fused": False}),
    ]
    made = ours.OptimizersContainer.Config(param_groups=groups).build(model_parts=[network()])
    assert [type(optimizer) for optimizer in made] == [fusedopt.AdamW, torch.optim.AdamW]
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 would clip again what torchtitan has clipped"):
        config(max_grad_norm=1.0)
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="adalomo", optimizer_kwargs={"lr": 1e-3})]
    during = r"name '{}' steps and frees gradients during the backward pass, and torchtitan clips .*; use '{}'"
    with pytest.raises(ValueError, match=during.format("lomo", "sgd")):
        config("lomo")
    with pytest.raises(ValueError, match=during.format("adalomo", "adafactor")):
        ours.OptimizersContainer.Config(param_groups=groups).build(model_parts=[network()])
    with pytest.raises(NotImplementedError, match="Optimizer adamv not added"):
        config("adamv").build(model_parts=[network()])
