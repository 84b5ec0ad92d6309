"""`run`: what it goes on from, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt import training
from fusedopt.training import Recipe, run


def plain(recipe: Recipe, seed: int, budget: int) -> Any:
    yield from ((step, recipe.lr / step) for step in range(1, budget + 1))


def saving(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
    """Its learning rate is in the checkpoint, as an optimizer's is."""
    file = folder / "checkpoint.json"
    done, lr = json.loads(file.read_text()) if file.exists() else (0, recipe.lr)
    for step in range(done + 1, budget + 1):
        file.write_text(json.dumps([step, lr]))
        yield {"step": step, "loss": 1.0 / step, "lr": lr}
    return {"accuracy": 0.5}


@pytest.mark.parametrize("loop", [plain, saving])
@pytest.mark.parametrize("change", [{"lr": 5e-3}, {"seed": 7}, {"loop": None}])
def test_a_file_of_something_else_is_left_alone(loop: Any, change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), loop, 4, path)
    before = path.read_bytes()
    other = saving if loop is plain else plain
    seed = change.get("seed")
    with pytest.raises(ValueError, match=r"run.jsonl was begun with another (lr|seed|loop) .*pass another path"):
        run(Recipe(lr=change.get("lr", 1e-3)), other if "loop" in change else loop, 4, path, seed=seed)
    assert path.read_bytes() == before
    again = run(Recipe(lr=1e-3, notes="a label"), loop, 4, path)
    assert (again.status, again.step) == ("finished", 4)
    assert [record["step"] for record in training.read_run(path).records] == [1, 2, 3, 4]


def test_checkpoints_go_on_with_their_own_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), saving, 4, path)
    assert run(Recipe(lr=1e-3), saving, 8, path).step == 8  # a longer training of the same
    assert [record["step"] for record in training.read_run(path).records] == list(range(1, 9))
    assert training.read_run(path).header["recipe"] == Recipe(lr=1e-3).to_dict()
    path.unlink()
    with pytest.raises(ValueError, match=r"run has checkpoints, and .*run.jsonl, which says of what, is missing"):
        run(Recipe(lr=5e-3), saving, 8, path)
    shutil.rmtree(tmp_path / "run")
    assert run(Recipe(lr=5e-3), saving, 8, path).metrics["lr"] == 5e-3


def test_a_loop_that_is_killed_before_its_first_record_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def early(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
        was_there = (folder / "x").exists()
        (folder / "x").touch()
        if not was_there:
            raise KeyboardInterrupt
        yield from plain(recipe, seed, budget)

    with pytest.raises(KeyboardInterrupt):
        run(Recipe(lr=1e-3), early, 4, path)
    assert run(Recipe(lr=1e-3), early, 4, path).step == 4


def test_a_file_that_run_has_not_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    optimizer = fusedopt.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with training.Monitor(path, optimizer) as monitor:
        monitor.step(1.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`run` has not written it.*pass another path, or remove the file"):
        run(Recipe(lr=1e-3), plain, 4, path)
    assert path.read_bytes() == before
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="is no record of a run"):
        run(Recipe(lr=1e-3), plain, 4, path)
    path.write_bytes(b"")
    assert run(Recipe(lr=1e-3), plain, 4, path).step == 4


def test_its_anomalies_and_its_recipe_are_found_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def broken(recipe: Recipe, seed: int, budget: int) -> Any:
        yield from ((step, 1.0 if step < 3 else float("nan")) for step in range(1, budget + 1))

    run(Recipe(lr=1e-3), broken, 9, path)
    recorded = training.read_run(path)
    assert [each.kind for each in recorded.anomalies] == ["non_finite"]
    assert [each.trouble for each in training.diagnose(recorded)] == ["unstable"]


def test_a_text_beside_the_numbers_is_written_and_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def talks(recipe: Recipe, seed: int, budget: int) -> Any:
        yield from ({"step": step, "loss": 1.0 / step, "phase": "warmup"} for step in range(1, budget + 1))
        return {"accuracy": 0.5, "note": "fine"}

    found = run(Recipe(), talks, 5, path)
    assert found.metrics["accuracy"] == 0.5
    assert not {"phase", "note"} & set(found.metrics)
    recorded = training.read_run(path)
    assert recorded.records[0]["phase"] == "warmup"
    assert recorded.anomalies == []
    assert "phase" not in recorded.names()
    with pytest.raises(ValueError, match="whose loss is no number"):
        run(Recipe(), lambda recipe, seed, budget: iter([(1, "low")]), 1, tmp_path / "other.jsonl")
    pytest.importorskip("matplotlib")
    assert "phase" not in training.report(path).markdown()


def test_a_run_whose_loss_is_never_finite_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    loop = lambda recipe, seed, budget: iter({"step": 1, "loss": float("nan"), "lr": 0.1} for _ in range(1))  # noqa: E731
    assert run(Recipe(), loop, 5, path).status == "diverged"
    text = training.report(path).markdown()
    assert "the loss was never finite, in none of 1 records" in text
    assert "| loss | - | - | - | - |" in text
    assert "the loss is nan" in text


def test_a_search_in_which_nothing_finished_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("optuna")
    broken = lambda recipe, seed, budget: iter([(1, float("nan"))])  # noqa: E731
    space = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    found = training.search(space, broken, budget=3, trials=2, sampler="random", folder=tmp_path)
    assert found.best is None
    assert "diverged" in training.report(found).markdown()


@pytest.mark.parametrize("way", ["run", "compare", "search"])
def test_what_was_cut_off_after_the_last_checkpoint_is_finished(way: str, tmp_path: Path) -> None:
    if way == "search":
        pytest.importorskip("optuna")
    cuts = [None]

    def cut_once(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
        result = yield from saving(recipe, seed, budget, folder)
        if cuts:
            cuts.pop()
            raise KeyboardInterrupt  # during the evaluation after the last step
        return result

    def whole() -> Any:
        if way == "run":
            return run(Recipe(lr=1e-3), cut_once, 5, tmp_path / "run.jsonl").metrics
        if way == "compare":
            found = training.compare(
                {"a": Recipe(lr=1e-3), "b": Recipe(lr=2e-3)}, cut_once, 5, seeds=1, folder=tmp_path
            )
            return found.trials[0].metrics
        found = training.search({"lr": [1e-3]}, cut_once, budget=5, trials=1, sampler="grid", folder=tmp_path)
        return found.trials[-1].metrics

    with pytest.raises(KeyboardInterrupt):
        whole()
    metrics = whole()
    assert (metrics["loss"], metrics["accuracy"], metrics["lr"]) == (0.2, 0.5, 1e-3)


@pytest.mark.parametrize(
    ("body", "is_traceback"),
    [
        ("a, b = 1, 2, 3", True),  # of the loop itself
        ("int('x')", True),
        ("json.loads('x')", True),  # of a library that the loop calls
        ("recipe.replaced(lr='x')", False),  # a sentence of ours
        ("yield 'x'", False),
    ],
)
def test_a_bug_in_a_loop_keeps_its_traceback(
    body: str, is_traceback: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "a_loop", raising=False)
    Path("a_loop.py").write_text(f"import json\ndef train(recipe, seed, budget):\n    {body}\n    yield 1, 1.0\n")
    Recipe(lr=1e-3).save("recipe.yaml")
    result = testing.CliRunner().invoke(app, ["train", "recipe.yaml", "--train", "a_loop:train", "--budget", "1"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit) != is_traceback
