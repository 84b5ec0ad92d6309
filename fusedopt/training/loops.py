"""Loops that train: what is asked of a user's, and what is measured while one runs."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks
from .evaluate import Metric
from .peak_memory import PeakMemory
from .recipe import Recipe, a_recipe
from .records import RunFile, check_run, run_header

# Called with (recipe, seed, budget), and with folder=... if it takes that: see `follow`.
Loop = Callable[..., Any]
SECONDS = Metric("seconds", weight=0.0, log=True, unit="s")
MEMORY = Metric("memory_bytes", weight=0.0, log=True, unit="B")
MEASURED = (SECONDS, MEMORY)  # what is measured here, whatever the loop says
_WORTH_COLLECTING = 2.0  # seconds; to collect takes some tenths
_TAIL = 0.1  # of the steps; a metric is the mean over its records there


@dataclass(frozen=True)
class Progress:
    """How far something long is.

    Attributes:
        done: Steps that are done, over all trainings.
        total: Steps in all.
        label: What is being trained.
        loss: Of the last step.
    """

    done: int
    total: int
    label: str
    loss: float | None


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """What came of one training.

    Attributes:
        status: "finished", "diverged" (a loss that is not finite), "out of memory", or "stopped early" by who asked.
        step: The last step.
        metrics: By name; of what is scored infinite, on the bad side, if it did not finish.
        reason: Why it did not finish.
    """

    status: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def loop_name(train: Loop) -> str | None:
    """MODULE:FUNCTION, from which a command line can import it; None if there is no such name."""
    module, name = getattr(train, "__module__", None), getattr(train, "__qualname__", None)
    return f"{module}:{name}" if module and name and name.isidentifier() and module != "__main__" else None


def check_loop(train: Any) -> None:
    """Raises a TypeError for what cannot be called with a recipe, a seed and a budget."""
    if not callable(train):
        raise TypeError(f"train={train!r} is a {type(train).__name__}; pass a function of (recipe, seed, budget)")
    with contextlib.suppress(ValueError):  # a builtin without a signature
        signature = inspect.signature(train)
        try:
            signature.bind(None, 0, 1, **({"folder": None} if takes_folder(train) else {}))
        except TypeError as error:
            raise TypeError(
                f"train={getattr(train, '__name__', train)} takes {signature}, which does not fit ({error}); "
                "make it a function of (recipe, seed, budget)"
            ) from None


def takes_folder(train: Loop) -> bool:
    """Whether a loop keeps checkpoints of its own."""
    try:
        return "folder" in inspect.signature(train).parameters
    except ValueError:
        return False


def checkpoints(train: Loop, path: Path) -> Path | None:
    """The folder beside a run file where a loop keeps checkpoints; None if it keeps none."""
    return path.with_suffix("") if takes_folder(train) else None


def follow(
    train: Loop,
    recipe: Recipe,
    seed: int,
    budget: int,
    path: Path,
    *,
    until: int | None = None,
    header: Mapping[str, Any] | None = None,
    scored: Sequence[Metric] = (Metric("loss"),),
    on_record: Callable[[dict[str, Any]], None] | None = None,
    stops_at: Callable[[int, Callable[[str], float]], bool] | None = None,
) -> Outcome:
    """Runs a loop, writes its run file and measures it.

    The loop is called with (recipe, seed, budget), everything random seeded before, and yields for its steps, counted
    from 1 to `budget`, (step, loss) or a mapping with "step", "loss" and whatever else it measures, such as "lr",
    "grad_norm" or "eval_loss"; what is no number, such as a text, is only written. What it returns at the end, a
    mapping of numbers, wins over means of what it yielded. It may be closed early. If it takes `folder`, it gets one of
    its own, where it may keep a checkpoint, and go on from it when it is called again: the first step that it yields
    then says where it goes on.

    Args:
        train: The loop.
        recipe: What it trains with.
        seed: Of this training.
        budget: Steps of the whole training, by which a schedule is laid out.
        path: The run file; a folder for checkpoints lies beside it.
        until: The step to stop at; the budget by default.
        header: The first line of the run file; none by default.
        scored: The metrics that must be there at the end.
        on_record: Called with each record.
        stops_at: Called with each step and a function from a metric's name to its value so far; ends the training by
            returning True.

    Returns:
        What came of it. A training that diverges or has no memory is a result; any other error is raised.

    Raises:
        ValueError: The loop yields what cannot be read, ends early, or lacks a metric that is scored.
    """
    until = budget if until is None else until
    extra: dict[str, Any] = {}
    if (folder := checkpoints(train, path)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        extra["folder"] = folder
    meter, records = PeakMemory(), _Records(until)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    status, reason = "finished", ""
    iterator: Iterator[Any] = iter(())
    with RunFile(path, append=bool(extra), header=header) as file:
        begun = time.perf_counter()
        own = 0.0  # seconds that are not the loop's
        first, first_at = 0, begun
        try:
            iterator = _iterator(train(recipe.replaced(seed=seed), seed, budget, **extra), budget)
            for number in itertools.count():
                try:
                    item = next(iterator)
                except StopIteration as stop:
                    if number == 0 and extra:  # its checkpoint is of the last step: all was trained before
                        records.go_on(file.begin(budget + 1))
                    if not records.diverged:
                        records.end(stop.value)
                    break
                now = time.perf_counter()
                record = read_record(item, records.last)
                if record["step"] > budget:  # an endless loop, asked for what it returns
                    if number == 0 and extra:
                        records.go_on(file.begin(budget + 1))
                    break
                if number == 0:
                    records.go_on(file.begin(record["step"]))
                    first, first_at = record["step"], now
                    if records.diverged:  # as before: its checkpoint is of the step in which it did
                        break
                seconds = records.before + now - begun - own
                record.setdefault("seconds", seconds)
                file.write(record)
                records.add(record)
                if on_record is not None:
                    on_record(record)
                stops = stops_at is not None and stops_at(record["step"], records.value)
                own += time.perf_counter() - now
                if records.diverged:
                    break
                if stops:
                    status, reason = "stopped early", f"it was not among the best at step {record['step']}"
                if stops or budget > until <= record["step"]:
                    break
            if records.diverged:
                status, reason = "diverged", records.diverged
        except (MemoryError, torch.OutOfMemoryError) as error:
            status, reason = "out of memory", str(error).partition("\n")[0] or type(error).__name__
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
    if status == "finished":
        records.check_end()
    took = time.perf_counter() - begun - own
    last = records.last or 0
    if last > first:  # as if the first step, which imports and compiles, took as long as the others
        per_step = (begun + took - first_at) / (last - first)
        took = per_step * (last - records.begin)
    metrics = {"seconds": records.before + took}
    if (peak := meter.bytes()) is not None:
        metrics["memory_bytes"] = peak
    if time.perf_counter() - begun > _WORTH_COLLECTING:  # a model in cycles of references is not the next one's memory
        del iterator
        gc.collect()
    for name in records.names:
        metrics[name] = records.value(name)
    for metric in scored:
        if status not in ("finished", "stopped early"):
            metrics[metric.name] = metric.worst
        elif metric.name not in metrics:
            there = ", ".join(map(repr, metrics))
            raise ValueError(f"the loop yields no {metric.name!r}, only {there}; yield it, or score something else")
    return Outcome(status, records.last or 0, metrics, reason)


def run(
    recipe: Recipe,
    train: Loop,
    budget: int,
    path: str | Path = "run.jsonl",
    *,
    seed: int | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Trains once, and writes a run file.

    A loop that takes `folder` goes on from its checkpoint; any other begins anew, and its file with it.

    Args:
        recipe: What is trained.
        train: Called with (recipe, seed, budget); yields (step, loss), or mappings with more, up to step `budget`.
        budget: Steps.
        path: The run file: JSON lines, a header with the recipe and then an object for each step.
        seed: The recipe's by default.
        watch: Called with `Progress` after each step.

    Returns:
        What came of it: its status, and all metrics.

    Raises:
        ValueError: The loop yields what cannot be read, or ends early, or the file is there and not of a `run` with
            this recipe and seed, or another `run` writes it at this time, or the checkpoint that it would go on from
            may be beyond the budget.
        TypeError: Something is of the wrong type.
    """
    check_loop(train)
    a_recipe(recipe)
    if checks.whole("budget", budget) < 1:
        raise ValueError(f"budget={budget!r} is below 1; pass an int >= 1")

    def tell(record: dict[str, Any]) -> None:
        if watch is not None:
            watch(Progress(record["step"], budget, "training", record.get("loss")))

    chosen = recipe.seed if seed is None else checks.uint32("seed", seed)
    recipe, path = recipe.replaced(seed=chosen), Path(path)
    name = loop_name(train)
    check_run(path, checkpoints(train, path), recipe, name, budget)
    return follow(
        train, recipe, chosen, budget, path, header=run_header(recipe, name), scored=(), on_record=tell
    )  # fmt: skip


def _iterator(made: Any, budget: int) -> Iterator[Any]:
    if isinstance(made, Mapping):  # a function that trains to the end, and returns what came of it
        return iter([{"step": budget, **made}])
    if not isinstance(made, Iterable):
        raise TypeError(
            f"train returned {made!r}, a {type(made).__name__}; yield (step, loss), or return a mapping of metrics"
        )
    return iter(made)


def read_record(item: Any, last: int | None) -> dict[str, Any]:
    """What a loop yielded, as a record. Raises a ValueError."""
    if isinstance(item, Mapping):
        record = {str(key): _number(value) for key, value in item.items()}
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        record = {"step": item[0], "loss": _number(item[1])}
    else:
        raise ValueError(f"the loop yielded {item!r}; yield (step, loss), or a mapping with 'step' and 'loss'")
    loss = record.get("loss", 0.0)
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise ValueError(f"the loop yielded {item!r}, whose loss is no number; leave it out where there is none")
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, (int, float)) or step != int(step) or step < 0:
        raise ValueError(f"the loop yielded {item!r}, whose step is no whole number; count steps from 1")
    if last is not None and step <= last:
        raise ValueError(f"the loop yielded step {step} after step {last}; count upwards")
    record["step"] = int(step)
    return record


def _number(value: Any) -> Any:
    return checks.plain(value.item() if hasattr(value, "item") else value)


def _measured(value: Any) -> float | None:
    """A number as `float` takes it, True as 1; None for texts and everything else."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # a tensor of many is a RuntimeError
        return None if isinstance(value, (str, bytes, bytearray)) else float(value)
    return None


class _Records:
    """What a loop yielded, as far as metrics need it."""

    def __init__(self, until: int) -> None:
        self.until, self._gap = until, 1
        self.last: int | None = None
        self.diverged = ""  # why, if it did
        self.begin, self.before = 0, 0.0  # step and seconds of what was trained before this call
        self._series: dict[str, list[tuple[int, float]]] = {}
        self._final: dict[str, float] = {}

    def go_on(self, kept: Iterable[Mapping[str, Any]]) -> None:
        for record in kept:
            self.add(record)
            self.begin, self.before = record["step"], float(record.get("seconds", 0.0))

    def add(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        self._gap = step - (self.last or 0)
        self.last = step
        loss = _measured(record.get("loss", 0.0))
        self.diverged = "" if loss is None or math.isfinite(loss) else f"the loss is {loss} at step {step}"
        for name, value in record.items():
            if name not in ("step", "seconds") and (measured := _measured(value)) is not None:
                self._series.setdefault(name, []).append((step, measured))

    def end(self, value: Any) -> None:
        if isinstance(value, Mapping):
            found = {str(key): _measured(item) for key, item in value.items()}
            self._final = {key: item for key, item in found.items() if item is not None}

    def check_end(self) -> None:
        """Raises a ValueError if the loop left off early. One that counts from 0 ends one step before."""
        if self.last is None or self.last + max(1, self._gap) < self.until:
            at = "before its first step" if self.last is None else f"at step {self.last}"
            raise ValueError(f"the loop ended {at} of {self.until}; budgets are equal only if it trains to the end")

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._series, *self._final]))

    def value(self, name: str) -> float:
        """The mean over the last tenth of the steps; at least the last value."""
        if name in self._final:
            return self._final[name]
        if name not in self._series:
            raise ValueError(f"the loop yields no {name!r}, only {', '.join(map(repr, self.names))}; yield it")
        series = self._series[name]
        assert self.last is not None
        tail = [value for step, value in series if step > (1 - _TAIL) * self.last]
        return statistics.fmean(tail or [series[-1][1]])
