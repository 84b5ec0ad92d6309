"""`run`: what it goes on from, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import site
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import plain, saving

import fusedopt

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt import training
from fusedopt.training import Recipe, run


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


def test_buggy_loop_that_is_killed_before_its_first_record_goes_on(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"`run` has not written it.*pass another path, or remove .*run.jsonl"):
        run(Recipe(lr=1e-3), plain, 4, path)
    assert path.read_bytes() == before
    path.write_text("something else\n")
    with pytest.raises(ValueError, match=r"no run file \(line 1 of .* is no record of a run: .*\); pass another path"):
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
    assert "the loss was finite in none of 1 records" in text
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
def test_a_bug_in_buggy_loop_keeps_its_traceback(
    body: str, is_traceback: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "buggy_loop", raising=False)
    Path("buggy_loop.py").write_text(f"import json\ndef train(recipe, seed, budget):\n    {body}\n    yield 1, 1.0\n")
    Recipe(lr=1e-3).save("recipe.yaml")
    result = testing.CliRunner().invoke(app, ["train", "recipe.yaml", "--train", "buggy_loop:train", "--budget", "1"])
    assert result.exit_code == (1 if is_traceback else 2)
    assert isinstance(result.exception, SystemExit) != is_traceback


def test_what_diverged_at_its_last_step_stays_diverged(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def breaks(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
        for record in saving(recipe, seed, budget, folder):
            yield {**record, "loss": float("nan")} if record["step"] == 4 else record
        return {"accuracy": 0.5}

    first, again, longer = (run(Recipe(lr=1e-3), breaks, budget, path) for budget in (4, 4, 6))
    assert (first.status, first.reason) == ("diverged", "the loss is nan at step 4")
    for found in (again, longer):
        assert (found.status, found.step, found.reason) == (first.status, 4, first.reason)
        assert "accuracy" not in found.metrics
    assert [record["step"] for record in training.read_run(path).records] == [1, 2, 3, 4]


def test_a_model_that_was_trained_longer_is_not_taken_for_a_shorter_training(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), saving, 6, path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"was trained to step 6 already, and budget=3; pass budget=6 or more, or another"
    ):
        run(Recipe(lr=1e-3), saving, 3, path)
    assert path.read_bytes() == before
    run(Recipe(), plain, 6, tmp_path / "anew.jsonl")  # without checkpoints it begins anew
    assert run(Recipe(), plain, 3, tmp_path / "anew.jsonl").step == 3


def test_an_endless_loop_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    endless = lambda recipe, seed, budget, folder: saving(recipe, seed, 10**6, folder)  # noqa: E731
    outcomes = [run(Recipe(lr=1e-3), endless, 4, tmp_path / "run.jsonl") for _ in range(2)]
    assert [(found.status, found.step, found.metrics["loss"]) for found in outcomes] == [("finished", 4, 0.25)] * 2


@pytest.mark.parametrize("loop", [plain, saving])
def test_files_without_a_header_are_continued(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), loop, 3, path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))  # as the version before wrote it
    with pytest.warns(UserWarning, match=r"run.jsonl has no header.* taken to be of this recipe and loop"):
        assert run(Recipe(lr=1e-3), loop, 5, path).step == 5
    assert [record["step"] for record in training.read_run(path).records] == [1, 2, 3, 4, 5]
    assert training.read_run(path).header["recipe"] == Recipe(lr=1e-3).to_dict()
    with pytest.raises(ValueError, match="was begun with another lr"):
        run(Recipe(lr=5e-3), loop, 5, path)
    path.write_text('{"step": 1, "loss": 1.0}\n')  # of something else
    with pytest.raises(ValueError, match=r"`run` has not written it.*or remove .*run.jsonl"):
        run(Recipe(lr=1e-3), loop, 5, path)


def test_an_empty_file_gets_a_header(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    for budget in (3, 5):
        assert run(Recipe(lr=1e-3), saving, budget, path).step == budget
    assert "loop" in json.loads(path.read_text().splitlines()[0])


def test_a_file_of_a_version_with_fewer_fields_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), saving, 3, path)
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    del header["recipe"]["lora_rank"]
    path.write_text("\n".join([json.dumps(header), *rest, ""]))
    assert run(Recipe(lr=1e-3), saving, 5, path).step == 5
    header["recipe"]["of_a_later_version"] = 1
    path.write_text("\n".join([json.dumps(header), *rest, ""]))
    with pytest.raises(ValueError, match=r"cannot be read here \(of_a_later_version=1 .*pass another path"):
        run(Recipe(lr=1e-3), saving, 5, path)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), np.float32(1), Fraction(1)])
def test_what_float_takes_is_measured(value: Any, tmp_path: Path) -> None:
    def judges(recipe: Recipe, seed: int, budget: int) -> Any:
        yield {"step": 1, "loss": 1.0, "passed": value}
        return {"solved": value, "note": "1", "nothing": None}

    metrics = run(Recipe(), judges, 1, tmp_path / "run.jsonl").metrics
    assert (metrics["passed"], metrics["solved"]) == (1.0, 1.0)
    assert not {"note", "nothing"} & set(metrics)


def test_what_float_does_not_take_is_left_out(tmp_path: Path) -> None:
    def counts(recipe: Recipe, seed: int, budget: int) -> Any:
        yield 1, 1.0
        return {"many": torch.ones(2), "several": np.ones(2), "list": [1.0]}

    assert not {"many", "several", "list"} & set(run(Recipe(), counts, 1, tmp_path / "run.jsonl").metrics)


@pytest.mark.parametrize("folder", ["lib/python3/dist-packages", "venv/lib/site-packages", "of_a_user"])
def test_errors_of_libraries_are_sentences_wherever_they_are(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("typer")
    from fusedopt.cli import sentences

    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "of_a_user"))
    file = tmp_path / folder / "a_library.py"
    file.parent.mkdir(parents=True)
    file.write_text("def read(): raise OSError('no such thing')\n")
    names: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    with pytest.raises(OSError, match="no such thing") as raised:
        names["read"]()
    raised.value.__traceback__ = raised.value.__traceback__.tb_next  # type: ignore[union-attr]  (without this file)
    assert not sentences._is_of_a_user(raised.value)
