"""``fusedopt compile-kernels``: compiles the Triton kernels ahead of time."""

from __future__ import annotations

import importlib
import time
from typing import Annotated

import typer
from rich.console import Console

from ..backends import triton
from .sentences import AsJson, fail, listed, print_json

_TARGET = "Devices, with commas between: cuda:90 (compute capability 9.0), hip:gfx942, ..."
_FORMATS = (
    "Formats of parameters/states, or parameters/states/master_weights, with commas between: "
    "bfloat16/8bit/split24,... Without it, the usual ones."
)
_NORMS = "Also what a step launches that takes norms of updates: record_norms(), every tenth step with a Monitor."
Target = Annotated[str, typer.Option("--target", help=_TARGET)]
Rules = Annotated[str, typer.Option("--rules", help="Equations, with commas between; without it, all.")]
Formats = Annotated[str, typer.Option("--formats", help=_FORMATS)]
Norms = Annotated[bool, typer.Option("--norms", help=_NORMS)]

EPILOG = "Example: fusedopt compile-kernels --target cuda:90 --formats bfloat16/8bit"


def compile_kernels(
    target: Target, rules: Rules = "", formats: Formats = "", norms: Norms = False, as_json: AsJson = False
) -> None:
    """Compiles the Triton kernels for devices, without one, into Triton's cache, so that no first step has to."""
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    if (reason := triton.missing()) is not None:
        fail(reason)
    if triton.is_interpreting():
        fail("TRITON_INTERPRET=1 is set, so kernels are interpreted and never compiled; unset it")
    ahead = importlib.import_module("fusedopt.triton_kernels.ahead")
    begin = time.perf_counter()
    try:
        names = listed(target)
        targets = [ahead.parse_target(name) for name in names]
        jobs = ahead.jobs(listed(rules) if rules else None, listed(formats) if formats else None, norms=norms)
    except ValueError as error:
        fail(str(error), error)
    for text, device in zip(names, targets):
        with ahead.on(device):
            for i, job in enumerate(jobs):
                console.print(f"{text}  {i + 1}/{len(jobs)}  {job.label}")
                job.compile()
    seconds = time.perf_counter() - begin
    console.print(f"{len(jobs) * len(targets)} kernels in {seconds:.0f} s")
    if as_json:
        print_json({"targets": names, "kernels": [job.label for job in jobs], "seconds": seconds})
