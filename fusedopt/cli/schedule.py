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

from ..schedules import Schedule, create_schedule, picture
from ..schedules.names import training_schedules

app = typer.Typer(help="Look at learning rate schedules.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A schedule's name, or a .json file that to_json() wrote.")]
Names = Annotated[list[str], typer.Argument(help="Schedules' names, or .json files that to_json() wrote.")]
Steps = Annotated[int, typer.Option("--steps", help="Training steps in all.")]
Warmup = Annotated[float | None, typer.Option("--warmup", help="Warmup steps, or a ratio of all in [0, 1).")]
Lr = Annotated[float | None, typer.Option("--lr", help="The learning rate that is multiplied.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-p", metavar="KEY=VALUE", help="A parameter, such as num_cycles=2; may be repeated."),
]


@app.command("list")
def list_schedules() -> None:
    """Lists the schedules that have names, with their parameters and defaults."""
    console = Console()
    for name, cls in training_schedules().items():
        console.print(f"[bold]{name}[/bold]  {_summary(cls)}", highlight=False, soft_wrap=True)


@app.command()
def plot(
    names: Names,
    steps: Steps = 1_000,
    warmup: Warmup = None,
    lr: Lr = None,
    parameters: Set = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file; else sketch in the terminal.")] = None,
) -> None:
    """Draws schedules: into a picture with --png, else with characters."""
    with _Sentences():
        schedules = [_schedule(name, steps, warmup, lr, parameters or []) for name in names]
        if png is None:
            console = Console(highlight=False)
            for name, schedule in zip(names, schedules):
                sketch = picture.sketch(schedule, steps=steps, base_lr=lr, width=min(100, max(30, console.width)))
                console.print(f"[bold]{name}[/bold]\n{sketch}")
        else:
            labels = [Path(name).stem for name in names]
            axes = picture.plot(schedules, steps=steps, base_lr=lr, labels=labels)
            figure = axes.get_figure(root=True)
            assert figure is not None
            figure.savefig(png, dpi=150)


@app.command()
def dump(
    name: Name,
    steps: Steps = 1_000,
    warmup: Warmup = None,
    lr: Lr = None,
    parameters: Set = None,
    csv: Annotated[Path | None, typer.Option(help="File to write; else the standard output.")] = None,
) -> None:
    """Writes step, multiplier and, with --lr, the learning rate of every step as CSV."""
    with _Sentences():
        schedule = _schedule(name, steps, warmup, lr, parameters or [])
        multipliers = schedule(np.arange(steps), lr)
        columns = {"step": range(steps), "multiplier": multipliers.tolist()}
        if lr is not None:
            columns["lr"] = (multipliers * lr).tolist()
        lines = [",".join(columns), *(",".join(map(repr, row)) for row in zip(*columns.values()))]
        text = "\n".join(lines) + "\n"
        if csv is None:
            sys.stdout.write(text)
        else:
            csv.write_text(text)


class _Sentences:
    """Shows the sentence of an error instead of its traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (ValueError, TypeError, ImportError, OSError)):
            raise SystemExit(str(error)) from error


def _schedule(name: str, steps: int, warmup: float | None, lr: float | None, parameters: list[str]) -> Schedule:
    if name.endswith(".json"):
        if warmup is not None or parameters:
            raise ValueError(f"{name} has its own warmup and parameters; leave --warmup and --set out")
        return _checked(Schedule.from_json(Path(name).read_text()).resolve(steps), lr)
    given: dict[str, Any] = {} if warmup is None else {"num_warmup_steps": warmup}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            raise ValueError(f"--set {parameter!r} has no value; write KEY=VALUE")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return _checked(create_schedule(name, **given).resolve(steps), lr)


def _checked(schedule: Schedule, lr: float | None) -> Schedule:
    if lr is None and schedule.needs_base_lr:
        raise ValueError(f"{schedule.name} ends at an absolute learning rate; pass --lr, the one that it begins at")
    return schedule


def _summary(cls: type) -> str:
    """The parameters that --set takes, with their defaults."""
    parameters = inspect.signature(cls).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
