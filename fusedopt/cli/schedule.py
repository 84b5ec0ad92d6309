"""``fusedopt schedule list | plot | dump``: looks at schedules without training."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from .. import checks
from ..schedules import Schedule, create_schedule, picture
from ..schedules.names import training_schedules
from .sentences import AsJson, print_json, sentences

_EPILOG = "Example: fusedopt schedule plot cosine warmup_stable_decay:num_decay_steps=0.2 --warmup 0.1 --steps 1000"
app = typer.Typer(help="Look at learning rate schedules.", epilog=_EPILOG, no_args_is_help=True, rich_markup_mode=None)

_NAME = (
    "A name that `fusedopt schedule list` knows, with parameters if need be: cosine or "
    "warmup_stable_decay:num_decay_steps=0.2,decay_type=1-sqrt; or a .json file that to_json() wrote."
)
Name = Annotated[str, typer.Argument(metavar="NAME[:KEY=VALUE,...]", help=_NAME)]
Names = Annotated[list[str], typer.Argument(metavar="NAME[:KEY=VALUE,...]...", help=_NAME)]
Steps = Annotated[int, typer.Option("--steps", help="Training steps in all.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Warmup steps, or a ratio of all in [0, 1).")]
Lr = Annotated[float | None, typer.Option("--lr", help="The learning rate that is multiplied.")]
Png = Annotated[Path | None, typer.Option("--png", help="File for a picture; without it the terminal gets a sketch.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="File to write; without it the standard output.")]


@app.command("list", epilog="Example: fusedopt schedule list")
def list_schedules(as_json: AsJson = False) -> None:
    """Lists the schedules with their parameters and defaults."""
    if as_json:
        print_json({name: _parameters(cls) for name, cls in training_schedules().items()})
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, cls in training_schedules().items():
        parameters = inspect.signature(cls).parameters.values()
        shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        console.print(f"[bold]{name}[/bold]  {shown}")


@app.command(epilog=_EPILOG)
def plot(
    names: Names, steps: Steps = 1_000, warmup: Warmup = 0, lr: Lr = None, png: Png = None, as_json: AsJson = False
) -> None:
    """Draws schedules: into a picture with --png, else with characters; --json gives their numbers instead."""
    with sentences():
        schedules = [_schedule(name, steps, warmup, lr) for name in names]
        if png is not None:
            labels = [name.replace(":", "\n", 1).replace(",", ", ") for name in names]
            picture.save(picture.plot(schedules, steps=steps, base_lr=lr, labels=labels), png)
        if as_json:
            print_json({name: _columns(each, steps, lr) for name, each in zip(names, schedules)})
        if png is not None or as_json:
            return
        console = Console(highlight=False)
        width = min(100, max(30, console.width))
        sketches = [picture.sketch(schedule, steps=steps, base_lr=lr, width=width) for schedule in schedules]
        for name, sketch in zip(names, sketches):
            console.print(name, style="bold", markup=False)
            print(sketch)


@app.command(epilog="Example: fusedopt schedule dump linear --warmup 100 --steps 1000 --lr 1e-3 --csv linear.csv")
def dump(
    name: Name, steps: Steps = 1_000, warmup: Warmup = 0, lr: Lr = None, csv: Csv = None, as_json: AsJson = False
) -> None:
    """Writes step, multiplier and, with --lr, the learning rate of every step as CSV."""
    with sentences():
        columns = _columns(_schedule(name, steps, warmup, lr), steps, lr)
        rows = (",".join(map(repr, row)) for row in zip(*columns.values()))
        text = "\n".join([",".join(columns), *rows, ""])
        if csv is not None:
            csv.write_text(text, encoding="utf-8")
        if as_json:
            print_json(columns)
        elif csv is None:
            sys.stdout.write(text)


def _columns(schedule: Schedule, steps: int, lr: float | None) -> dict[str, list[Any]]:
    multipliers = schedule(np.arange(steps), lr)
    columns: dict[str, list[Any]] = {"step": list(range(steps)), "multiplier": multipliers.tolist()}
    return columns if lr is None else {**columns, "lr": (multipliers * lr).tolist()}


def _parameters(cls: type[Schedule]) -> dict[str, Any]:
    """Parameters and their defaults; of one that has to be given, nothing."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: {} if p.default is p.empty else {"default": p.default} for p in parameters}


def _schedule(spec: str, steps: int, warmup: float, lr: float | None) -> Schedule:
    if lr is not None:
        checks.nonnegative("--lr", lr)
    if spec.endswith(".json"):
        if warmup:
            raise ValueError(f"--warmup {warmup!r} is for a name; {spec} has its own warmup, so leave it out")
        schedule = _read(Path(spec))
    else:
        name, _, given = spec.partition(":")
        pairs = [_parameter(text) for text in given.split(",")] if given else []
        parameters = dict(pairs)
        if len(parameters) < len(pairs):
            raise ValueError(f"{spec!r} gives a parameter twice; give each once")
        takes = inspect.signature(training_schedules().get(name, Schedule)).parameters
        if "num_warmup_steps" in takes:
            parameters.setdefault("num_warmup_steps", warmup)
        elif warmup:
            raise ValueError(f"--warmup {warmup!r} means nothing to {name!r}; leave it out")
        schedule = create_schedule(name, **parameters)
    schedule = schedule.resolve(steps)
    if lr is None and schedule.needs_base_lr:
        raise ValueError(f"{spec!r} ends at an absolute learning rate; pass --lr, the one that it begins at")
    return schedule


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no value; write KEY=VALUE, with commas between")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _read(path: Path) -> Schedule:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); pass a file that to_json() wrote") from error
    return Schedule.from_dict(description)
