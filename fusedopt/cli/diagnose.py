"""``fusedopt diagnose``: what went wrong with a training, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .sentences import AsJson, print_json, sentences

EPILOG = "Example: fusedopt diagnose run.jsonl --error train.log --apply 1 --output better.yaml"


def diagnose(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="The file that Monitor writes.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="What it was made from; the run's own.")] = None,
    error: Annotated[Path | None, typer.Option("--error", help="A file with the error, such as a log.")] = None,
    apply: Annotated[int | None, typer.Option("--apply", help="Number of a remedy, of the first trouble.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the recipe with it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Names the troubles of a training, with evidence and remedies; exit status 1 if there are any."""
    with sentences():
        from .. import training

        if (apply is None) != (output is None):
            raise ValueError("--apply and --output go together: the number of a remedy, and the file for the recipe")
        recorded = None if run is None else training.read_run(run)
        given = None if recipe is None else training.Recipe.load(recipe)
        text = None if error is None else error.read_text(encoding="utf-8", errors="replace")
        found = training.diagnose(recorded, given, error=text)
        if as_json:
            print_json([each.to_dict() for each in found])
        else:
            typer.echo("\n\n".join(map(str, found)) or "no trouble was found")
        if apply is not None and output is not None:
            remedies = found[0].remedies if found else ()
            if not 1 <= apply <= len(remedies):
                raise ValueError(f"--apply {apply} is none of the {len(remedies)} remedies of the first trouble")
            change = remedies[apply - 1].change
            if not change:
                raise ValueError(f"remedy {apply} changes nothing of the recipe: {remedies[apply - 1].what}")
            base = given or training.Recipe.from_dict(recorded.header["recipe"])  # type: ignore[union-attr]
            base.apply(change).save(output)
    raise typer.Exit(1 if found else 0)
