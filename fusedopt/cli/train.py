"""``fusedopt train``: trains once with a recipe, and writes a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models
from .progress import progress
from .sentences import AsJson, print_json, sentences

EPILOG = "Example: fusedopt train recipe.yaml --train loop:train --budget 2000 --output run.jsonl"

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or a preset's name.")]
Budget = Annotated[int, typer.Option("--budget", help="Steps.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The run file: JSON lines, an object for each step.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The recipe's by default.")]


def train(
    recipe: RecipeName,
    train: models.Train,
    budget: Budget,
    output: Output = Path("run.jsonl"),
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Trains once with a loop of yours and writes a run file; exit status 1 if it diverges or has no memory."""
    with sentences(), progress(f"the steps so far are in {output}") as watch:
        from .. import training
        from ..training.compare import named_recipe
        from ..training.records import finite

        chosen = named_recipe(recipe)[1]
        found = training.run(chosen, models.imported(train), budget, output, seed=seed, watch=watch)
    if as_json:
        print_json(finite(vars(found)))
    else:
        told = [f"{name} {value:.4g}" for name, value in found.metrics.items() if name not in ("lr", "memory_bytes")]
        typer.echo(f"{output}: {found.status} at step {found.step:,}: {', '.join(told)}")
    raise typer.Exit(0 if found.status == "finished" else 1)
