"""Runs the pages of docs/training: their Python and their command lines, which must print what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "training"
_BLOCK = re.compile(
    r"^```(?P<kind>python|console)\n(?P<text>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE
)


def run(page: Path) -> Iterator[tuple[str, str, str]]:
    """What each block of a page, or each command of one, should print and does: (where, expected, printed)."""
    namespace: dict[str, Any] = {}
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        if found["kind"] == "console":
            for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", found["text"], re.MULTILINE):
                yield f"{page.name}:{line} $ {command}", expected, _command(command)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + found["text"], str(page), "exec"), namespace)
        yield (
            f"{page.name}:{line}",
            printed.getvalue() if found["output"] is None else found["output"],
            printed.getvalue(),
        )


def _command(line: str) -> str:
    """What a command line prints; a second command after `;` may show its exit status, as `echo $?`."""
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    command, _, status = line.partition("; ")
    result = testing.CliRunner().invoke(app, shlex.split(command)[1:], env={"COLUMNS": "100"})
    error = f"{result.exception}\n" if isinstance(result.exception, SystemExit) and _is_text(result.exception) else ""
    return result.output + error + (f"{result.exit_code}\n" if status == "echo $?" else "")


def _is_text(error: SystemExit) -> bool:
    return not str(error).isdigit()
