"""``fusedopt report``: a page of a comparison, a search or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .sentences import AsJson, print_json, sentences

EPILOG = "Example: fusedopt report out/compare --output report.html"

Subject = Annotated[Path, typer.Argument(metavar="SUBJECT", help="The folder of compare or search, or a run file.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="What a run was trained with; the run's own.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="A .html or .md; without it, Markdown is printed.")]


def report(subject: Subject, recipe: RecipeFile = None, output: Output = None, as_json: AsJson = False) -> None:
    """Makes a page: recipe, environment, results with intervals, curves, schedule, and the command to repeat it."""
    with sentences():
        from .. import training
        from ..training.report_pages import described

        found = training.report(subject, None if recipe is None else training.Recipe.load(recipe))
        if output is not None:
            found.save(output)
        if as_json:
            print_json(described(found))
        elif output is None:
            typer.echo(found.markdown(), nl=False)
        else:
            typer.echo(f"{output}: {found.title}")
