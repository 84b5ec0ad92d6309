"""``fusedopt validate``: what is wrong with a recipe, before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models
from .sentences import AsJson, print_json, sentences

EPILOG = (
    "Exit status: 0 if nothing but notes is found, 1 with warnings, 2 with errors, or if it cannot be read. "
    "Example: fusedopt validate recipe.yaml --steps 10000 --model train:make_model"
)

Path_ = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: .yaml, .toml or .json.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps of the whole training; the recipe's by default.")]


def validate(recipe: Path_, model: models.Model = None, steps: Steps = None, as_json: AsJson = False) -> None:
    """Finds what is wrong with a recipe, with reasons and remedies, without training."""
    with sentences():
        from .. import training

        if not recipe.exists():
            raise ValueError(f"{recipe} does not exist; pass the path of a recipe")
        found = training.validate(recipe, models.made(model), steps)
        if as_json:
            print_json([finding.to_dict() for finding in found])
        else:
            for finding in found:
                typer.echo(str(finding))
                for change in finding.change:
                    typer.echo(f"    {change}")
            counts = ((len(found.of(severity)), severity) for severity in ("error", "warning", "note"))
            told = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count)
            typer.echo(f"{recipe}: {told or 'nothing found'}")
    raise typer.Exit(found.exit_status)
