"""The file of a run: who writes it, when it is over, and what recipe it has."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import plain, saving

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from fusedopt import training
from fusedopt.training import Recipe, run


@pytest.mark.parametrize("loop", [plain, saving])
@pytest.mark.parametrize("last", ["finished", "diverged", "out of memory", "killed"])
def test_a_file_says_when_the_training_is_over(loop: Any, last: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    during = []

    def checked(records: Any) -> Any:
        for item in records:
            yield item
            during.append(training.read_run(path).ended)
            step = item["step"] if isinstance(item, dict) else item[0]
            if step == 3 and last == "out of memory":
                raise MemoryError
            if step == 3 and last == "killed":
                raise RuntimeError
            if step == 3 and last == "diverged":
                yield {"step": 4, "loss": float("nan")}

    # Both take what the loop takes, by which `run` knows whether it keeps checkpoints.
    def without(recipe: Recipe, seed: int, budget: int) -> Any:
        return checked(plain(recipe, seed, budget))

    def keeping(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
        return checked(saving(recipe, seed, budget, folder))

    train = without if loop is plain else keeping
    if last == "killed":
        with pytest.raises(RuntimeError):
            run(Recipe(lr=1e-3), train, 4, path)
    else:
        assert run(Recipe(lr=1e-3), train, 4, path).status == last
    assert during
    assert not any(during)
    assert training.read_run(path).ended == (last != "killed")
    if last != "finished":
        return
    run(Recipe(lr=1e-3), train, 4, path)  # there is nothing left to do, or all again
    assert path.read_text().count('"ended"') == 1
    during.clear()
    run(Recipe(lr=1e-3), train, 8, path)
    assert during
    assert not any(during)
    assert training.read_run(path).ended


def test_two_trainings_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def loop(recipe: Recipe, seed: int, budget: int) -> Any:
        for step in range(1, 4):
            yield step, 1.0
            with pytest.raises(ValueError, match=r"run\.jsonl is being written by another training"):
                run(recipe, plain, 3, path)

    assert run(Recipe(lr=1e-3), loop, 3, path).status == "finished"
    assert [record["step"] for record in training.read_run(path).records] == [1, 2, 3]


def test_a_training_that_begins_while_another_has_written_nothing_leaves_its_file_alone(tmp_path: Path) -> None:
    path, ended = tmp_path / "run.jsonl", threading.Event()
    found = []

    def first(recipe: Recipe, seed: int, budget: int) -> Any:
        yield 1, 1.0
        ended.wait(60)
        yield 2, 1.0

    def second(recipe: Recipe, seed: int, budget: int) -> Any:
        other = threading.Thread(target=lambda: found.append(run(Recipe(lr=1e-3), first, 2, path)))
        other.start()
        while not (path.exists() and training.read_run(path).records):
            time.sleep(0.01)
        try:
            yield 1, 2.0
        finally:
            ended.set()
            other.join()

    with pytest.raises(ValueError, match="is being written by another training"):
        run(Recipe(lr=1e-3), second, 2, path)
    assert [outcome.status for outcome in found] == ["finished"]
    assert [record["loss"] for record in training.read_run(path).records] == [1.0, 1.0]


def test_a_report_has_the_recipe_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1.25e-3, steps=4), plain, 4, path)
    assert "lr: 0.00125" in training.report(path).markdown()
    assert "lr: 0.5" in training.report(path, Recipe(lr=0.5)).markdown()


def test_what_is_no_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(Recipe(lr=1e-3), plain, 4, path)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    for call in (
        lambda wrong: training.estimate("7B", wrong),
        lambda wrong: training.diagnose(training.read_run(path), wrong),
        lambda wrong: training.report(path, wrong),
        lambda wrong: training.range_test(wrong, plain),
        lambda wrong: run(wrong, plain, 4, tmp_path / "other.jsonl"),
        lambda wrong: training.Monitor(tmp_path / "other.jsonl", optimizer, recipe=wrong),
        lambda wrong: training.search(
            {"lr": [1, 2]}, plain, budget=2, trials=1, recipe=wrong, folder=tmp_path / "search"
        ),
    ):
        with pytest.raises(TypeError, match=r"recipe='r\.yaml' is a str; pass a Recipe"):
            call("r.yaml")
    for name, wrong in (("run", str(path)), ("error", 3), ("profile", 3)):
        with pytest.raises(TypeError, match=f"{name}=.* is a (str|int); pass"):
            training.diagnose(**{"recipe": Recipe(), name: wrong})
    assert [each.name for each in tmp_path.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    missing, taken = tmp_path / "none" / f"r.{suffix}", tmp_path / f"folder.{suffix}"
    taken.mkdir()
    for path in (missing, taken):
        with pytest.raises(OSError) as error:
            Recipe().save(path)
        assert error.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == [taken.name]
