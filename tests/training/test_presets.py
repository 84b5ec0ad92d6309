"""Presets: the product brief's tasks with its numbers, and others, each with reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt import training
from fusedopt.training import Recipe

_LINEAR, _COSINE = {"name": "linear"}, {"name": "cosine"}
# Row 27: what the brief recommends for its five tasks.
BRIEF: dict[str, dict[str, Any]] = {
    "llm-pretraining": {
        "lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "schedule": _COSINE, "warmup": 2000,
        "optimizer": "adamw_torch_fused", "precision": "bfloat16", "steps": 200_000,  # of which the warmup is 1 %
    },
    "multimodal-pretraining": {
        "lr": 5e-5, "weight_decay": 0.01, "betas": (0.9, 0.98), "schedule": _LINEAR, "warmup": 0.1,
        "optimizer": "adamw_torch", "precision": "float16", "dataloader_num_workers": 4,
        "gradient_accumulation_steps": 4,
    },
    "text-classification": {
        "lr": 2e-5, "weight_decay": 0.01, "betas": (0.9, 0.999), "schedule": _LINEAR, "warmup": 0.05,
        "optimizer": "adamw_torch", "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "epochs": 3.0,
    },
    "token-classification": {
        "lr": 3e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "schedule": _COSINE, "warmup": 0.1,
        "optimizer": "adamw_torch", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
    },
    "question-answering": {
        "lr": 1e-5, "weight_decay": 0.01, "betas": (0.9, 0.999), "schedule": _LINEAR, "warmup": 0.06,
        "optimizer": "adamw_torch", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
    },
}  # fmt: skip
NAMES = [*BRIEF, "lora", "full-7b-24gb", "small-from-scratch"]


def test_row_27_the_briefs_tasks_have_its_numbers() -> None:
    for name, numbers in BRIEF.items():
        recipe = training.preset(name)
        assert {field: getattr(recipe, field) for field in numbers} == numbers, name


def test_there_are_all_presets() -> None:
    assert sorted(training.presets()) == sorted(NAMES)
    with pytest.raises(ValueError, match=r"did you mean 'question-answering'.*there are full-7b-24gb, llm-pretraining"):
        training.preset("question-answer")


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_cites_why(name: str) -> None:
    text = training.find_preset(name).text
    assert text.startswith("# ")
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    # A number without a comment is the optimizer's or Trainer's own default, or belongs to the comment before it.
    assert text.count("\n# ") >= 3


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_builds(name: str) -> None:
    recipe = training.preset(name).replaced(lora_rank=None, release_gradients=False)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(getattr(torch, recipe.weights_dtype))
    optimizer, scheduler = recipe.build(model, recipe.steps or 1000)
    model(torch.ones(1, 64, dtype=next(model.parameters()).dtype)).sum().backward()
    for _ in range(2):
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_the_command_writes_a_preset(suffix: str, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    path = tmp_path / f"r.{suffix}"
    assert testing.CliRunner().invoke(app, ["presets", "show", "lora", "--output", str(path)]).exit_code == 0
    assert Recipe.load(path) == training.preset("lora")
    if suffix == "yaml":
        assert path.read_text() == training.find_preset("lora").text


def test_the_command_lists_and_shows() -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    def run(*arguments: str) -> Any:
        return testing.CliRunner().invoke(app, ["presets", *arguments])

    listed = run().output
    assert [line.split()[0] for line in listed.splitlines()] == sorted(NAMES)
    assert sorted(json.loads(run("--json").output)) == sorted(NAMES)
    assert run("show", "lora").output == training.find_preset("lora").text
    assert Recipe.from_dict(json.loads(run("show", "lora", "--json").output)) == training.preset("lora")
    wrong = run("show", "laro")
    assert wrong.exit_code == 2
    assert "preset 'laro' is not known" in wrong.output
