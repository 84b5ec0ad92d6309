"""What all subcommands have: an example in the help, and --json."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from typer.testing import CliRunner

import fusedopt
from fusedopt.cli import sentences
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


CANNOT = {
    "info": ["--nonsense"],
    "check": ["--device", "nonsense"],
    "validate": ["none.yaml"],
    "memory": ["7B", "--recipe", "none.yaml"],
    "recommend": ["7B", "--memory", "much"],
    "compare": ["none.yaml", "lora", "--train", "no:loop", "--budget", "1"],
    "search": ["none.yaml"],
    "lr-range": ["none.yaml", "--train", "no:loop"],
    "report": ["none"],
    "train": ["none.yaml", "--train", "no:loop", "--budget", "1"],
    "monitor": ["none.jsonl"],
    "diagnose": ["none.jsonl"],
    "compile-kernels": ["--target", "nonsense"],
    "schedule-list": ["--nonsense"],
    "schedule-plot": ["none.json"],
    "schedule-dump": ["none.json"],
    "presets": ["--nonsense"],
    "presets-show": ["none"],
}


@pytest.mark.parametrize("path", [path for path, command in ALL if "-".join(path) in CANNOT], ids="-".join)
def test_what_cannot_be_done_has_a_status_of_its_own(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 says what a command has found: anomalies, warnings, no pick. Nothing goes to a program that reads --json."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*path, *CANNOT["-".join(path)], "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.output
    assert result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_every_command() -> None:
    assert set(CANNOT) >= {"-".join(path) for path, command in ALL if not hasattr(command, "commands")}


def test_json_is_printed_beside_a_file(tmp_path: Path) -> None:
    for name in ("r.yaml", "r.toml"):
        line = ["presets", "show", "lora", "--output", str(tmp_path / name), "--json"]
        assert json.loads(CliRunner().invoke(app, line).stdout)["lora_rank"] == 16
        assert (tmp_path / name).exists()


def test_json_has_no_words_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    sentences.print_json({"loss": float("nan"), "norms": [float("inf"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "norms": [None, 1.0]}


def test_terminals_without_unicode() -> None:
    """And as a module: `python -m fusedopt`."""
    done = subprocess.run(
        [sys.executable, "-m", "fusedopt", "schedule", "plot", "cosine"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1,000 steps" in done.stdout.decode("ascii")


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{fusedopt.__version__}\n")


def test_files_of_text_are_utf8_in_every_locale() -> None:
    """A file that one machine writes is read by another: every call says its encoding."""
    lacking = []
    for path in Path(fusedopt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
            is_text = name in ("read_text", "write_text") or (
                name == "open" and not any("b" in mode for mode in modes if isinstance(mode, str))
            )
            is_of_the_system = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "os"
            if is_text and not is_of_the_system and not any(word.arg == "encoding" for word in node.keywords):
                lacking.append(f"{path.name}:{node.lineno}")
    assert lacking == []


def test_numbers_of_schedules_as_json() -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["schedule", "list", "--json"]).output)
    assert listed["cosine"]["num_cycles"] == {"default": 0.5}
    line = ["linear", "--steps", "4", "--lr", "2", "--json"]
    dumped = json.loads(run(app, ["schedule", "dump", *line]).output)
    assert dumped == {"step": [0, 1, 2, 3], "multiplier": [1.0, 0.75, 0.5, 0.25], "lr": [2.0, 1.5, 1.0, 0.5]}
    assert json.loads(run(app, ["schedule", "plot", *line]).output) == {"linear": dumped}
