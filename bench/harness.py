"""Interleaved timing: all contenders of a workload take turns, and copying memory takes turns with them.

Frequencies, neighbours and caches of a machine drift, so a contender is compared with the baseline of the
same rounds, never with that of another minute. A step starts with the caches that another contender left
behind, as after a backward pass.

Contenders are measured in batches so that their states fit in memory, and every batch has its own baseline
and its own copy. All of them step the same parameters with the same gradients.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine
from .contenders import BASELINE, CONTENDERS, PEER, Contender, Running, UnavailableError, start
from .workloads import DTYPES, WORKLOADS

MAX_LIVE = 6  # optimizers with live state, the baseline included: 6 GB on W2 in float32

_PATIENCE = 20.0  # seconds to wait for a quiet machine before a batch

# Idle OpenMP threads spin for some milliseconds before they sleep. Contenders bring OpenMP runtimes of their
# own, and one's spinning threads would take the cores from the next.
_PAUSE = 0.01  # seconds before every step

_COPY = "copy"
_COPY_NUMEL = 2**27  # float32: 512 MiB, far more than caches hold


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: Timed steps of each contender in a process.
        warmup: Rounds before those, not counted.
        processes: Fresh processes that repeat everything; the median of their results is reported.
        peers: Whether other packages take part.
        only: Parts of names; contenders whose names have none of them stay out. If empty, all take part.
        first_step_limit: Seconds that a peer may take for its first step.
    """

    rounds: int = 15
    warmup: int = 3
    processes: int = 1
    peers: bool = True
    only: tuple[str, ...] = ()
    first_step_limit: float = 300.0


def measure(workload: str, dtype: str, settings: Settings) -> dict[str, Any]:
    """Measures a workload in fresh processes and takes the median of each figure.

    Returns:
        A case, as JSON keeps it: "rows", one per contender, and "unavailable", each with its reason. Times
        are in milliseconds; "ratios" holds the ratio to the baseline of every process, "cores_busy_elsewhere"
        how many cores other programs used in the worst batch.
    """
    runs = []
    for process in range(settings.processes):
        label = f"{workload} {dtype}, process {process + 1}/{settings.processes}"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            runs.append(pool.submit(measure_here, workload, dtype, settings, label).result())
    return _merge(runs)


def measure_here(workload_name: str, dtype: str, settings: Settings, label: str) -> dict[str, Any]:
    """Measures a workload once, in this process."""
    workload = WORKLOADS[workload_name]
    params = workload.params(DTYPES[dtype])
    source, target = torch.ones(_COPY_NUMEL), torch.zeros(_COPY_NUMEL)
    entered = [c for c in CONTENDERS if dtype in c.dtypes and workload_name in c.workloads]
    entered = [c for c in entered if settings.peers or c.family != PEER]
    if settings.only:
        entered = [c for c in entered if c is BASELINE or any(part in c.name for part in settings.only)]
    batches = list(_batches(entered))
    rows: list[dict[str, Any]] = []
    unavailable: list[dict[str, str]] = []
    others: list[float | None] = []

    with _progress() as progress:
        task = progress.add_task("", total=len(batches) * (settings.warmup + settings.rounds))
        for number, batch in enumerate(batches):
            where = f"{label}, batch {number + 1}/{len(batches)}"
            running: list[Running] = []
            for contender in batch:
                progress.update(task, description=f"{where}: first step of {contender.name}")
                progress.refresh()
                try:
                    running.append(start(contender, params, first_step_limit=settings.first_step_limit))
                except UnavailableError as error:
                    unavailable.append({"name": contender.name, "reason": str(error)})
            if number > 0 and len(running) == 1:  # the baseline alone, which has been measured
                progress.advance(task, settings.warmup + settings.rounds)
                continue
            progress.update(task, description=f"{where}: stepping")
            actions = {r.contender.name: r.step for r in running} | {_COPY: lambda: target.copy_(source)}
            machine.wait_until_quiet(_PATIENCE)
            load = machine.OtherLoad()
            times = _time_rounds(actions, settings, lambda: (progress.advance(task), progress.refresh()))
            others.append(load.cores())
            measured = _rows(running, times, workload.numel)
            rows += measured if number == 0 else [row for row in measured if row["name"] != BASELINE.name]
            del running, actions
            gc.collect()
    return {
        "workload": workload.name,
        "title": workload.title,
        "dtype": dtype,
        "tensors": workload.tensors,
        "parameters": workload.numel,
        "rows": rows,
        "unavailable": unavailable,
        "cores_busy_elsewhere": None if None in others else max(others),
    }


def _progress() -> Progress:
    # Refreshed explicitly between rounds: a refreshing thread would compete with the steps that are timed.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(),
        auto_refresh=False,
        transient=True,
    )


def _batches(entered: Sequence[Contender]) -> Iterator[list[Contender]]:
    """Runs of contenders, each led by the baseline; peers last, as importing one can change a process."""
    for is_peer in (False, True):
        family = [c for c in entered if c is not BASELINE and (c.family == PEER) == is_peer]
        for begin in range(0, len(family), MAX_LIVE - 1):
            yield [BASELINE, *family[begin : begin + MAX_LIVE - 1]]


def orders(count: int) -> Iterator[list[int]]:
    """Endless orders of turns in which each follows every other equally often.

    A Williams design: a zigzag 0, n-1, 1, n-2, ... shifted by one each round. With an odd count the zigzag is
    balanced only together with its mirror image, so every second turn around runs backwards.
    """
    zigzag = [i // 2 if i % 2 == 0 else count - 1 - i // 2 for i in range(count)]
    while True:
        for direction in (1, -1) if count % 2 else (1,):
            for shift in range(count):
                yield [(i + shift) % count for i in zigzag[::direction]]


def _time_rounds(
    actions: dict[str, Callable[[], object]], settings: Settings, after_round: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Seconds that each action took in each counted round."""
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would hit whoever happens to allocate
    try:
        for _, order in zip(range(settings.warmup + settings.rounds), orders(len(names))):
            for name in (names[i] for i in order):
                time.sleep(_PAUSE)
                started = time.perf_counter()
                actions[name]()
                times[name].append(time.perf_counter() - started)
            after_round()
    finally:
        gc.enable()
    return {name: np.array(seconds[settings.warmup :]) for name, seconds in times.items()}


def _rows(running: Sequence[Running], times: dict[str, np.ndarray], numel: int) -> list[dict[str, Any]]:
    baseline = float(np.median(times[BASELINE.name]))
    copy_bandwidth = 2 * 4 * _COPY_NUMEL / float(np.median(times[_COPY])) / 1e9  # bytes read and bytes written
    rows = []
    for r in running:
        low, median, high = (float(q) for q in np.percentile(times[r.contender.name], (25, 50, 75)))
        bandwidth = r.moved_bytes * numel / median / 1e9
        rows.append(
            {
                "name": r.contender.name,
                "family": r.contender.family,
                "ratio": median / baseline,
                "ms": median * 1e3,
                "ms_quartiles": [low * 1e3, high * 1e3],
                "baseline_ms": baseline * 1e3,
                "ns_per_parameter": median / numel * 1e9,
                "moved_bytes_per_parameter": r.moved_bytes,
                "state_bytes_per_parameter": r.state_bytes,
                "gb_per_s": bandwidth,
                "copy_gb_per_s": copy_bandwidth,
                "fraction_of_copy": bandwidth / copy_bandwidth,
                "first_step_s": r.first_step_seconds,
            }
        )
    return rows


def _merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges the same case from several processes into one: the median of every number."""
    rows = []
    for name in dict.fromkeys(row["name"] for run in runs for row in run["rows"]):
        same = [row for run in runs for row in run["rows"] if row["name"] == name]
        merged = {key: _median([row[key] for row in same]) for key in same[0]}
        rows.append({**merged, "ratios": [row["ratio"] for row in same]})
    unavailable = {entry["name"]: entry for run in runs for entry in run["unavailable"]}
    busy = [run["cores_busy_elsewhere"] for run in runs]
    return {
        **runs[0],
        "rows": rows,
        "unavailable": list(unavailable.values()),
        "cores_busy_elsewhere": None if None in busy else max(busy),
    }


def _median(values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return values[0]
    if isinstance(values[0], list):
        return [statistics.median(column) for column in zip(*values)]
    return statistics.median(values)
