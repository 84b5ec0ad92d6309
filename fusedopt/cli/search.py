"""``fusedopt search``: the best of a space of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models
from .progress import progress
from .sentences import AsJson, print_json, sentences

EPILOG = (
    "Example: fusedopt search search.yaml --folder out/search --output best.yaml, with a file such as "
    "{recipe: small-from-scratch, train: 'loop:train', budget: 1000, trials: 40, halving: 3, metric: eval_loss, "
    "space: {lr: {low: 1e-4, high: 1e-2, log: true}, weight_decay: [0.0, 0.1]}}"
)
_FILE = "What is searched: recipe, train, budget, trials, sampler, halving, metric, seed, space; .yaml, .toml or .json."

File = Annotated[Path, typer.Argument(metavar="SEARCH", help=_FILE)]
Folder = Annotated[Path, typer.Option("--folder", help="Where trials are kept; processes may share it.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File for the best recipe.")]


def search(file: File, folder: Folder = Path("search"), output: Output = None, as_json: AsJson = False) -> None:
    """Trains recipes of a space and finds the best: by TPE, at random or on a grid, with ASHA on request.

    Call it several times at once to share the trials between processes. Stopped by Ctrl-C or killed, the same command
    goes on where it was. Exit status 1 if no trial finished.
    """
    with sentences(), progress(f"what is done is in {folder}: the same command goes on") as watch:
        from .. import training

        arguments = training.read_search(file)
        loop = models.imported(arguments.pop("train"))
        found = training.search(arguments.pop("space"), loop, folder=folder, watch=watch, **arguments)
        if output is not None and found.recipe is not None:
            found.recipe.save(output)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
    raise typer.Exit(0 if found.best is not None else 1)
