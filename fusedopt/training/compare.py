"""`compare`: candidates trained with equal budgets and the same seeds, and what their differences say."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checks
from .comparison import Comparison, Trial, evaluated, read_trial, with_measured
from .evaluate import Metric
from .loops import Loop, Progress, Watch, check_loop, follow, loop_name
from .monitor_runs import read_run
from .presets import find_preset
from .recipe import Recipe
from .records import check_same, environment, locked, read_json, write_json

VERSION = 1
_DEFINITION = "comparison.json"
Candidates = Mapping[str, Recipe] | Iterable[Recipe | str | Path]


def compare(
    candidates: Candidates,
    train: Loop,
    budget: int,
    *,
    seeds: int | Sequence[int] = 3,
    metrics: Sequence[Metric | str] | Metric | str = ("loss",),
    halving: int | None = None,
    level: float = 0.95,
    folder: str | Path | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Trains candidates with the same budget and the same seeds, and picks the best.

    Differences are taken between trainings of one seed, which see the same data, so that what the seed does to both
    cancels. Everything that was trained is written at once and kept: after a kill, the same call goes on, and finds
    the same as one that was never stopped, if the loop does the same for the same seed. Only the training that was
    under way begins anew, or at its checkpoint if the loop takes a `folder`.

    Args:
        candidates: Recipes by name; or recipes, files and names of presets.
        train: Called with (recipe, seed, budget); yields (step, loss), or mappings with more, up to step `budget`.
        budget: Steps of a whole training, in whatever unit the loop counts, steps or tokens.
        seeds: How many, or which. Two tell something of chance, five tell much more.
        metrics: What is best, as `Evaluator` judges it; names alone are minimized. A metric is what the loop returns
            at the end, or else the mean over the last tenth of the steps. "seconds" and "memory_bytes" are measured
            beside it.
        halving: Successive halving (arXiv:1502.07943): in each round all are trained to a step, and one in `halving` of
            them goes on to one that is as many times later, with at least two in the last round. None trains all of
            them to the end.
        level: The confidence that all intervals together have.
        folder: Where results and run files are kept; nothing is kept by default.
        watch: Called with `Progress` after each step.

    Returns:
        The pick, how sure it is, and everything that was measured.

    Raises:
        ValueError: Candidates are equal or fewer than two, or the folder holds something else.
        TypeError: Something is of the wrong type.
    """
    check_loop(train)
    recipes = named(candidates)
    budget = _at_least("budget", budget, 1)
    chosen = tuple(range(_at_least("seeds", seeds, 1))) if isinstance(seeds, int) else _seeds(seeds)
    if not 0 < checks.number("level", level) < 1:
        raise ValueError(f"level={level!r} is no confidence; pass a number between 0 and 1, such as 0.95")
    if halving is not None:
        _at_least("halving", halving, 2)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            found = compare(
                recipes, train, budget, seeds=chosen, metrics=metrics, halving=halving, level=level,
                folder=temporary, watch=watch,
            )  # fmt: skip
        return dataclasses.replace(found, folder=None)
    folder = Path(folder)
    definition = {
        "version": VERSION,
        "candidates": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "train": loop_name(train),
        "budget": budget,
        "seeds": list(chosen),
        "metrics": [metric.to_dict() for metric in with_measured(metrics)],
        "halving": halving,
        "level": level,
    }
    with locked(folder / ".lock") as is_mine:
        if not is_mine:
            raise ValueError(f"folder={str(folder)!r} is being written by another process; wait, or pass another one")
        path = folder / _DEFINITION
        if path.exists():
            check_same(folder, read_json(path), definition)
        else:
            for name, recipe in recipes.items():
                (folder / "recipes").mkdir(exist_ok=True)
                recipe.save(folder / "recipes" / f"{name}.yaml")
            write_json(path, {**definition, "environment": environment()})
        _train_all(folder, train, recipes, with_measured(metrics), definition, watch)
    return load_comparison(folder)


def load_comparison(folder: str | Path) -> Comparison:
    """Reads what `compare` left in a folder, finished or not.

    Args:
        folder: The folder.

    Returns:
        The comparison.

    Raises:
        ValueError: There is none.
    """
    folder = Path(folder)
    values = read_json(folder / _DEFINITION)
    recipes = {name: Recipe.from_dict(each) for name, each in values["candidates"].items()}
    metrics = tuple(Metric(**each) for each in values["metrics"])
    lengths = _round_lengths(len(recipes), values["budget"], values["halving"])
    trials = {}
    for path in sorted((folder / "trials").glob("*.json")):
        trial = read_trial(path, metrics)
        trials[trial.candidate, trial.seed, trial.until] = trial
    rounds: list[tuple[int, tuple[str, ...]]] = []
    names: tuple[str, ...] = tuple(recipes)
    total, ordered = 0, []
    for until, count in lengths:
        if rounds and names:
            names = _survivors(metrics, trials, names, rounds[-1][0], values["seeds"], count)
        rounds.append((until, names))
        total += count * len(values["seeds"])
        ordered += [trials[key] for s in values["seeds"] for n in names if (key := (n, s, until)) in trials]
    curves = {}
    for path in sorted((folder / "runs").glob("*.jsonl")):
        name, _, seed = path.stem.rpartition("-")
        records = [record for record in read_run(path).records if record.get("loss") is not None]
        curves[name, int(seed)] = [(record["step"], float(record["loss"])) for record in records]
    return Comparison(
        recipes, metrics, tuple(rounds), tuple(values["seeds"]), values["level"], tuple(ordered), total,
        values["environment"], values["train"], values["budget"], _command(values), folder, curves,
    )  # fmt: skip


def named(candidates: Candidates) -> dict[str, Recipe]:
    """Candidates by name. Raises a ValueError or TypeError."""
    recipes: dict[str, Recipe] = {}
    if isinstance(candidates, (str, Path, Recipe)):
        raise TypeError(f"candidates={candidates!r} is a single one; pass several, in a list or by name")
    if isinstance(candidates, Mapping):
        recipes = dict(candidates)
    else:
        for each in candidates:
            name, recipe = named_recipe(each)
            if name in recipes:
                name = next(f"{name}-{i}" for i in range(2, 10**6) if f"{name}-{i}" not in recipes)
            recipes[name] = recipe
    for name, recipe in recipes.items():
        if not isinstance(recipe, Recipe):
            raise TypeError(f"candidates[{name!r}]={recipe!r} is a {type(recipe).__name__}; pass a Recipe")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"candidates has the name {name!r}, which is no file's; use letters, digits and .+-_")
    if len(recipes) < 2:
        raise ValueError(f"candidates has {len(recipes)} recipes; pass at least two to compare")
    same: dict[str, str] = {}
    for name, recipe in recipes.items():
        other = same.setdefault(recipe.replaced(seed=0).fingerprint, name)
        if other != name:
            raise ValueError(f"candidates {other!r} and {name!r} are the same but for seed and labels; leave one out")
    return recipes


def named_recipe(each: Recipe | str | Path) -> tuple[str, Recipe]:
    """A recipe, a file of one or a preset's name: what it is called, and the recipe."""
    if isinstance(each, Recipe):
        return each.optimizer, each
    if not isinstance(each, (str, Path)):
        raise TypeError(f"recipe={each!r} is a {type(each).__name__}; pass a Recipe, its file or a preset's name")
    path = Path(each)
    if path.suffix in (".yaml", ".yml", ".toml", ".json"):
        return path.stem, Recipe.load(path)
    return str(each), find_preset(str(each)).recipe


def _train_all(
    folder: Path,
    train: Loop,
    recipes: Mapping[str, Recipe],
    metrics: Sequence[Metric],
    definition: Mapping[str, Any],
    watch: Watch | None,
) -> None:
    budget, seeds = definition["budget"], definition["seeds"]
    lengths = _round_lengths(len(recipes), budget, definition["halving"])
    total = sum(until * count * len(seeds) for until, count in lengths)
    scored = [metric for metric in metrics if metric.weight]
    trials: dict[tuple[str, int, int], Trial] = {}
    names, done, before = tuple(recipes), 0, 0
    for until, count in lengths:
        if before:
            names = _survivors(metrics, trials, names, before, seeds, count)
        for seed in seeds:  # seeds outside, so that a machine that slows down slows all candidates
            for name in names:
                path = folder / "trials" / f"{name}-{seed}-{until}.json"
                if not path.exists():

                    def tell(record: dict[str, Any], done: int = done, label: str = f"{name}, seed {seed}") -> None:
                        if watch is not None:
                            watch(Progress(done + record["step"], total, label, record.get("loss")))

                    run = folder / "runs" / f"{name}-{seed}.jsonl"
                    found = follow(
                        train, recipes[name], seed, budget, run, until=until, scored=scored, on_record=tell
                    )  # fmt: skip
                    kept = {key: value for key, value in found.metrics.items() if math.isfinite(value)}
                    trial = {"candidate": name, "seed": seed, "until": until, "status": found.status}
                    write_json(path, {**trial, "step": found.step, "metrics": kept, "reason": found.reason})
                trials[name, seed, until] = read_trial(path, metrics)
                done += until
        before = until


def _survivors(
    metrics: Sequence[Metric],
    trials: Mapping[tuple[str, int, int], Trial],
    names: Sequence[str],
    until: int,
    seeds: Sequence[int],
    count: int,
) -> tuple[str, ...]:
    """The best of a round, in the order of the candidates; none while the round is not over."""
    if any((name, seed, until) not in trials for name in names for seed in seeds):
        return ()
    of = {name: {seed: trials[name, seed, until] for seed in seeds} for name in names}
    best = evaluated([m for m in metrics if m.weight], of, names).order[:count]
    return tuple(name for name in names if name in best)


def _round_lengths(candidates: int, budget: int, halving: int | None) -> list[tuple[int, int]]:
    """For each round the step that it trains to, and how many take part."""
    if halving is None:
        return [(budget, candidates)]
    counts = [candidates]
    while (following := math.ceil(counts[-1] / halving)) >= 2 and following < counts[-1]:
        counts.append(following)
    lengths = [max(1, budget // halving ** (len(counts) - 1 - i)) for i in range(len(counts))]
    return [(until, count) for i, (until, count) in enumerate(zip(lengths, counts)) if until not in lengths[i + 1 :]]


def _command(values: Mapping[str, Any]) -> str | None:
    """The command line that does the same again, from inside of the folder; None if the loop has no name."""
    if values["train"] is None:
        return None
    words = ["fusedopt", "compare", *(f"recipes/{name}.yaml" for name in values["candidates"])]
    words += ["--train", values["train"], "--budget", str(values["budget"])]
    words += ["--seeds", ",".join(map(str, values["seeds"]))]
    for metric in values["metrics"]:
        if metric["weight"]:
            words += ["--metric", _spelled(metric)]
    if values["halving"] is not None:
        words += ["--halving", str(values["halving"])]
    if values["level"] != 0.95:
        words += ["--level", str(values["level"])]
    return shlex.join([*words, "--folder", "again"])


def _spelled(metric: Mapping[str, Any]) -> str:
    """A metric as the command line reads it: NAME[:KEY=VALUE,...]."""
    defaults = {**Metric("x", log=metric["log"]).to_dict(), "log": False}
    given = {key: value for key, value in metric.items() if key != "name" and value != defaults[key]}
    words = [f"{key}={'true' if value is True else value}" for key, value in given.items()]
    return metric["name"] + (":" + ",".join(words) if words else "")


def _at_least(name: str, value: Any, least: int) -> int:
    if checks.whole(name, value) < least:
        raise ValueError(f"{name}={value!r} is below {least}; pass an int >= {least}")
    return int(value)


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    found = tuple(checks.uint32(f"seeds[{i}]", seed) for i, seed in enumerate(seeds))
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds={seeds!r} is empty, or has a seed twice; pass different ones")
    return found
