"""`python bench/sharded.py`: what a step of FSDP2's DTensors costs more than one of plain tensors, on one process.

Both are stepped in turns. That the arithmetic is the same is tested elsewhere; here it is the unwrapping that counts,
which is most of what there is with many small tensors. With `--processes 2` it is what Adafactor's compiled passes save
over plain torch, sums over the ranks included.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
OPTIONS = {
    "float32": ("AdamW", {"lr": 1e-3}),
    "8-bit state": ("AdamW", {"lr": 1e-3, "state_dtype": "8bit"}),
    "Adafactor": ("Adafactor", {}),
}


def optimizer_of(shapes: Sequence[tuple[int, ...]], kind: str, is_sharded: bool, backend: str = "auto") -> Any:
    """An optimizer that has taken a step, with gradients."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.held = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    if is_sharded:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    params = list(model.parameters())
    for param in params:
        param.grad = torch.ones_like(param) * 1e-3
    name, options = OPTIONS[kind]
    optimizer = getattr(fusedopt, name)(params, backend=backend, **options)
    optimizer.step()
    return optimizer


def measured(optimizers: Sequence[Any], rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a step of either optimizer, and the median of the rounds' ratios."""
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            dist.barrier()
            begin = time.perf_counter()
            optimizers[which].step()
            times[which].append((time.perf_counter() - begin) * 1e3)
    ratio = statistics.median(second / first for first, second in zip(*times))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def on_one_process(rounds: int, threads: int) -> Table:
    table = Table(caption=f"{threads} threads, {rounds} rounds in turns, medians")
    for heading in ("tensors", "format", "plain ms", "FSDP2 ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("tensors", "format") else "right")
    for name, shapes in SHAPES.items():
        for kind in OPTIONS:
            optimizers = [optimizer_of(shapes, kind, is_sharded) for is_sharded in (False, True)]
            plain, sharded, ratio = measured(optimizers, rounds)
            table.add_row(name, kind, f"{plain:.1f}", f"{sharded:.1f}", f"{ratio:.3f}")
    return table


def _rank(rank: int, world: int, port: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    table = Table(caption=f"{world} processes of {threads} threads, {rounds} rounds in turns, medians")
    for heading in ("tensors", "plain torch ms", "compiled ms", "ratio"):
        table.add_column(heading, justify="left" if heading == "tensors" else "right")
    for name, shapes in SHAPES.items():
        optimizers = [optimizer_of(shapes, "Adafactor", True, backend) for backend in ("eager", "auto")]
        reference, compiled, ratio = measured(optimizers, rounds)
        table.add_row(name, f"{reference:.1f}", f"{compiled:.1f}", f"{ratio:.3f}")
    if rank == 0:
        Console().print(table)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python bench/sharded.py")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for both")
    parser.add_argument(
        "--processes", type=int, default=1, help="more than 1: Adafactor's compiled passes beside plain torch"
    )
    arguments = parser.parse_args()
    if arguments.processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        args = (arguments.processes, port, arguments.rounds, arguments.threads)
        torch.multiprocessing.spawn(_rank, args=args, nprocs=arguments.processes)
        return
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    Console().print(on_one_process(arguments.rounds, arguments.threads))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
