"""Progress of what takes long: a bar with an estimate on the error stream, and Ctrl-C that leaves a usable state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(then: str) -> Iterator[Callable[[Any], None]]:
    """Shows a bar; yields what is called with `fusedopt.training.loops.Progress` after each step.

    Ctrl-C ends with a sentence instead of a traceback, and exit status 130.

    Args:
        then: What to do after Ctrl-C, as a clause.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # Where nobody looks, as in a log, a bar would be a line for each of its updates.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, loss="-")

        def watch(state: Any) -> None:
            loss = "-" if state.loss is None else f"{state.loss:.4g}"
            bar.update(task, completed=state.done, total=state.total, description=state.label, loss=loss)

        try:
            yield watch
        except KeyboardInterrupt:
            bar.stop()
            print(f"stopped; {then}", file=sys.stderr)
            raise SystemExit(130) from None
