"""``fusedopt info``: what this installation can do on this machine."""

from __future__ import annotations

import json

import typer

from ..backends import info
from .sentences import AsJson


def show(as_json: AsJson = False) -> None:
    """Tells what is built in, what is usable here, and what to do about the rest."""
    found = info.info()
    typer.echo(json.dumps(found, indent=2) if as_json else info.render(found))
