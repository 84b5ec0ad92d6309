"""timm: registered names, its param groups, and layer decay."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from trainers import same

import fusedopt
from fusedopt.integrations.timm import register

timm = peer("timm")
factory = peer("timm.optim._optim_factory")


@pytest.fixture
def registry() -> Any:
    """A registry of its own, with timm's."""
    made = factory.OptimizerRegistry()
    made._optimizers.update(factory.default_registry._optimizers)
    return made


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=64, num_heads=2, num_classes=5)


def test_every_optimizer_has_a_name_that_timm_reads(registry: Any) -> None:
    before = set(registry._optimizers)
    names = register(registry)
    during = {"compiledlomo", "compiledadalomo"}  # they step during the backward pass, and timm clips after it
    assert not during & set(names)
    assert len(names) == len(fusedopt.optimizer_names()) - len(during)
    assert not before & set(names)
    assert not any(name.startswith(("fused", "bnb")) or "_" in name for name in names)
    params = [torch.nn.Parameter(torch.ones(64, 64))]
    for name in names:
        if "4bit" not in name:
            made = registry.create_optimizer(params, name, lr=1e-3, weight_decay=0.01)
            assert isinstance(made, fusedopt.FusedOptimizer), name


def test_layer_decay_and_steps(registry: Any) -> None:
    """timm's param groups, with the bits of our class on the same groups."""
    register(registry)
    runs = []
    for make in ("timm", "alone"):
        model = network()
        if make == "timm":
            optimizer = registry.create_optimizer(
                model, "compiledadamw8bit", lr=1e-3, weight_decay=0.05, layer_decay=0.75, betas=(0.9, 0.95)
            )
        else:
            groups = peer("timm.optim").param_groups_layer_decay(
                model, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=model.no_weight_decay()
            )
            optimizer = fusedopt.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), state_dtype="8bit", weight_decay=0.0)
        assert type(optimizer) is fusedopt.AdamW
        scheduler = peer("timm.scheduler").CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, lr_min=1e-5)
        lrs = []
        for step in range(4):
            model(torch.ones(2, 3, 32, 32) * (step + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(step + 1)
            lrs.append([group["lr"] for group in optimizer.param_groups])
        runs.append((model, lrs))
    assert len(set(runs[0][1][0])) > 2  # layers learn at rates of their own
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][0], runs[1][0])


def test_the_default_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory.default_registry, "_optimizers", dict(factory.default_registry._optimizers))
    register()
    create_optimizer_v2, model = peer("timm.optim").create_optimizer_v2, network()
    optimizer = create_optimizer_v2(model, opt="compiledadamw8bit", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert type(optimizer) is fusedopt.AdamW


@pytest.mark.parametrize("opt", ["compiledadamw8bit", "compiledlion"])
def test_resuming_from_timms_checkpoint_is_never_having_stopped(opt: str, tmp_path: Path, registry: Any) -> None:
    """Saved by timm's CheckpointSaver, and resumed by the function of its training script."""
    register(registry)

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = network()
        return model, registry.create_optimizer(model, opt, lr=1e-3, weight_decay=0.05, layer_decay=0.75)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            model(torch.ones(2, 3, 32, 32) * (step + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    train(model, optimizer, range(3))
    saver = peer("timm.utils").CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model="vit"), checkpoint_dir=str(tmp_path), max_history=1
    )
    saver.save_checkpoint(epoch=0)
    train(model, optimizer, range(3, 6))

    again, other = made()
    resume = peer("timm.models").resume_checkpoint
    assert resume(again, str(tmp_path / "last.pth.tar"), optimizer=other, log_info=False) == 1
    train(again, other, range(3, 6))
    assert same(model, again)
    for param, twin in zip(model.parameters(), again.parameters()):
        assert optimizer.state[param].keys() == other.state[twin].keys()
        assert all(torch.equal(value, other.state[twin][key]) for key, value in optimizer.state[param].items())
