"""report: pages of comparisons, searches and runs, as Markdown and as one HTML file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")
pytest.importorskip("matplotlib")

from loops import valley

from fusedopt import training
from fusedopt.training import Metric, Recipe, compare, report, search
from fusedopt.training.report_pages import Picture, Rows, Text, described

RECIPES = {
    "low": Recipe(lr=0.05, schedule={"name": "cosine"}, warmup=0.1),
    "good": Recipe(lr=0.3, task="<b>&|*"),
    "ruled": Recipe(lr=0.25, schedule={"name": "reduce_lr_on_plateau"}),
}


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "path", "use", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("path", "use", "rect", "circle"), f"{tag} closes {self.open}"


def check_page(found: training.Report, tmp_path: Path) -> str:
    """What every page is: whole, of itself, with units, the same each time."""
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    loads = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)([^"']*)|@import|url\((?!#)([^)]*)\)""", page)
    assert [part for part in loads if any(part)] == []  # nothing from elsewhere
    assert "<script" not in page
    for each in found.blocks:
        if isinstance(each, Rows):
            assert {len(row) for row in each.rows} == {len(each.rows[0])}
    found.save(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / name).read_text().startswith("<svg")
    json.dumps(described(found), allow_nan=False)
    return text


def test_row_48_a_report_of_a_comparison(tmp_path: Path) -> None:
    found = compare(RECIPES, valley, 60, seeds=3, metrics=[Metric("loss", unit="nats")], folder=tmp_path / "c")
    made = report(tmp_path / "c")
    text = check_page(made, tmp_path)
    assert made.blocks[0] == Text(f"P{found.verdict[1:]}.", is_verdict=True)
    for part in (
        "## Results", "paired t intervals", " nats", " s |", "B |", "## Curves", "## What differs",
        "| lr | 0.05 | 0.3 |",
        "## Schedule", "is decided while it trains", f"## Recipe of {found.pick}", "## Environment", "| torch | ",
        "fusedopt compare recipes/low.yaml recipes/good.yaml",
    ):  # fmt: skip
        assert part in text, part
    captions = [picture.caption for picture in made.pictures]
    assert [caption.split()[0] for caption in captions] == ["Differences", "Training", "Schedule:"]
    assert report(found).html() == made.html()  # the same for the same numbers
    assert found.folder == tmp_path / "c"


def test_a_report_says_what_is_not_done(tmp_path: Path) -> None:
    """Stopped, failed, one seed."""
    done = compare(RECIPES, valley, 20, seeds=2, folder=tmp_path / "c")
    sorted((tmp_path / "c" / "trials").glob("*.json"))[0].unlink()
    assert "Stopped after 5 of 6 trainings" in check_page(report(tmp_path / "c"), tmp_path)
    assert done.is_finished
    one = compare({"a": Recipe(lr=0.1), "wild": Recipe(lr=9.0)}, valley, 60, seeds=1)
    text = check_page(report(one), tmp_path)
    assert "wild failed: the loss is inf" in text
    assert "without wild" in text


def test_a_report_of_a_search(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = {"lr": {"low": 0.01, "high": 9.0, "log": True}, "betas": [[0.9, 0.99], [0.9, 0.999]]}
    arguments: dict[str, Any] = {"budget": 18, "trials": 9, "halving": 3, "sampler": "random"}
    found = search(space, valley, metric=Metric("loss", unit="nats"), folder=tmp_path / "s", **arguments)
    text = check_page(report(tmp_path / "s"), tmp_path)
    for part in (f"best: trial {found.best.number}", "stopped early", "fusedopt search search.yaml", "## All trials"):
        assert part in text
    assert len(report(found).pictures) == 4


def test_a_report_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 5 / i, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_second": 900.0} for i in range(1, 41)]
    lines[7]["loss"] = "NaN"  # as Monitor writes it
    lines[7]["anomalies"] = [{"kind": "nonfinite", "value": "NaN", "limit": 0.0, "message": "the loss is NaN"}]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    text = check_page(report(path, RECIPES["low"]), tmp_path)
    for part in (
        "Step 40: the loss is",
        "tokens/s",
        "grad\\_norm",
        "lr: 0.05",
        "| 8 | the loss is NaN |",
        "Schedule: the learning rate over 40",
    ):
        assert part in text
    assert "## Schedule" not in report(path).markdown()


def test_errors_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a run file nor a folder"):
        report(tmp_path)
    with pytest.raises(ValueError, match="recipe is for run files"):
        report(compare(RECIPES, valley, 20, seeds=1), Recipe())
    with pytest.raises(TypeError, match="subject=7 is a int"):
        report(7)  # type: ignore[arg-type]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no records yet"):
        report(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"none of the suffixes .html and .md"):
        training.Report("", ()).save(tmp_path / "x.pdf")


def test_marks_of_markdown_are_text() -> None:
    page = training.Report("a*b", (Rows([["x|y", "`z`"]]), Text("<i>"), Picture("c", "<svg/>")))
    assert "| x\\|y | \\`z\\` |" in page.markdown()
    assert "# a\\*b" in page.markdown()
    assert "<p>&lt;i&gt;</p>" in page.html()


def test_the_command_line(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    (tmp_path / "run.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    run = testing.CliRunner().invoke
    assert run(app, ["report", str(tmp_path / "run.jsonl")]).output.startswith("# Training run.jsonl\n")
    result = run(app, ["report", str(tmp_path / "run.jsonl"), "--output", str(tmp_path / "out" / "r.html"), "--json"])
    assert json.loads(result.output)["title"] == "Training run.jsonl"
    assert (tmp_path / "out" / "r.html").read_text().startswith("<!DOCTYPE html>")
