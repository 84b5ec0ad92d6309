"""``fusedopt memory`` and ``fusedopt recommend``: what a training takes, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import models
from .sentences import AsJson, print_json, sentences

MEMORY_EPILOG = "Example: fusedopt memory 7B --preset full-7b-24gb"
RECOMMEND_EPILOG = "Example: fusedopt recommend 7B --memory 24GB --devices 1 --output recipe.yaml"

Size = Annotated[str | None, typer.Argument(metavar="[SIZE]", help="Such as 7B or 350M; or give --model.")]
Devices = Annotated[int, typer.Option("--devices", help="Over how many devices data is parallel.")]
Sequence = Annotated[int | None, typer.Option("--sequence", help="Tokens in a sequence; the recipe's by default.")]


def memory(
    size: Size = None,
    model: models.Model = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A recipe: .yaml, .toml or .json.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="One that `fusedopt presets` lists.")] = None,
    devices: Devices = 1,
    distribution: Annotated[str | None, typer.Option("--distribution", help="ddp, or fsdp (the default).")] = None,
    sequence: Sequence = None,
    as_json: AsJson = False,
) -> None:
    """Says what a training takes on each device, by kind, before there is any."""
    with sentences():
        from .. import training

        if (recipe is None) == (preset is None):
            raise ValueError("--recipe and --preset say what is trained; pass one of them")
        chosen = training.Recipe.load(recipe) if recipe is not None else training.preset(str(preset))
        found = training.estimate(
            _subject(size, model), chosen, devices=devices, distribution=distribution, sequence_length=sequence
        )
        if as_json:
            print_json(found.to_dict())
        else:
            typer.echo(str(found))


def recommend(
    memory: Annotated[str, typer.Option("--memory", help="Of each device: 24GB (10^9 bytes each), or 80GiB.")],
    size: Size = None,
    model: models.Model = None,
    devices: Devices = 1,
    task: Annotated[str | None, typer.Option("--task", help="A preset that all else is from.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences in a step, on all devices.")] = None,
    sequence: Sequence = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the first recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Finds recipes that fit into the memory of a device, the best quality first; exit status 1 if none does."""
    with sentences():
        from .. import training

        found = training.recommend(
            _subject(size, model), memory, devices=devices, task=task, batch_size=batch, sequence_length=sequence
        )
        fits = bool(found) and found[0].fits
        if as_json:
            print_json([each.to_dict() for each in found])
        else:
            if not fits:
                typer.echo("nothing fits; the one that lacks least:")
            for i, each in enumerate(found, 1):
                typer.echo(f"{i}. {each}")
        if fits and output is not None:
            found[0].recipe.save(output)
    raise typer.Exit(0 if fits else 1)


def _subject(size: str | None, model: str | None) -> Any:
    if (size is None) == (model is None):
        raise ValueError("SIZE and --model say whose memory is meant; pass one of them")
    return size if model is None else models.made(model)
