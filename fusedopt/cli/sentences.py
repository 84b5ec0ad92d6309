"""What subcommands have in common: errors as sentences, and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="For programs: everything as JSON.")]


@contextmanager
def sentences() -> Iterator[None]:
    """Ends with the sentence of an error instead of its traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error


def print_json(value: Any) -> None:
    """Writes a value for programs."""
    typer.echo(json.dumps(value, indent=2))
