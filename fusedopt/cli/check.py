"""``fusedopt check``: proves the kernels on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import checks
from .._version import __version__
from . import proofs, subjects
from .sentences import AsJson, fail, listed, print_json

_DEVICE = "One device, such as cpu or cuda:0; without it, all that are here."
_BACKEND = "One backend: cpu, cuda, triton, or eager; without it, those that are made for each device."
_RULES = "Equations, with commas between, by the names in the table; without it, all."
Device = Annotated[str, typer.Option("--device", help=_DEVICE)]
Backend = Annotated[str, typer.Option("--backend", help=_BACKEND)]
Rules = Annotated[str, typer.Option("--rules", help=_RULES)]


def check(device: Device = "", backend: Backend = "", rules: Rules = "", as_json: AsJson = False) -> None:
    """Proves on this machine that every kernel steps as the reference does, bit for bit, and measures it.

    The exit status is 1 if something differs, or if what was named by --device or --backend steps nothing here.
    """
    begin = time.perf_counter()
    try:
        chosen, of = subjects.targets(device or None, backend or None), _subjects(rules)
    except ValueError as error:
        fail(str(error), error)
    with Console(stderr=True).status("checking") as status:
        reports = proofs.check(chosen, of=of, progress=lambda name: status.update(f"checking {name}"))
    is_named = bool(device or backend)
    failed = any(report.failures() or (is_named and report.refusal) for report in reports)
    if as_json:
        print_json(described(reports, passed=not failed))
    else:
        show(reports, time.perf_counter() - begin, Console(highlight=False))
    raise typer.Exit(1 if failed else 0)


def _subjects(names: str) -> list[subjects.Subject]:
    """What is checked. Raises ValueError."""
    all_of_them = subjects.subjects()
    known = [subject.name for subject in all_of_them]
    wanted = listed(names) if names else known
    for name in wanted:
        if name not in known:
            raise ValueError(f"rule {name!r} is not known{checks.closest(name, known)}; there are {', '.join(known)}")
    return [subject for subject in all_of_them if subject.name in wanted]


def _header(name: str) -> str:
    """A format in two lines."""
    return name.replace(", ", "\n")


def described(reports: Sequence[proofs.Report], *, passed: bool) -> dict[str, Any]:
    """Everything that was found, as plain values."""
    return {
        "passed": passed,
        "fusedopt": __version__,
        "torch": str(torch.__version__),
        "checked": [
            {
                "device": str(report.target.device),
                "device_name": report.device_name,
                "backend": report.target.backend,
                "refusal": report.refusal,
                "rows": [asdict(row) for row in report.rows],
            }
            for report in reports
        ],
    }


def show(reports: Sequence[proofs.Report], seconds: float, console: Console) -> None:
    """A table of each target, what differs, and a line that sums up."""
    is_unicode = console.encoding.lower().startswith("utf")
    yes, no = ("✓", "✗") if is_unicode else ("yes", "NO")
    count = failed = 0
    for report in reports:
        title = f"{report.target.backend} on {report.target.device}"
        if report.device_name != "CPU":
            title = escape(f"{title} ({report.device_name})")
        if report.refusal is not None:
            console.print(f"[bold]{title}[/bold]: not checked, because {escape(report.refusal)}\n", soft_wrap=True)
            continue
        lines = box.SIMPLE_HEAD if is_unicode else box.ASCII
        table = Table(title=title, title_justify="left", title_style="bold", box=lines, pad_edge=False)
        table.add_column("rule", no_wrap=True)
        formats = [name for name in proofs.FORMATS if any(name in row.differences for row in report.rows)]
        for name in formats:
            table.add_column(_header(name), justify="center")
        table.add_column("s", justify="right")
        measured = [name for name in proofs.MEASURED if any(row.bandwidth.get(name) for row in report.rows)]
        for name in measured:
            table.add_column(f"GB/s\n{name}", justify="right")
        for row in report.rows:
            ticks = [f"[red]{no}[/red]" if row.differences[name] else f"[green]{yes}[/green]" for name in formats]
            rates = [row.bandwidth.get(name) for name in measured]
            shown = ["" if rate is None else f"{rate:,.1f}" for rate in rates]
            table.add_row(row.rule, *ticks, f"{row.seconds:.2f}", *shown)
        console.print(table)
        for rule, name, text in report.failures():
            console.print(f"[red]{report.target.backend}, {rule}, {name}[/red]: {escape(text)}", soft_wrap=True)
        console.print()
        count += sum(len(row.differences) for row in report.rows)
        failed += len(report.failures())
    verdict = f"{failed} of {count} differ" if failed else f"all {count} have the bits of the reference"
    if count == 0:
        verdict = "nothing was checked"
    console.print(f"{verdict} ({seconds:.1f} s)", soft_wrap=True)
    if failed:
        console.print("please report this page with the output of `fusedopt info`", soft_wrap=True)
