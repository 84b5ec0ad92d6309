"""What subcommands have in common: errors as sentences with an exit status, and JSON for programs."""

from __future__ import annotations

import json
import site
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

AsJson = Annotated[bool, typer.Option("--json", help="For programs: everything as JSON.")]


FAILED = 2  # exit status; 1 says what a command found, such as anomalies, and the shell's parser exits with 2 as well


def fail(sentence: str, cause: BaseException | None = None) -> NoReturn:
    """Ends the command: it could not do what it was asked for."""
    typer.echo(sentence, err=True)
    raise SystemExit(FAILED) from cause


@contextmanager
def sentences() -> Iterator[None]:
    """Ends with the sentence of an error instead of its traceback; what a user's own code raises keeps that."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        if _is_of_a_user(error):
            raise
        fail(_said(error), error)


def _said(error: BaseException) -> str:
    """What an error says; the system's as well, which begin with a number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _is_of_a_user(error: BaseException) -> bool:
    """Whether an error came up in a function of a user's, such as a loop, and not in this package that it called."""
    ours = Path(__file__).parents[1]
    paths = sysconfig.get_paths()
    installed = [ours, *(Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    installed += [Path(folder) for folder in (*site.getsitepackages(), site.getusersitepackages())]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if not files or files[-1].is_relative_to(ours):
        return False
    return any(not _is_installed(file, installed) for file in files if file.is_file())


def _is_installed(file: Path, folders: list[Path]) -> bool:
    is_in_packages = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)  # also of other folders on the path
    return is_in_packages or any(file.is_relative_to(folder) for folder in folders)


def listed(text: str) -> list[str]:
    """What an option lists with commas between: at least one thing, if only an empty text."""
    return [part.strip() for part in text.split(",") if part.strip()] or [text]


def print_json(value: Any) -> None:
    """Writes a value for programs. JSON has neither infinities nor NaN: they become null."""
    from ..training.records import finite

    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))
