"""The command line and the pictures of schedules."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedopt.schedules import Cosine, Linear, Polynomial, constant, decay, picture, scheduler_names, warmup

BIN = Path(sys.executable).parent / "fusedopt"


@pytest.fixture
def run() -> Any:
    """Runs a command line in this process; returns its exit code and what it wrote."""
    pytest.importorskip("rich")
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    def run(*arguments: Any) -> tuple[int, str]:
        result = testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    return run


def test_dump_writes_every_step(run: Any, tmp_path: Path) -> None:
    code, _ = run("schedule", "dump", "cosine:num_cycles=1.5", "--warmup", 0.1, "--steps", 50, "--csv", tmp_path / "c")
    assert code == 0
    schedule = Cosine(5, 50, num_cycles=1.5)
    rows = list(csv.DictReader((tmp_path / "c").open()))
    assert [(int(row["step"]), float(row["multiplier"])) for row in rows] == [(s, schedule(s)) for s in range(50)]
    code, output = run("schedule", "dump", "polynomial", "--warmup", 3, "--steps", 9, "--lr", 0.01)
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(output)))
    assert [float(row["lr"]) for row in rows] == [0.01 * Polynomial(3, 9)(s, 0.01) for s in range(9)]


def test_plot_writes_a_picture(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    assert run("schedule", "plot", "cosine", "--warmup", 100, "--steps", 1000, "--png", path) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    plain = tmp_path / "curve"  # the name that was given, and not another
    assert run("schedule", "plot", "cosine", "--png", plain) == (0, "")
    assert plain.read_bytes().startswith(b"\x89PNG")
    code, output = run("schedule", "plot", "cosine", "--png", tmp_path)
    assert (code, output) == (2, f"{tmp_path}: Is a directory\n")


def test_a_composition_comes_from_a_file(run: Any, tmp_path: Path) -> None:
    schedule = warmup(0.1) >> constant() >> decay("1-sqrt", 0.5)
    (tmp_path / "s.json").write_text(schedule.to_json())
    code, output = run("schedule", "dump", tmp_path / "s.json", "--steps", 20)
    assert code == 0
    expected = schedule.resolve(20)
    assert [float(line.split(",")[1]) for line in output.splitlines()[1:]] == [expected(s) for s in range(20)]


def test_list_names_every_schedule(run: Any) -> None:
    code, output = run("schedule", "list")
    assert code == 0
    driven = {"greedy", "reduce_lr_on_plateau", "gradient_norm", "gradient_sparsity"}
    assert {line.split()[0] for line in output.splitlines()} == set(scheduler_names()) - driven
    assert "num_cycles=0.5" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cosin"], "did you mean 'cosine'"),
        (["cosine:cycles=3"], "unknown argument cycles=3"),
        (["cosine:num_cycles"], "write KEY=VALUE"),
        (["cosine:num_cycles=-1"], "num_cycles=-1"),
        (["polynomial"], "pass --lr"),
        (["constant", "--warmup", "3"], "--warmup 3.0 means nothing to 'constant'"),
        (["warmup_stable_decay"], "lacks num_decay_steps"),
        (["cosine:num_cycles=1,num_cycles=2"], "gives a parameter twice"),
        (["cosine", "--lr", "nan"], "--lr=nan is not finite"),
        (["cosine", "--lr=-1"], "--lr=-1.0 is negative"),
        (["gone.json"], "gone.json cannot be read as JSON"),
        (["gone.json", "--warmup", "3"], "gone.json has its own warmup"),
    ],
)
def test_errors_are_sentences(run: Any, arguments: list[str], sentence: str) -> None:
    for command in ("plot", "dump"):
        code, output = run("schedule", command, *arguments)
        assert code == 2
        assert sentence in output
        assert "Traceback" not in output


def test_the_installed_command() -> None:
    if not BIN.exists():
        pytest.skip("the package is not installed with its scripts")
    pytest.importorskip("typer")
    arguments = [str(BIN), "schedule", "plot", "linear", "--steps", "10"]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[0] == "linear"
    assert "10 steps" in output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_libraries_the_command_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from fusedopt.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 1
    assert result.stderr == f"the fusedopt command needs {missing}; install it with: pip install 'fusedopt[cli]'\n"


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Linear(0, 10).plot()


def test_sketch() -> None:
    lines = Linear(2, 12).sketch(width=34, height=4).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 34
    assert [line[:3] for line in lines] == ["1 ┤", "  ┤", "  ┤", "0 ┤", "  └", "   "]
    assert lines[-1].split() == ["0", "12", "steps"]
    filled = [sum(" ▁▂▃▄▅▆▇█".find(row[3 + i : 4 + i]) for row in lines[:4] if i + 3 < len(row)) for i in range(31)]
    peak = filled.index(max(filled))
    assert filled[0] == 0
    assert max(filled) == 4 * 8
    assert filled[peak:] == sorted(filled[peak:], reverse=True)
    assert Linear(0, 12).sketch(base_lr=3e-4, height=5).splitlines()[2].startswith("0.00015 ┤")
    with pytest.raises(ValueError, match="width=10"):
        Linear(0, 10).sketch(width=10)
    with pytest.raises(ValueError, match="steps=0"):
        Linear(0, 10).sketch(steps=0)


def test_plots_are_labelled_and_nothing_overlaps() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    many = [Linear(10, 100), Cosine(10, 100), 0.5 * Polynomial(10, 100)]
    for schedules, base_lr in ((many, 3e-4), (many[:1], None), (many[1:2], 3e-7)):
        axes = picture.plot(schedules, base_lr=base_lr)
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel() == ("multiplier of the lr" if base_lr is None else "learning rate")
        figure = axes.figure
        figure.canvas.draw()
        whole = figure.get_window_extent()
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        texts += [axes.yaxis.get_offset_text()]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert len(boxes) > 8
        for i, box in enumerate(boxes):
            assert box.x0 >= whole.x0
            assert box.y0 >= whole.y0
            assert box.x1 <= whole.x1 + 1  # pixels are rounded
            assert box.y1 <= whole.y1 + 1
            assert not any(box.overlaps(other) for other in boxes[:i])
        assert len(axes.lines) == len(schedules)
        pyplot.close(figure)
    axes = Linear(0, 10).plot(base_lr=2.0)
    assert axes.lines[0].get_ydata().tolist() == [2 * Linear(0, 10)(s) for s in range(11)]
    assert axes is Cosine(0, 10).plot(ax=axes)
    assert len(axes.lines) == 2
    pyplot.close("all")
