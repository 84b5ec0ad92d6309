"""The learning-rate range test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt.training import Recipe, range_test


def regression(recipe: Recipe, seed: int, budget: int) -> Any:
    """SGD on noisy least squares in ten dimensions, whose largest curvature is 2: it diverges above lr = 1."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(10, 1, bias=False)
    curvature = torch.linspace(0.5, 2.0, 10)
    optimizer, scheduler = recipe.build(model, total_steps=budget)
    for step in range(1, budget + 1):
        lr = optimizer.param_groups[0]["lr"]
        loss = (curvature * (model.weight - 1 + 0.1 * torch.randn(10)) ** 2).sum() / 2
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield {"step": step, "loss": loss.item(), "lr": lr}


SGD = Recipe(optimizer="sgd", lr=0.1, weight_decay=0.0, schedule={"name": "cosine"}, warmup=10)


def test_it_finds_what_trains_and_what_diverges(tmp_path: Path) -> None:
    found = range_test(SGD, regression, low=1e-4, high=100.0, steps=120)
    assert 0.01 < found.steepest < found.lowest < 1.5
    assert 1.0 < found.diverged < 20.0
    assert len(found.losses) < 110
    assert math.isfinite(found.losses[-1])  # it stopped before the loss overflowed
    assert math.isclose(found.lrs[0], 1e-4)
    assert math.isclose(found.lrs[1] / found.lrs[0], 1e6 ** (1 / 119))
    assert found.recipe == SGD
    assert "diverges at" in str(found)
    pytest.importorskip("matplotlib")
    axes = found.plot()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1:] == [
        "smoothed",
        f"falls fastest: {found.steepest:.2g}",
        f"lowest: {found.lowest:.2g}",
        f"diverged: {found.diverged:.2g}",
    ]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("learning rate", "loss")


def test_rates_that_are_too_low_or_fine_do_not_diverge() -> None:
    low = range_test(SGD, regression, low=1e-9, high=1e-8, steps=30)
    assert low.diverged is None
    assert len(low.losses) == 30
    fine = range_test(SGD, regression, low=1e-3, high=0.5, steps=60)
    assert fine.diverged is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "high=0.1 is not above low=1.0"),
        ({"low": 0.0}, "low=0.0 is not positive"),
        ({"steps": 5}, "steps=5 are too few"),
    ],
)
def test_errors_are_sentences(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        range_test(SGD, regression, **arguments)


@pytest.mark.parametrize("every", [7, 10])
def test_a_loop_that_yields_now_and_then_has_the_rates_of_its_steps(every: int) -> None:
    def now_and_then(recipe: Recipe, seed: int, budget: int) -> Any:
        yield from (record for record in regression(recipe, seed, budget) if record["step"] % every == 0)

    whole = range_test(SGD, regression, low=1e-4, high=100.0, steps=300)
    found = range_test(SGD, now_and_then, low=1e-4, high=100.0, steps=300)
    assert found.lrs[: len(whole.lrs) // every] == whole.lrs[every - 1 :: every][: len(found.lrs)]
    assert found.losses[: len(whole.losses) // every] == whole.losses[every - 1 :: every][: len(found.losses)]
    assert found.diverged == found.lrs[-1]
    assert 0.5 < found.diverged < 20.0  # it is looked at less often
    assert 0.005 < found.steepest < found.lowest < 1.5


def test_a_loop_with_a_scheduler_of_its_own_is_found() -> None:
    def own(recipe: Recipe, seed: int, budget: int) -> Any:
        yield from ({"step": step, "loss": 1.0, "lr": 0.1} for step in range(1, budget + 1))

    with pytest.raises(ValueError, match=r"step the scheduler that recipe.build makes"):
        range_test(SGD, own)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_loop.py").write_text(
        "def train(recipe, seed, budget):\n    yield from ((s, 9 - s) for s in range(30))\n"
    )
    SGD.save("sgd.yaml")
    line = ["lr-range", "sgd.yaml", "--train", "a_loop:train", "--steps", "30", "--png", "range.png"]
    result = testing.CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output + str(result.exception)
    assert "falls fastest" in result.output
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
