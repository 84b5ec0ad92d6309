"""`report`: what was trained, what came of it, and how to do it again, as a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..schedules import picture
from . import pictures
from .changes import ABSENT, flat
from .compare import load_comparison
from .comparison import Comparison, percent
from .evaluate import Metric
from .monitor_runs import read_run
from .recipe import LABELS, Recipe, a_recipe
from .records import environment
from .report_pages import Block, Code, Heading, Picture, Report, Rows, Text
from .search import load_search
from .search_result import Search, shown

UNITS = {"seconds": "s", "memory_bytes": "B", "tokens_per_second": "tokens/s"}
_CURVES = 5  # of a search, the best
_FIELDS_OF_RUNS = ("loss", "eval_loss", "lr", "grad_norm")  # drawn first; others follow


def report(subject: Comparison | Search | str | Path, recipe: Recipe | None = None) -> Report:
    """Makes a page of a comparison, a search or a run.

    Args:
        subject: What `compare` or `search` returned, their folder, or a run file of JSON lines.
        recipe: What a run was trained with; the one in the file's header by default, which files of `run` have, and a
            Monitor's that was given it. Comparisons and searches know theirs.

    Returns:
        The page; `save` writes it as Markdown or as one HTML file.

    Raises:
        ValueError: There is no such thing, or a recipe is given for what has its own.
        TypeError: It is something else.
        ImportError: matplotlib is not installed.
    """
    if isinstance(subject, (str, Path)):
        path = Path(subject)
        if (path / "comparison.json").exists():
            subject = load_comparison(path)
        elif (path / "search.json").exists():
            subject = load_search(path)
        elif path.is_file():
            return Report(f"Training {path.name}", tuple(_of_run(path, recipe)))
        else:
            raise ValueError(f"{path} is neither a run file nor a folder of compare or search; pass one of these")
    if recipe is not None:
        raise ValueError(f"recipe is for run files, and a {type(subject).__name__} has its own; leave it out")
    if isinstance(subject, Comparison):
        return Report(f"Comparison of {len(subject.recipes)} recipes", tuple(_of_comparison(subject)))
    if isinstance(subject, Search):
        return Report(f"Search over {', '.join(subject.space)}", tuple(_of_search(subject)))
    raise TypeError(f"subject={subject!r} is a {type(subject).__name__}; pass a Comparison, a Search or a path")


# ---- comparisons -----------------------------------------------------------------------------------


def _of_comparison(found: Comparison) -> Iterator[Block]:
    yield Text(f"{_sentence(found.verdict)}.", is_verdict=True)
    seeds = ", ".join(map(str, found.seeds))
    yield Text(f"Each recipe was trained for {found.budget:,} steps with each of the seeds {seeds}.")
    yield Heading("Results")
    yield Rows([["recipe", *found.rows()[0][1:]], *found.rows()[1:]])
    yield from map(Text, found.notes())
    for metric in (metric for metric in found.metrics if metric.weight):
        if (drawn := _intervals(found, metric)) is not None:
            yield drawn
    yield Heading("Curves")
    well = [name for name in found.recipes if name not in found.failed] or list(found.recipes)
    series = {name: [found.curves.get((name, seed), []) for seed in found.seeds] for name in well}
    unit = next((f" ({metric.unit})" for metric in found.metrics if metric.name == "loss" and metric.unit), "")
    caption = "Training loss, mean over seeds and each seed (thin), averaged over 2 % of the steps"
    caption += f"; without {', '.join(found.failed)}" if 0 < len(found.failed) < len(found.recipes) else ""
    yield Picture(caption, pictures.svg(pictures.curves(series, f"loss{unit}"), caption))
    yield Heading("What differs")
    yield _varying(found.recipes)
    yield from _schedules({name: found.recipes[name] for name in well}, found.budget)
    if found.pick is not None:
        yield Heading(f"Recipe of {found.pick}")
        yield Code(found.recipes[found.pick].to_text(), "yaml")
    yield Heading("All trainings")
    names = [metric.name for metric in found.metrics]
    rows = [["recipe", "seed", "steps", "status", *names]]
    for trial in found.trials:
        values = [trial.metrics.get(metric.name) for metric in found.metrics]
        cells = [m.shown(v if _is_number(v) else None) for m, v in zip(found.metrics, values)]
        rows.append([trial.candidate, str(trial.seed), f"{trial.step:,}", trial.status, *cells])
    yield Rows(rows)
    yield from _again(found.environment, found.command, found.train)


def _intervals(found: Comparison, metric: Metric) -> Picture | None:
    """Differences from the pick, with their intervals."""
    intervals = {name: found.difference(name, metric.name) for name in found.recipes}
    there = [
        (name, each, (each.low, each.high))
        for name, each in intervals.items()
        if each is not None and each.low is not None and each.high is not None
    ]
    if not there:
        return None
    ax = pictures.axes()
    ax.figure.set_size_inches(7.5, 1.3 + 0.45 * len(there))  # type: ignore[union-attr]
    for i, (_, each, ends) in enumerate(reversed(there)):
        colour = pictures.COLOURS[0] if each.excludes_zero else pictures.COLOURS[1]
        ax.plot(ends, [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot([each.mean], [i], "o", color=colour, markersize=7)
    ax.axvline(0, color="#5c6470", linewidth=1)
    ax.set_yticks(range(len(there)), [name for name, _, _ in reversed(there)])
    ax.set_ylim(-0.6, len(there) - 0.4)
    unit = f" ({metric.unit})" if metric.unit else ""
    pictures.finish(ax, f"{metric.name} minus that of {found.pick}{unit}", "")
    caption = (
        f"Differences of {metric.name} from the pick's, with intervals that hold together with {percent(found.level)}; "
        "orange is what cannot be told from it"
    )
    return Picture(caption, pictures.svg(ax, caption))


# ---- searches --------------------------------------------------------------------------------------


def _of_search(found: Search) -> Iterator[Block]:
    yield Text(f"{_sentence(found.verdict)}.", is_verdict=True)
    way = {"tpe": "TPE", "random": "at random", "grid": "a grid"}[found.sampler]
    early = f" ASHA let one in {found.halving} go on." if found.halving is not None else ""
    yield Text(f"Recipes were drawn by {way}, and trained for {found.budget:,} steps with seed {found.seed}.{early}")
    yield Heading("The best trials")
    yield Rows([["trial", *found.rows()[0][1:]], *found.rows()[1:]])
    done = {trial.status for trial in found.trials if trial.value is not None}
    if done & {"finished", "stopped early"}:
        yield _history(found)
    if "finished" in done:
        yield _dimensions(found)
    if found.best is not None:
        yield Heading("Curves")
        series = {}
        for trial in found.order[:_CURVES]:
            records = read_run(found.folder / "runs" / f"{trial.number}.jsonl").records
            series[f"trial {trial.number}"] = [[(r["step"], r["loss"]) for r in records if r.get("loss") is not None]]
        unit = f" ({found.metric.unit})" if found.metric.name == "loss" and found.metric.unit else ""
        caption = f"Training loss of the best {len(series)} trials, averaged over 2 % of the steps"
        yield Picture(caption, pictures.svg(pictures.curves(series, f"loss{unit}"), caption))
        best = found.recipe_of(found.best)
        yield Heading(f"Recipe of trial {found.best.number}")
        yield Code(best.to_text(), "yaml")
        yield from _schedules({f"trial {found.best.number}": best}, found.budget)
    yield Heading("All trials")
    rows = [["trial", *found.space, "status", "steps", found.metric.name]]
    for trial in found.trials:
        values = [shown(trial.values.get(name)) for name in found.space]
        rows.append([str(trial.number), *values, trial.status, f"{trial.step:,}", found.metric.shown(trial.value)])
    yield Rows(rows)
    yield from (Text(f"Trial {t.number} has {t.status}: {t.reason}.") for t in found.trials if t.status == "no recipe")
    yield from _again(found.environment, found.command, found.train)


def _history(found: Search) -> Picture:
    ax = pictures.axes()
    best: float | None = None
    line = []
    better: Callable[..., float] = min if found.metric.direction == "minimize" else max
    ended = [(t.number, t.value) for t in found.trials if t.status == "finished" and t.value is not None]
    early = [(t.number, t.value) for t in found.trials if t.status == "stopped early" and t.value is not None]
    for number, value in ended:
        best = value if best is None else better(best, value)
        line.append((number, best))
    for points, colour, label in ((early, "#b0b7c0", "stopped early"), (ended, "#1f5fd0", "trained to the end")):
        if points:
            ax.plot(*zip(*points), "o", color=colour, markersize=5, label=label)
    if line:
        ax.step(*zip(*line), where="post", color="#12936f", linewidth=1.8, label="best so far")
    pictures.keep_in_view(ax, [value for _, value in (*early, *ended)])
    pictures.finish(ax, "trial", found.metric.name + (f" ({found.metric.unit})" if found.metric.unit else ""))
    caption = f"{found.metric.name} of each trial; of those that were stopped early, where they were"
    return Picture(caption, pictures.svg(ax, caption))


def _dimensions(found: Search) -> Picture:
    """The metric over each field that varies."""
    from matplotlib.figure import Figure

    names = list(found.space)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(7.5, 0.4 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    ended = [t for t in found.trials if t.status == "finished" and t.value is not None and _is_number(t.value)]
    for i, ax in enumerate(grid.flat):
        if i >= len(names):
            ax.set_axis_off()
            continue
        values = [trial.values[names[i]] for trial in ended]
        if all(_is_number(value) for value in values):
            ax.plot(values, [trial.value for trial in ended], "o", color="#1f5fd0", markersize=4)
            if getattr(found.space.dimensions[names[i]], "log", False):
                pictures.log_axis(ax, min(values), max(values))
        else:
            labels = list(dict.fromkeys(map(shown, values)))
            ax.plot(
                [labels.index(shown(v)) for v in values], [t.value for t in ended], "o", color="#1f5fd0", markersize=4
            )
            ax.set_xticks(
                range(len(labels)), [label[:14] for label in labels], rotation=30, ha="right", fontsize="small"
            )
            ax.set_xlim(-0.5, len(labels) - 0.5)
        pictures.finish(ax, names[i], found.metric.name if i % columns == 0 else "")
    caption = f"{found.metric.name} over each field, of trials that were trained to the end"
    return Picture(caption, pictures.svg(grid.flat[0], caption))


# ---- runs ------------------------------------------------------------------------------------------


def _of_run(path: Path, recipe: Recipe | None) -> Iterator[Block]:
    run = read_run(path)
    records = run.records
    if recipe is not None:
        a_recipe(recipe)
    elif "recipe" in run.header:
        recipe = Recipe.from_dict(run.header["recipe"])
    if not records:
        raise ValueError(f"{path} has no records yet; train a step first")
    numbers = run.names()
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records if _is_number(record.get("loss"))]
    if losses:
        tail = losses[-max(1, len(losses) // 10) :]
        yield Text(
            f"Step {steps[-1]:,}: the loss is {statistics.fmean(tail):.4g}, the mean over the last {len(tail)} of "
            f"{len(records):,} records; it began at {losses[0]:.4g}.",
            is_verdict=True,
        )
    elif "loss" in numbers:
        told = f"Step {steps[-1]:,}: the loss was finite in none of {len(records):,} records."
        yield Text(told, is_verdict=True)
    yield Heading("Results")
    rows = [["", "first", "last", "lowest", "highest"]]
    for key in numbers:
        values = [record[key] for record in records if _is_number(record.get(key))]
        metric = Metric(key, unit=UNITS.get(key, ""))
        cells = (values[0], values[-1], min(values), max(values)) if values else (None,) * 4  # none is finite
        rows.append([key, *map(metric.shown, cells)])
    yield Rows(rows)
    if run.anomalies:
        yield Heading("Anomalies")
        yield Rows([["step", "what"], *([f"{each.step:,}", each.message] for each in run.anomalies)], is_text=True)
    yield Heading("Curves")
    order = [key for key in _FIELDS_OF_RUNS if key in numbers] + [k for k in numbers if k not in _FIELDS_OF_RUNS]
    for key in order:
        if key != "seconds":
            series = [(record["step"], record[key]) for record in records if _is_number(record.get(key))]
            if not series:
                continue
            unit = f" ({UNITS[key]})" if key in UNITS else ""
            caption = f"{key}{unit} over {steps[-1]:,} steps"
            yield Picture(caption, pictures.svg(pictures.curves({key: [series]}, key + unit, window=0.0), caption))
    if recipe is not None:
        yield Heading("Recipe")
        yield Code(recipe.to_text(), "yaml")
        yield from _schedules({recipe.schedule["name"]: recipe}, recipe.steps or steps[-1])
    yield from _again(environment(), None, None, "This page was made with")


# ---- what they have in common ----------------------------------------------------------------------


def _varying(recipes: Mapping[str, Recipe]) -> Rows:
    """Fields that are not the same in all recipes."""
    flats = {name: flat(recipe.to_dict()) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for values in flats.values() for key in values)
    differs = [
        key for key in keys
        if key not in (*LABELS, "seed") and len({repr(values.get(key, ABSENT)) for values in flats.values()}) > 1
    ]  # fmt: skip
    told = [["field", *recipes]]
    told += [[key, *(shown(values[key]) if key in values else "-" for values in flats.values())] for key in differs]
    return Rows(told, is_text=True)


def _schedules(recipes: Mapping[str, Recipe], steps: int) -> Iterator[Block]:
    """The learning rates that are known before the training."""
    known = {name: recipe for name, recipe in recipes.items() if recipe.lr is not None}
    drawn, ax = [], None
    for i, (name, recipe) in enumerate(known.items()):
        schedule = recipe.schedule_value(steps)
        if callable(schedule) and hasattr(schedule, "length"):
            ax = pictures.axes() if ax is None else ax
            picture.plot([schedule], steps=steps, base_lr=recipe.lr, labels=[name], ax=ax)
            ax.lines[-1].set(color=pictures.COLOURS[i % len(pictures.COLOURS)], linestyle=("-", "--", "-.", ":")[i % 4])
            drawn.append(name)
    if ax is not None:
        ax.set_title("")
        ax.set_ylim(0, 1.05 * max(known[name].lr or 0.0 for name in drawn))
        pictures.finish(ax, "step", "learning rate")
        caption = f"Schedule: the learning rate over {steps:,} steps"
        yield Heading("Schedule")
        yield Picture(caption, pictures.svg(ax, caption))
    for name in recipes:
        if name not in drawn:
            rule = recipes[name].schedule["name"]
            yield Text(f"The learning rate of {name} ({rule}) is decided while it trains, so it is not drawn.")


def _again(
    found: Mapping[str, Any], command: str | None, train: str | None, title: str = "Environment"
) -> Iterator[Block]:
    yield Heading(title)
    rows = [["what", "which"]]
    for key, value in found.items():
        rows.append([key, (", ".join(value) or "none") if isinstance(value, list) else str(value)])
    yield Rows(rows, is_text=True)
    if command is not None:
        yield Heading("To repeat it")
        yield Text("In the folder of the results, with the loop's module on Python's path:")
        yield Code(command, "sh")
    elif train is None and title == "Environment":
        yield Heading("To repeat it")
        yield Text("The loop has no name that a command line could import; call the same function from Python.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
