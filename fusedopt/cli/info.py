"""``fusedopt info``: what this installation can do on this machine."""

from __future__ import annotations

import typer

from ..backends import info
from .sentences import AsJson, print_json


def show(as_json: AsJson = False) -> None:
    """Tells what is built in, what is usable here, and what to do about the rest."""
    found = info.info()
    if as_json:
        print_json(found)
    else:
        typer.echo(info.render(found))
