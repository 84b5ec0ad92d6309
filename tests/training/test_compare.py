"""compare: equal budgets, paired seeds, what is kept, and what is picked."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

from loops import killed, valley

from fusedopt import training
from fusedopt.training import Metric, Recipe, compare
from fusedopt.training.loops import follow
from fusedopt.training.records import RunFile, locked

LRS = {"slow": 0.003, "low": 0.05, "good": 0.3, "high": 1.7}


def recipes(*names: str) -> dict[str, Recipe]:
    return {name: Recipe(lr=LRS[name]) for name in names or LRS}


def told(comparison: training.Comparison) -> dict[str, Any]:
    """What a comparison found, without times and memory, which are measured."""
    values = comparison.to_dict()
    del values["environment"]
    values["evaluation"] = values["evaluation"] and values["evaluation"]["scores"]
    for name, each in values["differences"].items():
        values["differences"][name] = each["loss"]
    for trial in values["trials"]:
        trial["metrics"] = {key: v for key, v in trial["metrics"].items() if key not in ("seconds", "memory_bytes")}
    return values


def test_row_43_the_best_is_picked_with_how_sure_it_is(tmp_path: Path) -> None:
    found = compare(recipes("low", "good", "slow"), valley, 60, seeds=4, folder=tmp_path)
    assert found.pick == "good"
    assert found.recipe == Recipe(lr=0.3)
    assert found.tied == ()
    assert found.confidence > 0.95
    assert found.difference("slow", "loss").low > 1
    assert all(
        row["step"] == i for i, row in enumerate(training.read_run(tmp_path / "runs" / "low-3.jsonl").records, 1)
    )
    text = str(found)
    assert "confidence of" in text
    assert "paired t intervals" in text
    assert found.evaluation.metrics[1].name == "seconds"  # time and memory beside quality


def test_differences_are_paired() -> None:
    """A seed moves the loss by 0.2, a hundred times what the recipes differ by: unpaired, nothing could be told."""

    def near(recipe: Recipe, seed: int, budget: int) -> Any:
        draw = random.Random(seed)
        level = draw.gauss(0.0, 0.2) + recipe.lr + 1e-4 * random.Random(f"{seed} {recipe.lr}").gauss(0.0, 1.0)
        yield from ((step, level) for step in range(1, budget + 1))

    found = compare({"a": Recipe(lr=0.001), "b": Recipe(lr=0.003)}, near, 5, seeds=5)
    assert (found.pick, found.tied) == ("a", ())
    interval = found.difference("b", "loss")
    assert interval.low < 0.002 < interval.high
    assert found.folder is None


def test_what_cannot_be_told_apart_is_said() -> None:
    def noise(recipe: Recipe, seed: int, budget: int) -> Any:
        draw = random.Random(f"{seed} {recipe.lr}")
        yield from ((step, draw.gauss(0.0, 1.0)) for step in range(1, budget + 1))

    found = compare(recipes(), noise, 5, seeds=3)
    assert len(found.tied) >= 2
    assert "seeds do not tell it from" in found.verdict
    assert found.confidence < 0.95
    one = compare(recipes("low", "good"), noise, 5, seeds=1)
    assert one.confidence is None
    assert "one seed, which says nothing of chance" in one.verdict


def test_all_intervals_hold_together_as_often_as_the_level_says() -> None:
    """Six recipes that are the same, 200 times: a difference is found in at most 5 % of them, within four errors."""
    wrong, names, seeds = 0, "abcdef", range(4)
    for i in range(200):
        draw = random.Random(i)
        trials = tuple(
            training.Trial(name, seed, 1, "finished", 1, {"loss": draw.gauss(0.0, 1.0)})
            for name in names
            for seed in seeds
        )
        found = training.Comparison(
            dict.fromkeys(names, Recipe()), (Metric("loss"),), ((1, tuple(names)),), tuple(seeds), 0.95, trials,
            len(trials), {}, None, 1,
        )  # fmt: skip
        wrong += any(found.difference(name, "loss").excludes_zero for name in names if name != found.pick)
    assert wrong / 200 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_halving_gives_the_budget_to_the_best(tmp_path: Path) -> None:
    found = compare(recipes(), valley, 64, seeds=2, halving=2, folder=tmp_path)
    assert [(until, len(names)) for until, names in found.rounds] == [(32, 4), (64, 2)]
    assert found.rounds[1][1] == ("good", "high")
    assert found.pick == "good"
    # Whoever left early is compared where it left.
    assert found.difference("slow", "loss").count == 2
    assert "Successive halving: 4 to step 32, 2 to step 64" in str(found)
    nine = {f"r{i}": Recipe(lr=0.01 * (i + 1)) for i in range(9)}
    three = compare(nine, valley, 90, seeds=1, halving=3)
    assert [(until, len(names)) for until, names in three.rounds] == [(30, 9), (90, 3)]


@pytest.mark.parametrize("halving", [None, 2])
@pytest.mark.parametrize("after", [1, 100, 389])
def test_killed_and_continued_is_the_same(tmp_path: Path, halving: int | None, after: int) -> None:
    whole = compare(recipes(), valley, 64, seeds=2, halving=halving, folder=tmp_path / "whole")
    killed(compare, recipes(), valley, 64, seeds=2, halving=halving, folder=tmp_path / "cut", after=after % 300)
    stopped = training.load_comparison(tmp_path / "cut")
    assert not stopped.is_finished
    assert stopped.pick is None
    assert "stopped after" in str(stopped)
    calls = []

    def counted(recipe: Recipe, seed: int, budget: int) -> Any:
        calls.append(seed)
        return valley(recipe, seed, budget)

    counted.__module__, counted.__qualname__ = valley.__module__, valley.__qualname__  # the same loop, by its name
    continued = compare(recipes(), counted, 64, seeds=2, halving=halving, folder=tmp_path / "cut")
    assert told(continued) == told(whole)
    assert continued.curves == whole.curves
    assert len(calls) == whole.total - len(stopped.trials)  # what was done is not done again


def test_a_loop_with_a_folder_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    trained = []

    def saving(recipe: Recipe, seed: int, budget: int, folder: Path) -> Any:
        begin = int((folder / "step").read_text()) if (folder / "step").exists() else 0
        for step in range(begin + 1, budget + 1):
            trained.append(step)
            (folder / "step").write_text(str(step))
            yield step, recipe.lr / step

    compare(recipes(), saving, 40, seeds=1, halving=2, folder=tmp_path)
    assert len(trained) == 4 * 20 + 2 * 20  # the second round goes on
    assert [r["step"] for r in training.read_run(tmp_path / "runs" / "slow-0.jsonl").records] == list(range(1, 41))


def test_what_fails_is_not_picked(tmp_path: Path) -> None:
    def greedy(recipe: Recipe, seed: int, budget: int) -> Any:
        if recipe.lr == LRS["good"]:
            raise MemoryError("no 24 GiB here")
        yield from valley(recipe, seed, budget)

    found = compare({**recipes("low", "good"), "wild": Recipe(lr=9.0)}, greedy, 60, seeds=2, folder=tmp_path)
    assert found.pick == "low"
    assert found.failed["good"].startswith("no 24 GiB here")
    assert "the loss is inf at step" in found.failed["wild"]
    assert "because all others failed" in found.verdict
    json.dumps(found.to_dict(), allow_nan=False)
    none = compare({"a": Recipe(lr=8.0), "b": Recipe(lr=9.0)}, valley, 60, seeds=1)
    assert none.pick is None
    assert "no pick: " in none.verdict


def test_an_error_of_the_loop_is_raised_and_what_was_done_stays(tmp_path: Path) -> None:
    def broken(recipe: Recipe, seed: int, budget: int) -> Any:
        if recipe.lr == LRS["good"]:
            raise RuntimeError("a bug")
        yield from valley(recipe, seed, budget)

    with pytest.raises(RuntimeError, match="a bug"):
        compare(recipes("low", "good"), broken, 60, seeds=1, folder=tmp_path)
    assert len(training.load_comparison(tmp_path).trials) == 1


def test_metrics_of_the_loop_are_scored() -> None:
    def classify(recipe: Recipe, seed: int, budget: int) -> Any:
        for step in range(1, budget + 1):
            yield {"step": step, "loss": recipe.lr} | ({"eval_loss": step * recipe.lr} if step % 4 == 0 else {})
        return {"accuracy": 0.5 + recipe.lr + 0.001 * seed}

    two = recipes("low", "good")
    assert compare(two, classify, 10, seeds=2).pick == "low"
    found = compare(two, classify, 10, seeds=2, metrics=[Metric("accuracy", "maximize", scale=0.01), "eval_loss"])
    assert found.pick == "good"  # 25 points of accuracy against 2 of loss
    assert found.evaluation.values["good"]["eval_loss"] == 8 * LRS["good"]  # the last one, before the last tenth
    with pytest.raises(ValueError, match="yields no 'f1', only 'seconds'"):
        compare(two, classify, 10, seeds=1, metrics=["f1"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: compare(recipes("low"), valley, 10), ValueError, "at least two"),
        (lambda p: compare([Recipe(), Recipe(seed=7)], valley, 10), ValueError, "are the same but for seed"),
        (lambda p: compare(["low"], valley, 10), ValueError, "low"),
        (lambda p: compare("lora", valley, 10), TypeError, "candidates='lora' is a single one"),
        (lambda p: compare(Recipe(), valley, 10), TypeError, "is a single one; pass several"),
        (lambda p: compare([3, Recipe()], valley, 10), TypeError, "recipe=3 is a int"),
        (lambda p: compare(recipes(), valley, 1, metrics="speed"), ValueError, "yields no 'speed'"),
        (lambda p: compare({"a/b": Recipe(), "b": Recipe(lr=1.0)}, valley, 10), ValueError, "no file's"),
        (lambda p: compare({"a": 1, "b": Recipe()}, valley, 10), TypeError, "pass a Recipe"),
        (lambda p: compare(recipes(), 7, 10), TypeError, "pass a function of"),
        (lambda p: compare(recipes(), lambda recipe: None, 10), TypeError, "function of \\(recipe, seed, budget\\)"),
        (lambda p: compare(recipes(), valley, 0), ValueError, "budget=0 is below 1"),
        (lambda p: compare(recipes(), valley, 10, seeds=[1, 1]), ValueError, "a seed twice"),
        (lambda p: compare(recipes(), valley, 10, seeds=0), ValueError, "seeds=0 is below 1"),
        (lambda p: compare(recipes(), valley, 10, halving=1), ValueError, "halving=1 is below 2"),
        (lambda p: compare(recipes(), valley, 10, level=95), ValueError, "level=95 is no confidence"),
        (lambda p: compare(recipes(), lambda r, s, b: iter([(1, 2.0)]), 10), ValueError, "ended at step 1 of 10"),
        (lambda p: compare(recipes(), lambda r, s, b: iter([(2, 2), (1, 2)]), 9), ValueError, "step 1 after step 2"),
        (lambda p: compare(recipes(), lambda r, s, b: iter([3.0]), 10), ValueError, "yielded 3.0; yield"),
        (lambda p: compare(recipes(), lambda r, s, b: 3, 10), TypeError, "train returned 3"),
        (lambda p: training.load_comparison(p), ValueError, "cannot be read"),
    ],
)  # fmt: skip
def test_errors_are_sentences(make: Any, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path)


def test_a_folder_belongs_to_one_comparison_and_one_process(tmp_path: Path) -> None:
    compare(recipes("low", "good"), valley, 10, seeds=1, folder=tmp_path)
    with pytest.raises(ValueError, match="begun with another budget"):
        compare(recipes("low", "good"), valley, 11, seeds=1, folder=tmp_path)
    with locked(tmp_path / ".lock"), pytest.raises(ValueError, match="written by another process"):
        compare(recipes("low", "good"), valley, 10, seeds=1, folder=tmp_path)


def test_a_run_file_that_was_cut_off_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert training.read_run(path).records == [{"step": 1, "loss": 2.0}]
    with RunFile(path, append=True) as file:
        file.write({"step": 2, "loss": 1.0})
    assert [record["step"] for record in training.read_run(path).records] == [1, 2]
    path.write_text('{"step": 1\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*run.jsonl is no record of a run"):
        training.read_run(path)


def test_memory_and_time_are_of_the_training(tmp_path: Path) -> None:
    def hungry(recipe: Recipe, seed: int, budget: int) -> Any:
        held = bytearray(64 * 2**20)
        for i in range(0, len(held), 4096):
            held[i] = 1
        yield from ((step, 1.0) for step in range(1, budget + 1))

    gc.collect()  # other tests' tensors, which would go meanwhile
    found = follow(hungry, Recipe(), 0, 3, tmp_path / "r.jsonl")
    if "memory_bytes" in found.metrics:  # where the system tells the peak
        assert 60 * 2**20 < found.metrics["memory_bytes"] < 90 * 2**20
        assert follow(valley, Recipe(), 0, 3, tmp_path / "r.jsonl").metrics["memory_bytes"] < 30 * 2**20


def test_memory_that_was_freed_before_is_not_the_training_s(tmp_path: Path) -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("the C library gives nothing back when it is asked to")

    def hungry(recipe: Recipe, seed: int, budget: int, gives_back: bool) -> Any:
        if gives_back:
            trim(0)
        held = [bytes([i % 256]) * 60_000 for i in range(1_000)]
        yield from ((step, float(len(held))) for step in range(1, budget + 1))

    for gives_back in (True, False):  # if it stays, it is used again
        gc.collect()
        freed = [bytes([i % 256]) * 60_000 for i in range(2_000)]
        last = bytes(60_000)  # behind them, or the C library might give them back at once
        del freed
        found = follow(functools.partial(hungry, gives_back=gives_back), Recipe(), 0, 3, tmp_path / "r.jsonl")
        if "memory_bytes" in found.metrics:
            assert 50e6 < found.metrics["memory_bytes"] < 90e6, (gives_back, len(last))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)
    for name, recipe in recipes("low", "good").items():
        recipe.save(tmp_path / f"{name}.yaml")
    line = ["compare", "low.yaml", "good.yaml", "--train", "loops:valley", "--budget", "20", "--seeds", "3", "--json"]
    result = testing.CliRunner().invoke(app, [*line, "--metric", "loss:scale=0.5"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["pick"] == "good"
    command = training.load_comparison("comparison").command.split()
    monkeypatch.chdir(tmp_path / "comparison")
    again = testing.CliRunner().invoke(app, command[1:])
    assert again.exit_code == 0, again.output
    assert told(training.load_comparison("again")) == told(training.load_comparison("."))
    for option, message in (
        ("--seeds=x", "pass how many"),
        ("--metric=loss:up=1", "has 'up=1'"),
        ("--train=no:x", "cannot be"),
    ):
        failed = testing.CliRunner().invoke(app, [*line, option, "--folder", "other"])
        assert failed.exit_code == 2
        assert message in failed.output


def test_ctrl_c_leaves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    import loops

    from fusedopt.cli.app import app

    def interrupted(recipe: Recipe, seed: int, budget: int) -> Any:
        for record in valley(recipe, seed, budget):
            if seed == 1:
                raise KeyboardInterrupt
            yield record

    monkeypatch.chdir(tmp_path)
    for name, recipe in recipes("low", "good").items():
        recipe.save(tmp_path / f"{name}.yaml")
    line = ["compare", "low.yaml", "good.yaml", "--train", "loops:valley", "--budget", "20"]
    interrupted.__module__, interrupted.__qualname__ = "loops", "valley"
    with monkeypatch.context() as patch:
        patch.setattr(loops, "valley", interrupted)
        result = testing.CliRunner().invoke(app, line)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
    assert len(training.load_comparison("comparison").trials) == 2
    assert testing.CliRunner().invoke(app, line).exit_code == 0
