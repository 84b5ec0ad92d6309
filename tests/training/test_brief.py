"""Rows 27 to 49 of the product brief: where each is, and a test for each (docs/training/brief.md)."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import peer
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

import fusedopt
from fusedopt import schedules, training
from fusedopt.training import Recipe

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "training" / "brief.md"


def test_the_table_has_every_row_and_its_test_is_there() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|.*?\| `(test_\w+)` \|", PAGE.read_text(), re.MULTILINE)
    numbers = sorted(int(number) for cell, _ in rows for number in cell.split(","))
    assert numbers == [number for number in range(27, 50) if number != 41]
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert [name for _, name in rows if f"def {name}(" not in sources] == []
    for cell, name in rows:
        assert all(number.strip() in name for number in cell.split(","))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))


def test_rows_30_and_31_warmups_of_all_shapes_and_times() -> None:
    for shape in ("linear", "exponential", "cosine"):
        early = schedules.warmup(10, shape) >> schedules.constant()
        assert (early(0), early(10), early(50)) == (0.0, 1.0, 1.0)
        assert all(early(step) < early(step + 1) for step in range(10))
    late = schedules.constant(20, value=0.1) >> schedules.warmup(10) >> schedules.constant()
    assert (late(19), late(30)) == (0.1, 1.0)
    stages = schedules.warmup(5, end=0.3) >> schedules.constant(5) >> schedules.warmup(5) >> schedules.constant()
    assert (stages(5), stages(9), stages(15)) == (0.3, 0.3, 1.0)
    recipe = Recipe(schedule=(schedules.warmup(0.1, "cosine") >> schedules.decay("linear", 0.9)).to_dict())
    assert recipe.build(model(), 100)[1].get_last_lr() == [0.0, 0.0]


def test_row_32_the_loss_drives_the_rate() -> None:
    optimizer, scheduler = Recipe(lr=1.0, schedule={"name": "reduce_lr_on_plateau", "patience": 1}).build(model(), 20)
    for loss in (1.0, 1.0, 1.0, 1.0):  # the first step sets what the brief's never did
        optimizer.step()
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_rows_33_and_34_gradients_drive_the_rate() -> None:
    for name in ("gradient_norm", "gradient_sparsity"):
        assert name in schedules.scheduler_names()
        optimizer, scheduler = Recipe(lr=1.0, schedule={"name": name}).build(model(), 20)
        assert len(scheduler.get_last_lr()) == len(optimizer.param_groups)


def test_rows_35_and_36_a_recipe_clips_and_accumulates(tmp_path: Path) -> None:
    peer("transformers")
    pytest.importorskip("accelerate")
    recipe = Recipe(max_grad_norm=0.5, gradient_accumulation_steps=4)
    optimizer, _ = recipe.build(model(), 10)
    assert optimizer.param_groups[0]["max_grad_norm"] == 0.5
    arguments = recipe.to_training_arguments(str(tmp_path), use_cpu=True)
    assert (arguments.max_grad_norm, arguments.gradient_accumulation_steps) == (0.5, 4)


def test_row_37_a_recipe_says_precision_and_checkpointing(tmp_path: Path) -> None:
    peer("transformers")
    pytest.importorskip("accelerate")
    recipe = Recipe(precision="bfloat16", gradient_checkpointing=True)
    arguments = recipe.to_training_arguments(str(tmp_path), use_cpu=True)
    assert (arguments.bf16, arguments.gradient_checkpointing) == (True, True)
    assert [f.field for f in training.validate(Recipe(precision="float16", steps=100)).errors] == ["loss_scaling"]


def test_row_38_state_is_compressed_in_memory_and_on_disk(tmp_path: Path) -> None:
    sizes = {}
    for form in ("float32", "8bit"):
        net = model()
        optimizer, _ = Recipe(options={"state_dtype": form}, decay="all").build(net, 10)
        net(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / form)
        sizes[form] = (tmp_path / form).stat().st_size
    # A quarter, and what the file says besides numbers: names, biases in float32, and a scale for each block.
    assert sizes["8bit"] < 0.4 * sizes["float32"]


def test_row_39_troubles_are_found_with_remedies() -> None:
    findings = training.validate(Recipe(optimizer="lion", lr=1e-2, warmup=200, steps=100))
    assert {"lr", "warmup"} <= {finding.field for finding in findings}
    assert all(finding.remedy and finding.reason for finding in findings)


def test_row_40_a_recipe_says_compile(tmp_path: Path) -> None:
    peer("transformers")
    pytest.importorskip("accelerate")
    assert Recipe(compile=True).to_training_arguments(str(tmp_path), use_cpu=True).torch_compile


def test_row_44_a_spike_is_found_at_any_scale() -> None:
    """The brief's fixed range of 1.0 sees neither of a small loss's spikes, and takes a fast descent for one."""
    for scale in (1e-3, 1.0, 1e3):
        detector = training.Detector()
        draw = torch.Generator().manual_seed(0)
        found = []
        for step in range(1, 201):
            loss = scale * (2.0 + 0.02 * torch.randn((), generator=draw).item() + (3.0 if step == 180 else 0.0))
            found += [each.step for each in detector.add({"step": step, "loss": loss, "lr": 1e-3})]
        assert found == [180], scale


def test_row_45_a_schedule_is_dumped_without_a_warning() -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = testing.CliRunner().invoke(app, ["schedule", "dump", "cosine", "--warmup", "10", "--steps", "100"])
    assert len(result.output.splitlines()) == 101


def test_row_47_no_unit_is_added_to_another() -> None:
    """The brief's score of a loss of 3 with an accuracy of 0.9 is -0.55; here a loss has a scale of its own."""
    metrics = [training.Metric("loss", scale=0.1), training.Metric("accuracy", "maximize", scale=0.01)]
    found = training.Evaluator(metrics).evaluate(
        {"a": {"loss": 3.0, "accuracy": 0.90}, "b": {"loss": 3.05, "accuracy": 0.92}}
    )
    assert found.best == "b"
    with pytest.raises(ValueError, match="a has no 'loss'"):  # the brief counts it as 0
        training.Evaluator(metrics).evaluate({"a": {"accuracy": 0.9}})


def test_row_49_a_recipe_is_the_same_after_any_file(tmp_path: Path) -> None:
    recipe = training.preset("llm-pretraining")
    for suffix in ("yaml", "toml", "json"):
        recipe.save(tmp_path / f"r.{suffix}")
        assert Recipe.load(tmp_path / f"r.{suffix}").fingerprint == recipe.fingerprint
    nets = [model(), model()]
    for net in nets:
        optimizer, scheduler = recipe.replaced(weights_dtype="float32").build(net, 50)
        for _ in range(3):
            net(torch.ones(2, 64)).square().sum().backward()
            optimizer.step()
            scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert isinstance(optimizer, fusedopt.AdamW)
