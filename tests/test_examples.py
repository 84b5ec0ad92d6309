"""Examples run, with few steps, and print what the documentation says they print, up to numbers."""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from cases import peer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem not in ("demo", "gpt", "loop"))
PAGE = (ROOT / "docs" / "frameworks" / "examples.md").read_text()
# One for each framework; the others are left to `make test-all`.
FAST = ("causal_lm", "lightning_digits", "plain_loop")


def form(text: str) -> list[str]:
    """Lines with every number as one sign, and runs of blanks and rules as one."""
    return [re.sub(r"[ -]+", " ", re.sub(r"[\d.,]*\d", "#", line)).strip() for line in text.strip().splitlines()]


def printed(example: Path) -> str:
    """What the page says that an example prints."""
    found = re.search(rf"`examples/{example.name}`.*?```text\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"docs/frameworks/examples.md does not show what {example.name} prints"
    return found[1]


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=() if path.stem in FAST else pytest.mark.thorough, id=path.stem) for path in EXAMPLES],
)
@pytest.mark.filterwarnings("ignore")  # of frameworks about CPUs
def test_an_example_runs_and_prints_what_the_page_says(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in dict.fromkeys(re.findall(r"^(?:from|import) (\w+)", example.read_text(), re.MULTILINE)):
        if module not in ("gpt", *sys.stdlib_module_names):
            peer(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "4"])
    monkeypatch.syspath_prepend(example.parent)
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    runpy.run_path(str(example), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("{'", "\r"))]  # of Trainer
    assert form("\n".join(lines)) == form(printed(example))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 100
