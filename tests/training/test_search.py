"""search: spaces, samplers, ASHA, processes that share a study, and kills."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")
pytest.importorskip("optuna")

import optuna
from loops import killed, valley

from fusedopt import training
from fusedopt.training import Metric, Recipe, Space, search

SPACE = {"lr": {"low": 1e-3, "high": 3.0, "log": True}, "weight_decay": [0.0, 0.1], "eps": {"low": 1e-9, "high": 1e-7}}


def told(found: training.Search) -> dict[str, Any]:
    """What a search found, without times and memory, which are measured."""
    values = found.to_dict()
    del values["environment"]
    for trial in values["trials"]:
        trial["metrics"] = {key: v for key, v in trial["metrics"].items() if key not in ("seconds", "memory_bytes")}
    return values


def test_row_46_a_grid_takes_all_combinations(tmp_path: Path) -> None:
    """The brief's grid of four fields; and a small one, trained."""
    space = {
        "lr": [1e-5, 5e-5, 1e-4],
        "weight_decay": [0.0, 0.01, 0.1],
        "warmup": [0.05, 0.1, 0.2],
        "optimizer": ["adamw_torch", "adafactor", "adamw_8bit"],
    }
    grid = Space(space).grid()
    assert len(grid) == 81
    assert len({tuple(each.values()) for each in grid}) == 81
    assert grid[1] == {"lr": 1e-5, "weight_decay": 0.0, "warmup": 0.05, "optimizer": "adafactor"}
    for each in grid[:9]:
        assert Space(space).recipe(Recipe(), each).optimizer == each["optimizer"]
    small = {"lr": {"low": 0.01, "high": 1.0, "log": True, "count": 3}, "weight_decay": [0.0, 0.1]}
    found = search(small, valley, budget=20, sampler="grid", folder=tmp_path)
    assert found.is_finished
    assert [tuple(trial.values.values()) for trial in found.trials] == [
        (0.01, 0.0), (0.01, 0.1), (0.1, 0.0), (0.1, 0.1), (1.0, 0.0), (1.0, 0.1)
    ]  # fmt: skip
    assert found.recipe.lr == 1.0
    assert len(found.recipes(3)) == 3


def test_tpe_looks_where_it_was_good(tmp_path: Path) -> None:
    """Once it has seen ten trials; chance goes on as it began."""
    space = {"lr": {"low": 1e-6, "high": 10.0, "log": True}}

    def middle(sampler: str) -> float:
        found = search(space, valley, budget=5, trials=22, sampler=sampler, folder=tmp_path / sampler)
        return statistics.median(trial.value for trial in found.trials[10:])

    assert middle("tpe") < 0.5 * middle("random")


def test_asha_stops_what_is_not_among_the_best(tmp_path: Path) -> None:
    found = search(SPACE, valley, budget=90, trials=18, sampler="random", halving=3, folder=tmp_path)
    early = [trial for trial in found.trials if trial.status == "stopped early"]
    assert {trial.step for trial in early} <= {10, 30}
    assert len(early) >= 9
    assert found.best.status == "finished"
    lengths = [len(training.read_run(tmp_path / "runs" / f"{trial.number}.jsonl").records) for trial in early]
    assert lengths == [trial.step for trial in early]
    # Each was stopped because a third of those that came as far before it, or more, were better.
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/study.db")
    for trial in study.trials:
        for step, value in trial.intermediate_values.items():
            rung = [t.intermediate_values.get(step) for t in study.trials[: trial.number + 1]]
            values = sorted(each for each in rung if each is not None)
            stays = value <= values[max(1, len(values) // 3) - 1]
            assert stays == (max(trial.intermediate_values) > step or found.trials[trial.number].status == "finished")


@pytest.mark.parametrize(
    ("sampler", "halving", "after"), [("tpe", None, 401), ("tpe", 3, 150), ("random", 3, 1), ("grid", 3, 70)]
)
def test_killed_and_continued_is_the_same(tmp_path: Path, sampler: str, halving: int | None, after: int) -> None:
    space = SPACE if sampler != "grid" else {"lr": [0.01, 0.1, 0.3, 1.7, 3.0], "weight_decay": [0.0, 0.1]}
    arguments: dict[str, Any] = {"budget": 36, "trials": 14 if sampler != "grid" else None, "sampler": sampler}
    arguments["halving"] = halving
    whole = search(space, valley, folder=tmp_path / "whole", **arguments)
    killed(search, space, valley, folder=tmp_path / "cut", after=after, **arguments)
    stopped = training.load_search(tmp_path / "cut")
    assert not stopped.is_finished
    assert stopped.trials[-1].status == "running"
    continued = search(space, valley, folder=tmp_path / "cut", **arguments)
    assert told(continued) == told(whole)
    for trial in whole.trials:
        name = f"runs/{trial.number}.jsonl"
        lines = [
            [{**r, "seconds": 0} for r in training.read_run(tmp_path / way / name).records] for way in ("whole", "cut")
        ]
        assert lines[0] == lines[1]


def test_killed_between_a_decision_and_its_end_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment after ASHA stopped a trial and before that is written down."""
    arguments: dict[str, Any] = {"budget": 36, "trials": 8, "sampler": "random", "halving": 3}
    whole = search(SPACE, valley, folder=tmp_path / "whole", **arguments)

    class Gone(BaseException):
        pass

    def gone(*args: Any, state: Any = None, **kwargs: Any) -> None:
        if state is not None:
            raise Gone
        tell(*args, **kwargs)

    tell = optuna.study.Study.tell
    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "tell", gone)
        with pytest.raises(Gone):
            search(SPACE, valley, folder=tmp_path / "cut", **arguments)
    assert told(search(SPACE, valley, folder=tmp_path / "cut", **arguments)) == told(whole)


def test_processes_share_a_study(tmp_path: Path) -> None:
    def work() -> None:
        search(SPACE, valley, budget=300, trials=12, sampler="random", folder=tmp_path)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = training.load_search(tmp_path)
    assert [trial.number for trial in found.trials] == list(range(12))  # each once, and no more than asked for
    assert found.is_finished
    # What is drawn at random does not hang on who draws it.
    alone = search(SPACE, valley, budget=300, trials=12, sampler="random", folder=tmp_path / "alone")
    assert told(alone)["trials"] == told(found)["trials"]


def test_a_trial_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    """Its lock is held; after the process is gone it is free, and the trial is taken up."""

    def nested(recipe: Recipe, seed: int, budget: int) -> Any:
        if not seen:
            seen.append(recipe.lr)
            inner.append(search(SPACE, same, budget=5, trials=2, sampler="random", folder=tmp_path))
        yield from valley(recipe, seed, budget)

    def same(recipe: Recipe, seed: int, budget: int) -> Any:
        seen.append(recipe.lr)
        return valley(recipe, seed, budget)

    same.__module__, same.__qualname__ = nested.__module__, nested.__qualname__
    seen: list[float] = []
    inner: list[training.Search] = []
    found = search(SPACE, nested, budget=5, trials=2, sampler="random", folder=tmp_path)
    assert [trial.status for trial in inner[0].trials] == ["running", "finished"]
    assert "1 running, 1 finished" in inner[0].verdict
    assert len(set(seen)) == len(seen) == 2
    assert found.is_finished


def test_what_cannot_be_built_or_diverges_is_a_trial(tmp_path: Path) -> None:
    space = {"optimizer": ["adamw", "lion"], "lr": [0.3, 9.0], "betas": [[0.9, 0.99], [0.9, 0.99, 0.999]]}
    found = search(space, valley, budget=60, sampler="grid", folder=tmp_path)
    of = {(t.values["optimizer"], t.values["lr"], len(t.values["betas"])): t for t in found.trials}
    assert of["adamw", 0.3, 2].status == "finished"
    assert of["adamw", 9.0, 2].status == "diverged"
    assert found.best.values["lr"] == 0.3
    json.dumps(found.to_dict(), allow_nan=False)


def test_values_build_recipes() -> None:
    base = Recipe(schedule={"name": "cosine", "num_cycles": 1.5}, warmup=10, options={"amsgrad": True})
    space = Space(
        {
            "optimizer": ["adamw", "lion"],
            "schedule.name": ["cosine", "linear"],
            "options.state_dtype": ["8bit", "float32"],
        }
    )
    same = space.recipe(base, {"optimizer": "adamw", "schedule.name": "cosine", "options.state_dtype": "8bit"})
    assert same.schedule == base.schedule
    assert same.options == {"amsgrad": True, "state_dtype": "8bit"}
    other = space.recipe(base, {"optimizer": "lion", "schedule.name": "linear", "options.state_dtype": "8bit"})
    assert (other.schedule, other.betas) == ({"name": "linear"}, (0.9, 0.99))
    assert other.options == {"state_dtype": "8bit"}
    assert Space(space.to_dict()).to_dict() == space.to_dict()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lrr": [1.0]}, "'lrr', which is no field of a recipe"),
        ({"lr.x": [1.0]}, "lr has no keys"),
        ({"lr": []}, "has no values"),
        ({"lr": [1.0, 1.0]}, "a value twice"),
        ({"lr": {"low": 1.0}}, "has no high"),
        ({"lr": {"low": 1.0, "high": 0.1}}, "low has to be below high"),
        ({"lr": {"low": 0.0, "high": 0.1, "log": True}}, "has no logarithm"),
        ({"lr": {"low": 0.1, "high": 1.0, "log": True, "step": 0.1}}, "do not go together"),
        ({"lr": {"low": 0.1, "high": 1.0, "lag": True}}, "space.lr.lag is not known"),
        ({"lr": {"low": 0.1, "high": 1.0, "count": 1}}, "below 2"),
        ({}, "has no fields"),
        ({"lr": 0.1}, "pass a list of values"),
    ],
)
def test_a_space_is_checked(space: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Space(space)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": None}, "endless with sampler='tpe'"),
        ({"sampler": "grid", "trials": None}, "is endless for a grid"),
        ({"sampler": "cma"}, "sampler='cma' is not known"),
        ({"budget": 0}, "budget=0 is below 1"),
        ({"halving": 1}, "halving=1 is below 2"),
        ({"trials": 0}, "trials=0 is not 1 to any"),
        ({"recipe": 1}, "pass a Recipe"),
    ],
)
def test_errors_are_sentences(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        search(SPACE, valley, **{"budget": 5, "trials": 3, "folder": tmp_path / "s", **arguments})
    assert not (tmp_path / "s").exists()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)
    Recipe(lr=0.1, task="valley").save(tmp_path / "base.yaml")
    (tmp_path / "s.yaml").write_text(
        "recipe: base.yaml\ntrain: loops:valley\nbudget: 18\ntrials: 6\nhalving: 3\nsampler: random\n"
        "metric: {name: loss, unit: nats}\nspace: {lr: {low: 1e-3, high: 3, log: true}, weight_decay: [0.0, 0.1]}\n"
    )
    run = testing.CliRunner().invoke
    result = run(app, ["search", "s.yaml", "--folder", "out", "--output", "best.yaml", "--json"])
    assert result.exit_code == 0, result.output
    found = training.load_search("out")
    assert json.loads(result.output)["best"] == found.best.number
    assert Recipe.load("best.yaml") == found.recipe
    assert found.recipe.task == "valley"
    assert found.metric == Metric("loss", unit="nats")
    monkeypatch.chdir(tmp_path / "out")
    again = run(app, found.command.split()[1:])
    assert again.exit_code == 0, again.output + str(again.exception)
    assert told(training.load_search("again")) == told(found)
    assert "best: trial" in again.output
    whole = "budget: 2\ntrain: loops:valley\nspace: {lr: [1, 2]}\n"
    for text, sentence in (
        ("spaces: {}\n", "spaces is not known; did you mean 'space'?"),
        ("", "wrong.yaml holds a NoneType; a search is a mapping"),
        ("- 1\n", "wrong.yaml holds a list; a search is a mapping"),
        (whole + "recipe: 3\n", "recipe 3 is a int; name a preset or a file"),
        (whole + "metric: {nam: loss}\n", "metric.nam is not known; did you mean 'name'?"),
        (whole + "metric: {unit: s}\n", "metric.name is missing"),
        (whole.replace("loops:valley", "3"), "--train 3 is not MODULE:FUNCTION"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        result = run(app, ["search", str(tmp_path / "wrong.yaml")])
        assert result.exit_code == 2
        assert sentence in result.output
