"""A real training run: smaller state must not cost loss."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import peer

import fusedopt

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from gpt import Config, Training

SEEDS = (0, 1, 2)


def trained(seed: int, make: Callable[[list[dict], Config], torch.optim.Optimizer]) -> Training:
    """The demo's GPT after its 200 steps."""
    training = Training(make, replace(Config(), seed=seed))
    for _ in range(training.config.steps):
        training.step()
    return training


def final_loss(seed: int, dtype: torch.dtype = torch.float32, **kwargs: object) -> float:
    """Its validation loss with AdamW."""

    def make(groups: list[dict], config: Config) -> fusedopt.FusedOptimizer:
        for group in groups:
            for param in group["params"]:
                param.data = param.data.to(dtype)
        return fusedopt.AdamW(groups, lr=config.lr, betas=config.betas, **kwargs)

    training = trained(seed, make)
    # Judged with float32 arithmetic and the full weights: what is left is what the optimizer did.
    weights = fusedopt.fp32_parameters(training.optimizer, training.model)
    training.model.float().load_state_dict(weights, strict=False)
    return training.validation_loss()


@pytest.fixture(scope="module")
def float32_losses() -> list[float]:
    return [final_loss(seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "limit"),
    [
        ({"state_dtype": "8bit"}, 0.005),
        ({"state_dtype": "8bit", "master_weights": "split24", "dtype": torch.bfloat16}, 0.01),
    ],
    ids=["8bit", "bf16 + split24 + 8bit"],
)
def test_loss_of_the_demos_gpt(float32_losses: list[float], kwargs: dict, limit: float) -> None:
    losses = [final_loss(seed, **kwargs) for seed in SEEDS]
    print(f"float32 {float32_losses}, ours {losses}")
    for ours, reference in zip(losses, float32_losses):
        assert abs(ours / reference - 1) <= limit
    assert abs(statistics.fmean(losses) / statistics.fmean(float32_losses) - 1) <= limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {"scale_parameter": True, "relative_step": True, "warmup_init": False},
        {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "warmup_init": False},
    ],
    ids=["relative_step", "external lr"],
)
def test_loss_with_adafactor_is_that_of_transformers(kwargs: dict) -> None:
    """Nearly the same; a learning rate that is given follows the demo's schedule."""

    def loss(cls: type[torch.optim.Optimizer], seed: int) -> float:
        def make(groups: list[dict], config: Config) -> torch.optim.Optimizer:
            return cls([{"params": group["params"]} for group in groups], **kwargs)

        return trained(seed, make).validation_loss()

    ours = [loss(fusedopt.Adafactor, seed) for seed in SEEDS]
    theirs = [loss(peer("transformers.optimization").Adafactor, seed) for seed in SEEDS]
    print(f"transformers {theirs}, ours {ours}")
    for mine, reference in zip(ours, theirs):
        assert abs(mine / reference - 1) <= 1e-3  # found: 7e-5
