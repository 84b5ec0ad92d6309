"""``fusedopt monitor``: a run as it goes, in the terminal, as a picture or as a page."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .sentences import AsJson, print_json, sentences

if TYPE_CHECKING:
    from rich.console import Console, Group

    from ..training.monitor_runs import Run

EPILOG = "Example: fusedopt monitor run.jsonl --html run.html"

_BARS = "▁▂▃▄▅▆▇█"
_CURVES = ("loss", "lr", "grad_norm", "update_ratio")
_SHOWN = 8  # anomalies


def monitor(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="The file that Monitor writes.")],
    png: Annotated[Path | None, typer.Option("--png", help="File for a picture.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="File for a page that holds everything in itself.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show what there is and end, also in a terminal.")] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between looks at the file.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Shows a training as it goes, until Ctrl-C: loss, lr, norms, anomalies; exit status 1 if there are any."""
    with sentences():
        from ..training import monitor_pictures, monitor_runs

        if not 0 < interval < math.inf:
            raise ValueError(f"--interval {interval:g} is no time to wait; pass a number of seconds above 0")
        reader = monitor_runs.Reader(path)
        run = reader.read()
        if png is not None:
            monitor_pictures.save_png(run, png)
        if html is not None:
            monitor_pictures.save_html(run, html, title=f"Training run {path.name}")
        if as_json:
            print_json(_as_dict(run))
        elif png is None and html is None:
            _watch(reader, path.name, once or not sys.stdout.isatty(), interval)
    raise typer.Exit(1 if run.anomalies else 0)


def _as_dict(run: Run) -> dict[str, Any]:
    from ..training.monitor_runs import plain

    names = run.names()
    last = {name: run.series(name)[1][-1] for name in names}
    anomalies = [vars(each) for each in run.anomalies]
    steps = run.records[-1]["step"] if run.records else 0
    return plain({"steps": steps, "ended": run.ended, "header": run.header, "last": last, "anomalies": anomalies})


def _watch(reader: Any, name: str, once: bool, interval: float) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if once or reader.run.ended:
        console.print(_view(reader.run, name, console))
        return
    from rich.live import Live

    try:
        with Live(_view(reader.run, name, console), console=console, auto_refresh=False) as live:
            while not reader.run.ended:
                time.sleep(interval)
                live.update(_view(reader.read(), name, console), refresh=True)
    except KeyboardInterrupt:
        pass


def _view(run: Run, name: str, console: Console) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..training.monitor_pictures import labels, summary

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in summary(run):
        facts.add_row(*row)
    parts: list[Any] = [Text(name, style="bold"), facts, Text()]
    width = max(10, min(100, console.width) - 52)
    curves = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key in _CURVES:
        values = [value for value in run.series(key)[1] if value == value and abs(value) != float("inf")]
        if values:
            curves.add_row(
                labels.get(key, key),
                Text(_bars(values, width), style="cyan"),
                f"{min(values):.3g} to {max(values):.3g}",
            )
    parts.append(curves)
    found = run.anomalies
    if found:
        parts += [Text(), Text("1 anomaly" if len(found) == 1 else f"{len(found):,} anomalies", style="bold red")]
        if len(found) > _SHOWN:
            parts.append(Text(f"the last {_SHOWN}:"))
        parts += [Text(str(each)) for each in found[-_SHOWN:]]
    return Group(*parts)


def _bars(values: list[float], width: int) -> str:
    """Numbers as bars between the least and the largest; of each column the largest, so that no spike is lost."""
    count = min(width, len(values))
    chosen = [max(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]
    if min(values) > 0 and max(values) > 10 * min(values):  # as logarithms: one spike would flatten all else
        values, chosen = [math.log(value) for value in values], [math.log(value) for value in chosen]
    low, high = min(values), max(values)
    return "".join(_BARS[int((value - low) / (high - low) * 7.999) if high > low else 0] for value in chosen)
