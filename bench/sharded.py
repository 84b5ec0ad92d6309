"""`python bench/sharded.py`: what a step of FSDP2's DTensors costs more than one of plain tensors, on one process.

Both are stepped in turns. That the arithmetic is the same is tested elsewhere; here it is the unwrapping that counts,
which is most of what there is with many small tensors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The repository comes last on the path: the sources of fusedopt there have no compiled core.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import fully_shard

import fusedopt
from bench.workloads import WORKLOADS

SHAPES = {"W2, 148 tensors": WORKLOADS["W2"].shapes(), "2,000 tensors of 256 x 244": ((256, 244),) * 2000}
OPTIONS = {"float32": {}, "8-bit state": {"state_dtype": "8bit"}}


def optimizer_of(shapes: Sequence[tuple[int, ...]], is_sharded: bool, options: dict) -> fusedopt.AdamW:
    """An optimizer that has taken a step, with gradients."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.held = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    if is_sharded:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    params = list(model.parameters())
    for param in params:
        param.grad = torch.ones_like(param) * 1e-3
    optimizer = fusedopt.AdamW(params, lr=1e-3, **options)
    optimizer.step()
    return optimizer


def measured(shapes: Sequence[tuple[int, ...]], options: dict, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a step of plain tensors and of DTensors, and the median of the rounds' ratios."""
    optimizers = [optimizer_of(shapes, is_sharded, options) for is_sharded in (False, True)]
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            begin = time.perf_counter()
            optimizers[which].step()
            times[which].append((time.perf_counter() - begin) * 1e3)
    ratio = statistics.median(sharded / plain for plain, sharded in zip(*times))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python bench/sharded.py")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    table = Table(caption=f"AdamW, {arguments.threads} threads, {arguments.rounds} rounds in turns, medians")
    for heading in ("tensors", "format", "plain ms", "FSDP2 ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("tensors", "format") else "right")
    for name, shapes in SHAPES.items():
        for kind, options in OPTIONS.items():
            plain, sharded, ratio = measured(shapes, options, arguments.rounds)
            table.add_row(name, kind, f"{plain:.1f}", f"{sharded:.1f}", f"{ratio:.3f}")
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
