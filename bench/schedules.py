"""`python bench/schedules.py`: time of a scheduler step, against transformers' own, and of a million steps at once."""

from __future__ import annotations

import statistics
import timeit
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from fusedopt import schedules

STEPS = 10**6
KWARGS: dict[str, dict[str, Any]] = {
    "polynomial": {"power": 1.5},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": STEPS // 2, "decay_type": "1-sqrt"},
}


def scheduler(get: Any, name: str, *measured: float) -> Any:
    """A scheduler for an optimizer with one group, past its warmup; `measured` is passed to its rule."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    result = get(name, optimizer, 0, STEPS, KWARGS.get(name))
    optimizer.step()
    result.step(*measured)
    return result


def main() -> None:
    """Measures and prints a table."""
    try:
        from transformers import get_scheduler as theirs
    except ImportError:
        theirs = None
    table = Table("schedule", "step us", "transformers us", f"{STEPS:,} steps ms")
    for name, cls in schedules.names.training_schedules().items():
        contenders = [scheduler(get, name) for get in (fusedopt.get_scheduler, theirs) if get]
        times: list[list[float]] = [[] for _ in contenders]
        for _ in range(25):  # in turns, so that both have the same neighbours
            for seen, contender in zip(times, contenders):
                seen.append(timeit.timeit(contender.step, number=2_000) / 2_000 * 1e6)
        given = {"num_warmup_steps": 0, **KWARGS.get(name, {})} if cls is not schedules.Constant else {}
        schedule, steps = schedules.create_schedule(name, **given).resolve(STEPS), np.arange(STEPS)
        at_once = timeit.repeat(lambda s=schedule, n=steps: s(n, 0.1), number=1, repeat=9)
        row = [f"{statistics.median(seen):.2f}" for seen in times] + ([] if theirs else ["-"])
        table.add_row(name, *row, f"{statistics.median(at_once) * 1e3:.0f}")
    for rule in (schedules.Plateau(), schedules.Greedy(), schedules.GradientNorm(), schedules.GradientSparsity()):
        contender = scheduler(fusedopt.get_scheduler, rule.name, 0.5)
        seen = [timeit.timeit(lambda c=contender: c.step(0.5), number=2_000) / 2_000 * 1e6 for _ in range(25)]
        table.add_row(rule.name, f"{statistics.median(seen):.2f}", "-", "-")
    Console().print(table)


if __name__ == "__main__":
    main()
