"""``fusedopt compare``: trains candidates with equal budgets, and picks one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import models
from .progress import progress
from .sentences import AsJson, print_json, sentences

EPILOG = (
    "Example: fusedopt compare ours.yaml theirs.yaml small-from-scratch --train loop:train --budget 2000 --seeds 5 "
    "--metric eval_loss --folder out/compare"
)
_METRIC = (
    "What is best: a name, with direction, scale, weight, log and unit if need be, as in "
    "accuracy:direction=maximize,scale=0.01. May be given more than once; loss by default."
)

CandidateNames = Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, or names of presets.")]
Budget = Annotated[int, typer.Option("--budget", help="Steps of each training.")]
Seeds = Annotated[str, typer.Option("--seeds", help="How many, or which ones: 5, or 11,12,13.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", metavar="NAME[:KEY=VALUE,...]", help=_METRIC)]
Halving = Annotated[int | None, typer.Option("--halving", help="Successive halving: one in so many goes on.")]
Level = Annotated[float, typer.Option("--level", help="The confidence of all intervals together.")]
Folder = Annotated[Path, typer.Option("--folder", help="Where results are kept; the same command goes on there.")]


def compare(
    candidates: CandidateNames,
    train: models.Train,
    budget: Budget,
    folder: Folder = Path("comparison"),
    seeds: Seeds = "3",
    metric: Metrics = None,
    halving: Halving = None,
    level: Level = 0.95,
    as_json: AsJson = False,
) -> None:
    """Trains candidates with equal budgets and the same seeds, and picks one; exit status 1 if there is no pick.

    Stopped by Ctrl-C or killed, the same command goes on where it was.
    """
    with sentences(), progress(f"what is done is in {folder}: the same command goes on") as watch:
        from .. import training

        found = training.compare(
            candidates,
            models.imported(train),
            budget,
            seeds=read_seeds(seeds),
            metrics=[read_metric(text) for text in metric or ["loss"]],
            halving=halving,
            level=level,
            folder=folder,
            watch=watch,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.pick is not None else 1)


def read_seeds(text: str) -> int | list[int]:
    """A number of seeds, or seeds with commas between. Raises a ValueError."""
    if not re.fullmatch(r"\d+(,\d+)*,?", text):
        raise ValueError(f"--seeds {text!r} is no number; pass how many, or which ones with commas between")
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)


def read_metric(text: str) -> Any:
    """NAME[:KEY=VALUE,...] as a metric. Raises a ValueError or TypeError."""
    from ..training import Metric

    name, _, given = text.partition(":")
    values: dict[str, Any] = {}
    for part in given.split(",") if given else []:
        key, equals, value = part.partition("=")
        if not equals or key not in ("direction", "scale", "weight", "log", "unit"):
            raise ValueError(f"--metric {text!r} has {part!r}; write KEY=VALUE of direction, scale, weight, log, unit")
        try:
            values[key] = value if key in ("direction", "unit") else json.loads(value)
        except ValueError as error:
            raise ValueError(f"--metric {text!r} has {part!r}, whose value is neither a number nor true") from error
    return Metric(name, **values)
