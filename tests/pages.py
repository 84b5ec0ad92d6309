"""Runs the pages of docs/training: their Python and their command lines, which must print what the pages say.

Of a block with the title "numbers differ between machines", numbers and units of size may differ.
"""

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
    r"^```(?P<kind>python|console)(?P<title>| title=\"[^\n]*\")\n(?P<text>.*?)^```\n"
    r"(?:\n```text(?P<output_title>| title=\"[^\n]*\")\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_DIFFER = "numbers differ between machines"


def run(page: Path) -> Iterator[tuple[str, str, str]]:
    """What each block of a page, or each command of one, should print and does: (where, expected, printed)."""
    namespace: dict[str, Any] = {}
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        look = _shape if _DIFFER in f"{found['title']}{found['output_title']}" else str
        if found["kind"] == "console":
            commands = found["text"].replace("\\\n", "")  # a command may go on in the next line
            for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", commands, re.MULTILINE):
                yield f"{page.name}:{line} $ {command}", look(expected), look(_command(command))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + found["text"], str(page), "exec"), namespace)
        yield (
            f"{page.name}:{line}",
            look(printed.getvalue() if found["output"] is None else found["output"]),
            look(printed.getvalue()),
        )


def _shape(text: str) -> str:
    """A text without its numbers, the spaces that put them into columns, and who is on a Pareto front by its time."""
    text = re.sub(r"^Pareto front of .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "0", text)
    return re.sub(r"\b(B|KiB|MiB|GiB)\b", "B", re.sub(r"  +", " ", text))


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
