"""``fusedopt lr-range``: which learning rates train, and which diverge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..schedules import picture
from . import models
from .progress import progress
from .sentences import AsJson, print_json, sentences

EPILOG = "Example: fusedopt lr-range recipe.yaml --train loop:train --steps 200 --png range.png"

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's file, or a preset's name.")]
Low = Annotated[float, typer.Option("--low", help="The first learning rate.")]
High = Annotated[float, typer.Option("--high", help="The last one.")]
Steps = Annotated[int, typer.Option("--steps", help="How many steps, each with a higher rate.")]
Png = Annotated[Path | None, typer.Option("--png", help="File for a picture.")]


def range_test(
    recipe: RecipeName,
    train: models.Train,
    low: Low = 1e-7,
    high: High = 1.0,
    steps: Steps = 100,
    png: Png = None,
    as_json: AsJson = False,
) -> None:
    """Trains once while the learning rate rises, stops at divergence, and says where the loss falls fastest."""
    with sentences(), progress("nothing was kept; call it again") as watch:
        from .. import training
        from ..training.compare import named_recipe

        chosen = named_recipe(recipe)[1]
        found = training.range_test(chosen, models.imported(train), low=low, high=high, steps=steps, watch=watch)
        if png is not None:
            picture.save(found.plot(), png)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
