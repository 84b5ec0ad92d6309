"""What subcommands have in common: errors as sentences, and JSON for programs."""

from __future__ import annotations

import json
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="For programs: everything as JSON.")]


@contextmanager
def sentences() -> Iterator[None]:
    """Ends with the sentence of an error instead of its traceback; what a user's own code raises keeps that."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        if _is_of_a_user(error):
            raise
        raise SystemExit(str(error)) from error


def _is_of_a_user(error: BaseException) -> bool:
    """Whether an error came up in a function of a user's, such as a loop, and not in this package that it called."""
    ours = Path(__file__).parents[1]
    paths = sysconfig.get_paths()
    installed = [ours, *(Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if not files or files[-1].is_relative_to(ours):
        return False
    return any(not any(file.is_relative_to(path) for path in installed) for file in files if file.is_file())


def print_json(value: Any) -> None:
    """Writes a value for programs."""
    typer.echo(json.dumps(value, indent=2))
