"""The list of subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import (
    check,
    compare,
    diagnose,
    info,
    kernels,
    memory,
    monitor,
    presets,
    range_test,
    report,
    schedule,
    search,
    train,
    validate,
)

app = typer.Typer(name="fusedopt", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(schedule.app, name="schedule")
app.add_typer(presets.app, name="presets")
app.command("info", epilog="Example: fusedopt info --json")(info.show)
app.command("check", epilog="Example: fusedopt check --device cuda:0")(check.check)
app.command("validate", epilog=validate.EPILOG)(validate.validate)
app.command("memory", epilog=memory.MEMORY_EPILOG)(memory.memory)
app.command("recommend", epilog=memory.RECOMMEND_EPILOG)(memory.recommend)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("search", epilog=search.EPILOG)(search.search)
app.command("lr-range", epilog=range_test.EPILOG)(range_test.range_test)
app.command("report", epilog=report.EPILOG)(report.report)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("monitor", epilog=monitor.EPILOG)(monitor.monitor)
app.command("diagnose", epilog=diagnose.EPILOG)(diagnose.diagnose)
app.command("compile-kernels", epilog=kernels.EPILOG)(kernels.compile_kernels)


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Optimizers and schedules for PyTorch."""
