"""The documentation: its code runs and prints what it says, every public name is in the API reference, and the
architecture is that of the sources."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import pydoc
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import needs_fsdp2, peer
from torch import distributed

import fusedopt
import fusedopt.training
from fusedopt.engine.options import Options

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "guide"
FRAMEWORKS = ROOT / "docs" / "frameworks"
PAGES = [*sorted(GUIDE.glob("*.md")), *sorted(FRAMEWORKS.glob("*.md")), ROOT / "README.md"]
_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """A page's blocks of Python: line, code, and what it prints if a block of text follows at once."""
    text = page.read_text()
    return [(text.count("\n", 0, found.start()) + 2, *found.group("code", "output")) for found in _BLOCK.finditer(text)]


@pytest.mark.parametrize("page", sorted(FRAMEWORKS.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_diff_adds_is_code_that_runs(page: Path) -> None:
    """The page's own, or that of an example or a test which runs the framework."""
    code = "".join(code for _, code, _ in blocks(page))
    elsewhere = [*(ROOT / "examples").glob("*.py"), *(ROOT / "tests" / "integrations").glob("*.py")]
    code += "".join(path.read_text() for path in elsewhere)
    lines = {line.strip().rstrip(",") for line in code.splitlines()}
    added = [
        line for line in re.findall(r"^\+ (.*)$", page.read_text(), re.MULTILINE) if not line.startswith("import ")
    ]
    assert [line for line in added if line.strip().rstrip(",") not in lines] == []


def forget_accelerators() -> None:
    """What accelerate keeps for the whole process: its first Accelerator decides for all that follow."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace that begins with the model of the guide's first page."""
    code = "".join(code for _, code, _ in blocks(page))
    for module in dict.fromkeys(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)):
        peer(module)  # a framework that is not installed
    if page.stem == "fsdp":
        needs_fsdp2()
    monkeypatch.chdir(tmp_path)
    forget_accelerators()
    # Inductor takes most of a minute; test_compile.py has it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    first = GUIDE / "getting-started.md"
    namespace: dict[str, Any] = {}
    if page != first:
        exec(blocks(first)[0][1], namespace)
        namespace["loss"] = namespace["loss_of"](namespace["model"], namespace["batches"][0])
    try:
        for line, code, output in blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # errors name the page's line
            if output is not None:
                assert printed.getvalue() == output, f"{page}:{line} prints something else"
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        forget_accelerators()


def test_troubleshooting_quotes_messages() -> None:
    """What a table has in its first column is a part of a message in the sources."""
    sources = "".join(path.read_text() for path in (ROOT / "fusedopt").rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| ", (GUIDE / "troubleshooting.md").read_text(), re.MULTILINE)
    quotes = [quote for row in rows for quote in re.findall(r"`(.+?)`", row)]
    assert quotes
    assert [quote for quote in quotes if quote not in sources] == []


def test_every_public_name_is_in_the_api_reference() -> None:
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    paths = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    paths += [f"fusedopt.{name}" for name in fusedopt.optimizers.__all__]  # docs/hooks.py puts them on a page
    documented = [pydoc.locate(path) for path in paths]
    assert [path for path, value in zip(paths, documented) if not inspect.getdoc(value)] == []
    # By identity: get_scheduler is a name of both modules, and needs one place.
    missing = [
        f"{module.__name__}.{name}"
        for module in (fusedopt, fusedopt.schedules, fusedopt.training)
        for name in module.__all__
        if callable(getattr(module, name))  # a constant is explained where it is used
        and not any(getattr(module, name) is value for value in documented)
    ]
    assert missing == []


def test_listed_members_exist() -> None:
    """mkdocstrings passes over names that are not there."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path, members in re.findall(
            r"^::: ([\w.]+)\n    options:\n      members: \[(.+)\]", page.read_text(), re.M
        ):
            for member in members.split(", "):
                assert hasattr(pydoc.locate(path), member), f"{path} has no {member}"


def _signatures(page: Path) -> list[tuple[str, ast.FunctionDef]]:
    """What a page of an optimizer begins with: a call that has defaults where arguments are, as a function."""
    code = blocks(page)[0][1]
    found = []
    for each in re.finditer(r"^fusedopt\.(\w+)(\((?:[^()]|\([^()]*\))*\))", code, re.MULTILINE):
        if isinstance(getattr(fusedopt, each[1]), type) and "params" in each[2]:
            tree = ast.parse(f"def _{each[2]}: pass").body[0]
            assert isinstance(tree, ast.FunctionDef)
            found.append((each[1], tree))
    return found


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "optimizers").glob("*.md")), ids=lambda page: page.stem)
def test_signatures_of_optimizers(page: Path) -> None:
    """Names, order and defaults; where `**options` is not among them, everything is."""
    signatures = _signatures(page)
    assert signatures or "params" not in blocks(page)[0][1]
    for name, tree in signatures:
        actual = inspect.signature(getattr(fusedopt, name)).parameters
        by_position = tree.args.args[len(tree.args.args) - len(tree.args.defaults) :]
        written = dict(zip((arg.arg for arg in by_position), tree.args.defaults))
        written |= {arg.arg: value for arg, value in zip(tree.args.kwonlyargs, tree.args.kw_defaults) if value}
        defaults = {key: eval(ast.unparse(value)) for key, value in written.items()}
        assert {key: actual[key].default for key in defaults if key in actual} == defaults, name
        order = [arg.arg for arg in tree.args.args]
        assert list(actual)[: len(order)] == order, name
        if tree.args.kwarg is None:
            assert [key for key in actual if key not in ("params", *defaults)] == [], name


def test_the_table_of_options_has_every_option() -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    table = page[: page.index("\n## ")]
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert sorted(Options.__annotations__.keys() - named) == []
    defaults = {key: eval(value) for key, value in re.findall(r"^\| `(\w+)=([^`]*)`", table, re.MULTILINE)}
    actual = inspect.signature(fusedopt.FusedOptimizer.__init__).parameters
    assert {key: actual[key].default for key in defaults} == defaults


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "docs/architecture.svg"])
def test_the_architecture_is_that_of_the_sources(page: str) -> None:
    """Every room is in the text and in the drawing, and every file that they name exists."""
    text = (ROOT / page).read_text()
    rooms = [folder.name for folder in (*(ROOT / "fusedopt").iterdir(), *(ROOT / "csrc").iterdir()) if folder.is_dir()]
    assert [room for room in rooms if room != "__pycache__" and f"{room}/" not in text] == []
    named = set(re.findall(r"(?<![\w*])\w+\.(?:py|h|inl|cpp|cu|cuh)\b", text))
    files = {
        file.name for folder in ("csrc", "fusedopt", "triton_kernels", "tests") for file in (ROOT / folder).rglob("*")
    }
    assert sorted(named - files) == []
