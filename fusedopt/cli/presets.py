"""``fusedopt presets [show NAME]``: recipes to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .sentences import AsJson, print_json, sentences

_EPILOG = "Example: fusedopt presets show text-classification --output recipe.yaml"
app = typer.Typer(
    help="Recipes to begin with: list them, or show one with its reasons.", epilog=_EPILOG, rich_markup_mode=None
)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File to write: .yaml keeps the reasons, .toml and .json do not.")
]


@app.callback(invoke_without_command=True)
def list_presets(context: typer.Context, as_json: AsJson = False) -> None:
    """Lists the presets."""
    if context.invoked_subcommand is not None:
        return
    with sentences():
        from .. import training

        found = training.presets()
        if as_json:
            print_json(
                {name: {"summary": each.summary, "recipe": each.recipe.to_dict()} for name, each in found.items()}
            )
            return
        width = max(map(len, found))
        for name, each in found.items():
            typer.echo(f"{name:{width}}  {each.summary}")


@app.command(epilog=_EPILOG)
def show(
    name: Annotated[str, typer.Argument(help="One that `fusedopt presets` lists.")],
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Shows a preset with the reasons for its numbers, or writes it to a file to begin with."""
    with sentences():
        from .. import training

        found = training.find_preset(name)
        if output is not None and output.suffix in (".yaml", ".yml"):
            output.write_text(found.text, encoding="utf-8")
        elif output is not None:
            found.recipe.save(output)
        if as_json:
            print_json(found.recipe.to_dict())
        elif output is None:
            typer.echo(found.text, nl=False)
