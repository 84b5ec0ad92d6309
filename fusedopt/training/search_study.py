"""What a search asks of Optuna: a study in SQLite that processes share, and draws that a kill does not change."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checks
from .records import locked
from .search_space import Choice, Range, Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_NAME = "search"
_SECONDS_TO_WAIT = 60  # for another process that writes


def needs_optuna() -> None:
    """Raises an ImportError that says what to install, if Optuna is missing."""
    checks.installed("optuna", "search", "'fusedopt[search]'")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Optuna from telling of every trial."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def open_study(folder: Path, definition: Mapping[str, Any]) -> Study:
    """The study in a folder, made if it is not there."""
    import optuna
    from sqlalchemy import event

    path = (folder / "study.db").absolute()
    if not path.exists():  # a write-ahead log, which is not waited for; a kill loses nothing of it
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _SECONDS_TO_WAIT}}
    )
    event.listen(storage.engine, "connect", lambda made, _: made.execute("PRAGMA synchronous=NORMAL"))
    storage.engine.dispose()  # connections of before the listener
    return optuna.create_study(
        storage=storage,
        study_name=_NAME,
        pruner=_pruner(definition),
        direction=definition["metric"]["direction"],
        load_if_exists=True,
    )


def rungs(definition: Mapping[str, Any]) -> list[int]:
    """Steps at which ASHA decides: a ninth and a third of the budget, if a third goes on."""
    if definition["halving"] is None:
        return []
    steps = [definition["budget"] // definition["halving"] ** power for power in (2, 1)]
    return [step for step in dict.fromkeys(steps) if 0 < step < definition["budget"]]


def next_trial(
    folder: Path, study: Study, space: Space, definition: Mapping[str, Any], held: contextlib.ExitStack
) -> Trial | None:
    """A trial that was left behind, or a new one; None if there is none to do.

    Call it with the folder locked. A trial's own lock is held from then on, until the process ends or `held` does: a
    trial that runs, and whose lock is free, was left behind by a process that is gone.

    Args:
        folder: Of the search.
        study: In it.
        space: What varies.
        definition: Of the search.
        held: Holds the lock.
    """
    import optuna

    existing = study.get_trials(deepcopy=False)
    trial = None
    for each in existing:
        if each.state.is_finished():
            continue
        with contextlib.ExitStack() as lock:
            is_free = lock.enter_context(locked(folder / "locks" / str(each.number)))
            # Read again, because it may have ended, and been let go, since it was listed.
            if is_free and not study.get_trials(deepcopy=False)[each.number].state.is_finished():
                held.push(lock.pop_all())
                trial = optuna.trial.Trial(study, each._trial_id)
                break
    if trial is None:
        if len(existing) >= definition["trials"]:
            return None
        trial = study.ask()
        held.enter_context(locked(folder / "locks" / str(trial.number)))
    grid = space.grid() if definition["sampler"] == "grid" else []
    for name, dimension in space.dimensions.items():
        # A sampler of its own for each value, so that what is drawn hangs on nothing that was drawn in this process.
        digest = hashlib.sha256(f"{definition['seed']} {trial.number} {name}".encode()).digest()
        if grid:
            dimension, value = Choice(tuple(dimension.points())), grid[trial.number][name]
            study.sampler = _given(next(label for label, each in dimension.labels.items() if each == value))
        else:
            study.sampler = _sampler(definition["sampler"], int.from_bytes(digest[:4], "little"))
        _suggest(trial, name, dimension)
    return trial


def value_of(space: Space, name: str, stored: Any) -> Any:
    """A value of a trial as a recipe has it."""
    dimension = space.dimensions[name]
    labels = dimension.labels if isinstance(dimension, Choice) else {}
    return labels.get(stored, stored)


def _suggest(trial: Trial, name: str, dimension: Choice | Range) -> None:
    if isinstance(dimension, Choice):
        trial.suggest_categorical(name, list(dimension.labels))
    elif dimension.is_whole:
        step = int(dimension.step or 1)
        trial.suggest_int(name, int(dimension.low), int(dimension.high), step=step, log=dimension.log)
    else:
        trial.suggest_float(name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _sampler(name: str, seed: int) -> BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def _given(label: Any) -> BaseSampler:
    """A sampler that draws what it is told, as a grid does."""
    import optuna

    class Given(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
            return label

    return Given()


def _pruner(definition: Mapping[str, Any]) -> BasePruner:
    """ASHA, decided by the values of a rung alone.

    Optuna's own pruner writes down that a rung is done before its answer is acted upon, so that a trial which is killed
    in between would go on after all.
    """
    import optuna

    class Halving(optuna.pruners.BasePruner):
        def prune(self, study: Study, trial: FrozenTrial) -> bool:
            step = trial.last_step
            if step is None:
                return False
            trials = study.get_trials(deepcopy=False)
            values = [each.intermediate_values[step] for each in trials if step in each.intermediate_values]
            values.sort(reverse=study.direction == optuna.study.StudyDirection.MAXIMIZE)
            last = values[max(1, len(values) // definition["halving"]) - 1]
            mine = trial.intermediate_values[step]
            return mine < last if study.direction == optuna.study.StudyDirection.MAXIMIZE else mine > last

    return optuna.pruners.NopPruner() if definition["halving"] is None else Halving()
