"""Times optimizer steps on a GPU against torch's and copying memory, in turns; prints tables and appends JSON lines.

    python bench/gpu.py --out out/gpu

Needs no packages beside torch. What each contender of a case took is a line of results.jsonl as soon as the case ends,
and so is the error of one that failed. FUSEDOPT_GPU_DRY=1 runs it on the CPU with tiny tensors and kernels compiled for
the CPU (FUSEDOPT_EMULATED says where they are), to see that it works; its figures then mean nothing, and are not kept.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The installed package comes before the sources, which have no compiled core.
sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "bench")]
sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch.nn import Parameter  # noqa: E402

from bench.gpu_cases import CASES, MAX_GRAD_NORM, Case, Contender  # noqa: E402
from bench.gpu_record import Results  # noqa: E402
from bench.gpu_timing import (  # noqa: E402
    DEVICE,
    DRY,
    Copies,
    Step,
    device_is_broken,
    kernels_of,
    moved_bytes,
    quartiles,
    synchronize,
    timed,
    timed_on_the_wall,
)
from bench.gradients import in_a_bucket  # noqa: E402

# A case ends after this, so that a slow contender takes no time from the cases that follow.
CASE_SECONDS = 12.0
FEWEST_ROUNDS = 3
SAME_SIZE = 1e-3  # steps that move as many bytes but for this share are compared with one copy
INTERPRETED = ("1B float32",)  # cases of a dry run in which Triton's kernels step: it takes them a second


class DeviceLostError(RuntimeError):
    """The device answers no more in this process."""


@dataclass
class Entry:
    """A contender that takes turns in a case."""

    contender: Contender
    step: Step
    moved: int | None
    times: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(ms for ms, _ in self.times)


def params_of(case: Case) -> list[Parameter]:
    """Parameters, and gradients with a global norm of one half, which is below the norm that is clipped to."""
    shapes = case.tiny if DRY else case.shapes
    generator = torch.Generator(DEVICE).manual_seed(0)
    std = 0.5 / math.sqrt(sum(math.prod(shape) for shape in shapes))

    def numbers(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=case.dtype).mul_(scale)

    params, grads = [], []
    for shape in shapes:
        params.append(Parameter(numbers(shape, 0.02)))
        grads.append(numbers(shape, 0.0 if case.gradients == "zero" else std))
    if case.gradients == "bucket":
        grads = in_a_bucket(grads)
    for param, grad in zip(params, grads):
        param.grad = grad
    return params


class Measurement:
    """All contenders of a case step in turns, and copies of as many bytes take turns with them.

    Args:
        case: What is stepped.
        results: Where the lines go.
        without: Names of contenders that are known to fail.
    """

    def __init__(self, case: Case, results: Results, without: Iterable[str] = ()) -> None:
        self.case = case
        self.results = results
        self.lines: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.copies: dict[int, list[float]] = {}
        self.params: list[Parameter] = []
        self._without = set(without)

    def run(self, rounds: int, warmup: int) -> None:
        """Measures, and writes the lines. What was measured before an interrupt is written, too."""
        try:
            self.params = params_of(self.case)
            for contender in self.case.contenders:
                if contender.name not in self._without:
                    self._enter(contender)
            self._take_turns(rounds, warmup)
        except DeviceLostError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt
                self._finish(f"cut off: {type(error).__name__}")
                raise
            self._finish(traceback.format_exc())
            return
        self._finish()

    def _enter(self, contender: Contender) -> None:
        try:
            optimizer = contender.build(self.params)
            if DRY and contender.name.endswith("Triton") and self.case.name not in INTERPRETED:
                self._line(contender, unavailable="a dry run takes steps of Triton's kernels in one case")
                return
            step = self._step_of(contender, optimizer)
            step()
            synchronize()
            self.entries.append(Entry(contender, step, moved_bytes(contender, optimizer, self.params)))
        except ImportError as error:
            self._line(contender, unavailable=str(error))
        except Exception:
            self._failed(contender)

    def _step_of(self, contender: Contender, optimizer: torch.optim.Optimizer) -> Step:
        if not contender.clips:
            return optimizer.step

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM, foreach=True)
            optimizer.step()

        return step

    def _take_turns(self, rounds: int, warmup: int) -> None:
        for moved in sorted({entry.moved for entry in self.entries if entry.moved is not None}):
            if self._copied(moved) < moved * (1 - SAME_SIZE):
                self.copies[moved] = []
        copies = Copies(max(self.copies, default=0))
        order: list[Entry | int] = [*self.entries, *self.copies]
        begun = time.monotonic()
        for number in range(warmup + rounds):
            if number >= warmup + FEWEST_ROUNDS and time.monotonic() - begun > CASE_SECONDS:
                break
            for who in list(order):
                if isinstance(who, int):
                    ms, _ = timed(copies.of(who))
                    self.copies[who] += [ms] if number >= warmup else []
                    continue
                try:
                    found = timed_on_the_wall(who.step) if self.case.waits_for_host else timed(who.step)
                except Exception:
                    order.remove(who)
                    self.entries.remove(who)
                    self._failed(who.contender)
                    continue
                who.times += [found] if number >= warmup else []
            order = order[1:] + order[:1]  # sooner or later, each follows every other

    def _copied(self, moved: int) -> int:
        """The size of the copy that such a step is compared with; 0 if there is none yet."""
        return max((size for size in self.copies if size <= moved), default=0)

    def _failed(self, contender: Contender) -> None:
        """Its error is its result. One that took the device along has to be left out, and the case repeated."""
        self._line(contender, error=traceback.format_exc())
        gc.collect()
        if device_is_broken():
            raise DeviceLostError(contender.name)
        if not DRY:
            torch.cuda.empty_cache()

    def _finish(self, error: str | None = None) -> None:
        measured = [entry for entry in self.entries if entry.times]
        base = next((e for e in measured if e.contender is self.case.contenders[0]), None)
        for entry in measured:
            contender, moved = entry.contender, entry.moved
            copied = self.copies[self._copied(moved)] if moved is not None else []
            copy_ms = statistics.median(copied) if copied else None
            self._line(
                contender,
                ms=entry.ms,
                ms_quartiles=quartiles([ms for ms, _ in entry.times]),
                host_ms=statistics.median(host for _, host in entry.times),
                rounds=len(entry.times),
                moved_bytes=moved,
                copy_ms=copy_ms,
                copy_ms_quartiles=quartiles(copied) if copied else None,
                fraction_of_copy=copy_ms / entry.ms if copy_ms is not None else None,
                fraction_aimed_at=contender.fraction_aimed_at,
                speed_up=base.ms / entry.ms if base is not None else None,
                speed_up_aimed_at=contender.speed_up_aimed_at,
                launches=self._launches_of(entry) if self.case.counts_launches and error is None else None,
            )
        fields: dict[str, Any] = {"error": error} if error is not None else {"finite": self._is_finite()}
        self._add(
            "case",
            title=self.case.title,
            parameters=sum(param.numel() for param in self.params),
            timed_by="wall" if self.case.waits_for_host else "events",
            **fields,
        )

    def _launches_of(self, entry: Entry) -> int | None:
        try:
            return kernels_of(entry.step)
        except Exception:  # the profiler's; the figures are worth more
            return None

    def _is_finite(self) -> bool:
        return all(bool(param.isfinite().all()) for param in self.params)

    def _line(self, contender: Contender, **fields: Any) -> None:
        self._add("bench", step=contender.name, **fields)

    def _add(self, kind: str, **fields: Any) -> None:
        self.results.add(kind, case=self.case.name, **fields)
        self.lines.append({"kind": kind, **fields})

    @property
    def failures(self) -> int:
        return sum("error" in line or line.get("finite") is False for line in self.lines)


def render(case: Case, lines: list[dict[str, Any]]) -> str:
    """A measured case as plain text."""
    headings = ("step", "ms", "quartiles", "host ms", "B/param", "of copy", "aim", "speed-up", "aim", "kernels")
    summary = next(line for line in lines if line["kind"] == "case")
    table, notes = [headings], []
    for line in lines:
        if "ms" in line:
            low, high = line["ms_quartiles"]
            moved = line["moved_bytes"]
            table.append(
                (
                    line["step"],
                    f"{line['ms']:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{line['host_ms']:.3f}",
                    _or_nothing(None if moved is None else moved / summary["parameters"], "{:.2f}"),
                    _or_nothing(line["fraction_of_copy"], "{:.0%}"),
                    _or_nothing(line["fraction_aimed_at"], "{:.0%}"),
                    _or_nothing(line["speed_up"], "{:.2f}"),
                    _or_nothing(line["speed_up_aimed_at"], "{:g}"),
                    _or_nothing(line["launches"], "{}"),
                )
            )
        for what in ("unavailable", "error"):
            if what in line:
                notes.append(f"{what}: {line.get('step', 'the case')}: {line[what].strip().splitlines()[-1]}")
    if summary.get("finite") is False:
        notes.append("parameters are no longer finite: something is wrong with a step")
    widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
    text = [
        f"{case.name}: {case.title}, {summary['parameters']:,} parameters",
        *(
            "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
            for row in table
        ),
        f"speed-up to {case.contenders[0].name}; by {summary['timed_by']}; of a copy of as many bytes",
    ]
    return "\n".join(text + notes)


def _or_nothing(value: Any, how: str) -> str:
    return "" if value is None else how.format(value)


def emulate() -> None:
    """backend="cuda" and backend="triton" step CPU tensors."""
    os.environ["TRITON_INTERPRET"] = "1"  # nobody has imported triton yet
    sys.path.append(str(ROOT / "tests"))
    from emulated import EmulatedBackend

    from fusedopt import backends

    backends.BACKENDS["cuda"] = EmulatedBackend()


def main() -> int:
    """Runs the command line; 1 if a contender failed."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description="Times optimizer steps on a GPU.")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="what to step")
    parser.add_argument("--without", nargs="*", default=[], metavar="CASE/STEP", help="contenders to leave out")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for results.jsonl")
    arguments = parser.parse_args()
    if DRY:
        print("A dry run: tiny tensors on the CPU. The figures say nothing but that it runs.\n")
        emulate()
    elif not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: there is nothing to measure on")
    results = Results.of_environment(None if DRY else arguments.out / "results.jsonl")
    results.path.parent.mkdir(parents=True, exist_ok=True)
    left = [case for case in CASES if case.name in arguments.cases]
    failures = len(arguments.without)
    while left:
        case = left[0]
        without = [name.partition("/")[2] for name in arguments.without if name.partition("/")[0] == case.name]
        measurement = Measurement(case, results, without)
        try:
            measurement.run(arguments.rounds, arguments.warmup)
        except DeviceLostError as error:
            # Only a new process can go on: with the same case, without the one that broke it.
            known = [*arguments.without, f"{case.name}/{error}"]
            options = ["--rounds", str(arguments.rounds), "--warmup", str(arguments.warmup)]
            options += ["--out", str(arguments.out)]
            cases = [case.name for case in left]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, __file__, *options, "--cases", *cases, "--without", *known])
        print(render(case, measurement.lines), end="\n\n", flush=True)
        failures += measurement.failures
        del measurement, left[0]
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
