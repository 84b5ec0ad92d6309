"""What all subcommands have: an example in the help, and --json."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from typer.testing import CliRunner

from fusedopt.cli.app import app


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All subcommands, those of subcommands included."""
    found = []
    for name, command in group.commands.items():
        below = commands(command, (*path, name)) if hasattr(command, "commands") else []
        found += [((*path, name), command), *below]
    return found


ALL = commands(typer.main.get_command(app))


@pytest.mark.parametrize(
    ("path", "command"), ALL, ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_a_command_has_an_example_and_json(path: tuple[str, ...], command: Any) -> None:
    assert "Example: fusedopt" in (command.epilog or ""), path
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert "--json" in flags or hasattr(command, "commands"), path
    assert CliRunner().invoke(app, [*path, "--help"]).exit_code == 0


def test_numbers_of_schedules_as_json() -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["schedule", "list", "--json"]).output)
    assert listed["cosine"]["num_cycles"] == {"default": 0.5}
    line = ["linear", "--steps", "4", "--lr", "2", "--json"]
    dumped = json.loads(run(app, ["schedule", "dump", *line]).output)
    assert dumped == {"step": [0, 1, 2, 3], "multiplier": [1.0, 0.75, 0.5, 0.25], "lr": [2.0, 1.5, 1.0, 0.5]}
    assert json.loads(run(app, ["schedule", "plot", *line]).output) == {"linear": dumped}
