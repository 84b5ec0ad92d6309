"""``fusedopt monitor``: views, pictures and pages of runs."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("typer")

from typer.testing import CliRunner

from fusedopt.cli.app import app
from fusedopt.training import Monitor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with a spike in step 41."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with Monitor(tmp_path / "run.jsonl", optimizer, on_anomaly=None) as monitor:
        for step in range(60):
            loss = 3 * math.exp(-step / 30) + 0.01 * (step % 7) + (5 if step == 40 else 0)
            monitor.step(loss, grad_norm=loss / 2, tokens=512)
    return tmp_path / "run.jsonl"


def run(*arguments: str | Path, columns: int = 100) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["monitor", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_the_view_has_everything(path: Path, columns: int) -> None:
    status, text = run(path, columns=columns)
    assert status == 1
    for expected in ("60 (ended)", "learning rate", "tokens/s", "▁", "1 anomaly", "step 41: the loss is"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= columns


def test_json(path: Path) -> None:
    status, text = run(path, "--json")
    found = json.loads(text)
    assert status == 1
    assert found["steps"] == 60
    assert found["last"]["lr"] == 0.1
    assert [(each["kind"], each["step"]) for each in found["anomalies"]] == [("loss_spike", 41)]


def test_a_picture_and_a_page(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(path, "--png", tmp_path / "run.png", "--html", tmp_path / "run.html")[0] == 1
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "run.html").read_text()
    HTMLParser().feed(page)
    for expected in ("norm of the gradient", "loss spike", "far above its running median", "tokens per second"):
        assert expected in page
    # Nothing is fetched: addresses are names of namespaces and of parts of the page.
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|url\((?!#)", page)


def test_a_run_without_anomalies_or_records(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    monitor = Monitor(tmp_path / "run.jsonl", optimizer)
    status, text = run(tmp_path / "run.jsonl")
    assert (status, "0 (not ended)" in text) == (0, True)
    monitor.step(1.0)
    assert run(tmp_path / "run.jsonl")[0] == 0


def test_errors_are_sentences(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("hello\n")
    assert "is no record of a run: 'hello'" in run(other)[1]
    none = tmp_path / "none.jsonl"
    assert run(none) == (2, f"{none}: No such file or directory\n")
    for interval in ("0", "nan", "inf"):
        status, text = run(path, "--interval", interval)
        assert status == 2
        assert text == f"--interval {interval} is no time to wait; pass a number of seconds above 0\n"


def test_without_matplotlib_a_page_says_what_to_install(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--png", "--html"):
        status, text = run(path, option, tmp_path / "run")
        assert status == 2
        assert "pip install matplotlib" in text
