"""`search`: the best of a space of recipes, by grid, chance or TPE, with ASHA, through Optuna."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from . import files
from .evaluate import Evaluator, Metric
from .loops import Loop, Outcome, Progress, Watch, check_loop, follow, loop_name
from .recipe import Recipe, a_recipe
from .records import check_same, environment, locked, read_json, write_json
from .search_result import Search, SearchTrial
from .search_space import Space
from .search_study import needs_optuna, next_trial, open_study, quiet, rungs, value_of

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

VERSION = 1
SAMPLERS = ("tpe", "random", "grid")
_DEFINITION = "search.json"


def search(
    space: Space | Mapping[str, Any],
    train: Loop,
    *,
    budget: int,
    recipe: Recipe | None = None,
    trials: int | None = None,
    sampler: str = "tpe",
    halving: int | None = None,
    metric: Metric | str = "loss",
    seed: int = 0,
    folder: str | Path = "search",
    watch: Watch | None = None,
) -> Search:
    """Trains recipes of a space, and finds the best.

    Trials are kept in the folder, in Optuna's SQLite storage `study.db`: any number of processes may call this with
    the same folder at once, and share the trials. After a kill, the same call goes on. A trial that nobody works on any
    more keeps its number and values and is trained again, and what trial n draws hangs on `seed`, on n and on the
    trials before it, so that one process that is killed and continued finds the same as one that was never stopped.

    The best of many is better than it will be again: a search takes one seed, and picks what was lucky, too. `compare`
    the best few with several seeds.

    Args:
        space: Fields of a recipe and what they may be, as in `Space`.
        train: Called with (recipe, seed, budget), as `compare` calls it.
        budget: Steps of a training.
        recipe: What all else is from; the defaults if not given.
        trials: How many trainings in all; all combinations for a grid.
        sampler: "tpe" (Optuna's Tree-structured Parzen Estimator), "random" or "grid".
        halving: ASHA (arXiv:1810.05934): of those that reach a ninth and a third of the budget (with 3), only the best
            third goes on. None trains all to the end.
        metric: What is best; a name alone is minimized.
        seed: Of what is drawn, and of all trainings.
        folder: Where trials and run files are.
        watch: Called with `Progress` after each step.

    Returns:
        All trials and the best recipes.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: Something is out of range, or the folder holds another search.
        TypeError: Something is of the wrong type.
    """
    check_loop(train)
    space = space if isinstance(space, Space) else Space(space)
    base = Recipe() if recipe is None else a_recipe(recipe)
    checks.one_of("sampler", sampler, SAMPLERS)
    if checks.whole("budget", budget) < 1:
        raise ValueError(f"budget={budget!r} is below 1; pass an int >= 1")
    if halving is not None and checks.whole("halving", halving) < 2:
        raise ValueError(f"halving={halving!r} is below 2; pass an int >= 2, or None to train all to the end")
    grid = space.grid() if sampler == "grid" else None
    if trials is None and grid is None:
        raise ValueError(f"trials=None is endless with sampler={sampler!r}; pass how many to train")
    total = len(grid or ()) if trials is None else checks.whole("trials", trials)
    if total < 1 or (grid is not None and total > len(grid)):
        raise ValueError(f"trials={total!r} is not 1 to {len(grid) if grid else 'any'}; a grid has no more")
    measure = Evaluator([metric]).metrics[0]
    folder = Path(folder)
    needs_optuna()
    definition = {
        "version": VERSION,
        "recipe": base.to_dict(),
        "train": loop_name(train),
        "budget": budget,
        "trials": total,
        "sampler": sampler,
        "halving": halving,
        "metric": measure.to_dict(),
        "seed": checks.uint32("seed", seed),
        "space": files.plain(space.to_dict()),
    }
    with locked(folder / ".lock", wait=True):
        if (folder / _DEFINITION).exists():
            check_same(folder, read_json(folder / _DEFINITION), definition)
        else:
            files.write(_file(definition), folder / "search.yaml")
            write_json(folder / _DEFINITION, {**definition, "environment": environment()})
        with quiet():
            study = open_study(folder, definition)
    with quiet():
        _train_all(folder, study, space, base, train, definition, measure, watch)
    return load_search(folder)


def load_search(folder: str | Path) -> Search:
    """Reads what `search` left in a folder, finished or not.

    Args:
        folder: The folder.

    Returns:
        The search.

    Raises:
        ValueError: There is none.
    """
    needs_optuna()
    folder = Path(folder)
    definition = read_json(folder / _DEFINITION)
    with quiet():
        frozen = open_study(folder, definition).get_trials(deepcopy=False)
    space = Space(definition["space"])
    trials = []
    for each in frozen:
        values = {name: value_of(space, name, each.params[name]) for name in space if name in each.params}
        attributes = dict(each.user_attrs)
        finished = each.state.is_finished()
        trials.append(
            SearchTrial(
                each.number,
                values,
                attributes.get("status", "running") if finished else "running",
                each.value if finished and each.value is not None else None,
                attributes.get("step", 0),
                attributes.get("metrics", {}),
                attributes.get("reason", ""),
            )
        )
    return Search(
        Recipe.from_dict(definition["recipe"]), space, Metric(**definition["metric"]), tuple(trials),
        definition["trials"], definition["budget"], definition["seed"], definition["sampler"], definition["halving"],
        definition["environment"], definition["train"], folder,
    )  # fmt: skip


def read_search(path: str | Path) -> dict[str, Any]:
    """The arguments of `search` in a file, but for the loop, which is named in "train".

    Args:
        path: Ends with .yaml, .yml, .toml or .json. "recipe" is a mapping, a recipe's file beside it, or a preset.

    Returns:
        Keyword arguments, with "train" as MODULE:FUNCTION.

    Raises:
        ValueError: It cannot be read, is no mapping, or has an unknown key.
    """
    from .compare import named_recipe

    path = Path(path)
    read = files.read(path)
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} holds a {type(read).__name__}; a search is a mapping of fields: write key: value")
    values = dict(read)
    known = ("version", "recipe", "train", "budget", "trials", "sampler", "halving", "metric", "seed", "space")
    for key in values:
        if key not in known:
            raise ValueError(
                f"{path}: {key} is not known{checks.closest(str(key), known)}; there are {', '.join(known)}"
            )
    if values.pop("version", VERSION) != VERSION:
        raise ValueError(f"{path}: version is not {VERSION}, which this fusedopt reads")
    for key in ("train", "budget", "space"):
        if values.get(key) is None:
            raise ValueError(f"{path}: {key} is missing; a search has train, budget and space")
    recipe = values.pop("recipe", None)
    if isinstance(recipe, Mapping):
        values["recipe"] = Recipe.from_dict({"version": 1, **recipe})
    elif recipe is not None and not isinstance(recipe, str):
        raise ValueError(
            f"{path}: recipe {recipe!r} is a {type(recipe).__name__}; name a preset or a file, or write its fields"
        )
    elif recipe is not None:
        beside = path.parent / recipe
        values["recipe"] = named_recipe(beside if beside.exists() else recipe)[1]
    if isinstance(values.get("metric"), Mapping):
        values["metric"] = _metric(path, values["metric"])
    return {key: value for key, value in values.items() if value is not None}


def _metric(path: Path, given: Mapping[str, Any]) -> Metric:
    known = [field.name for field in dataclasses.fields(Metric)]
    for key in given:
        if key not in known:
            raise ValueError(
                f"{path}: metric.{key} is not known{checks.closest(str(key), known)}; there are {', '.join(known)}"
            )
    if "name" not in given:
        raise ValueError(f"{path}: metric.name is missing; it is what the loop calls what is best")
    return Metric(**given)


def _file(definition: Mapping[str, Any]) -> dict[str, Any]:
    values = {**definition, "metric": {k: v for k, v in definition["metric"].items() if v not in ("", False)}}
    return {key: value for key, value in values.items() if value is not None}


def _train_all(
    folder: Path,
    study: Study,
    space: Space,
    base: Recipe,
    train: Loop,
    definition: Mapping[str, Any],
    metric: Metric,
    watch: Watch | None,
) -> None:
    from optuna.trial import TrialState

    total = definition["trials"] * definition["budget"]
    while True:
        with contextlib.ExitStack() as held:
            with locked(folder / ".lock", wait=True):
                trial = next_trial(folder, study, space, definition, held)
            if trial is None:
                return
            finished = sum(each.state.is_finished() for each in study.get_trials(deepcopy=False))
            values = {name: value_of(space, name, trial.params[name]) for name in space}

            def tell(record: dict[str, Any], done: int = finished, label: str = f"trial {trial.number}") -> None:
                if watch is not None:
                    watch(Progress(done * definition["budget"] + record["step"], total, label, record.get("loss")))

            try:
                recipe = space.recipe(base, values)
            except (ValueError, TypeError) as error:
                found = Outcome("no recipe", 0, {}, str(error))
            else:
                found = follow(
                    train, recipe, definition["seed"], definition["budget"], folder / "runs" / f"{trial.number}.jsonl",
                    scored=[metric], on_record=tell, stops_at=_stopping(trial, metric, definition),
                )  # fmt: skip
            finite = {key: value for key, value in found.metrics.items() if math.isfinite(value)}
            told = {"status": found.status, "step": found.step, "metrics": finite, "reason": found.reason}
            for key, value in told.items():
                trial.set_user_attr(key, value)
            if found.status == "stopped early":
                study.tell(trial, state=TrialState.PRUNED)
            elif found.status in ("finished", "diverged"):
                study.tell(trial, found.metrics[metric.name])
            else:
                study.tell(trial, state=TrialState.FAIL)


def _stopping(trial: Trial, metric: Metric, definition: Mapping[str, Any]) -> Any:
    """What `follow` asks after each step, or None without ASHA."""
    left = rungs(definition)
    if not left:
        return None
    reported = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values  # before a kill

    def stops(step: int, value: Callable[[str], float]) -> bool:
        if not left or step < left[0]:
            return False
        rung = left.pop(0)
        if rung not in reported:
            found = value(metric.name)
            trial.report(metric.worst if math.isnan(found) else found, rung)
        return trial.should_prune()

    return stops
