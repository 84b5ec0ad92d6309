"""What gradient release saves and costs: `python -m bench.release`.

Peak memory is that of a process of its own for each run, as Linux counts it; times are interleaved in one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fusedopt

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, Config, batches, load_text

from .workloads import WORKLOADS

_CONFIG = Config(steps=1000, batch=1, context=128, width=768, depth=14, heads=12)
_FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16 split24 8bit": (torch.bfloat16, {"state_dtype": "8bit", "master_weights": "split24"}),
}


def _memory(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class _Run:
    """The demo's GPT with about 100 million parameters."""

    def __init__(self, released: bool, name: str, context: int) -> None:
        config = dataclasses.replace(_CONFIG, context=context)
        torch.manual_seed(0)
        dtype, options = _FORMATS[name]
        self.model = GPT(config).to(dtype)
        self.optimizer = fusedopt.AdamW(self.model.parameters(), lr=1e-4, **options)
        if released:
            fusedopt.release_gradients(self.optimizer)
        self.batches = batches(load_text()[0], config)

    def step(self) -> tuple[float, float]:
        """Trains on a batch; seconds of backward and step, and the loss."""
        x, y = next(self.batches)
        loss = self.model.loss(x, y)
        begin = time.perf_counter()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin, loss.item()


def _peak(released: bool, name: str) -> dict[str, float]:
    run = _Run(released, name, context=16)  # so that activations are few beside gradients
    losses = [run.step()[1]]
    _forget_peak()
    losses += [run.step()[1] for _ in range(2)]
    numel = sum(param.numel() for param in run.model.parameters())
    return {"peak": _memory("VmHWM"), "numel": numel, "loss": losses[-1]}


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.release", *arguments]
    # So that glibc gives back what is freed, and the peak is of what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _stored(released: bool) -> dict[str, float]:
    """W2 in bf16 with split24 and 8-bit states: bytes of all tensors that outlive a step or wait for it."""
    workload = WORKLOADS["W2"]
    _train([torch.nn.Parameter(torch.zeros(300, 300, dtype=torch.bfloat16))], released)  # loads what code there is
    base = _memory("VmRSS")
    params = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).fill_(0.02)) for shape in workload.shapes()]
    _train(params, released)
    return {"peak": _memory("VmHWM") - base, "numel": workload.numel}


def _train(params: list[torch.nn.Parameter], released: bool) -> None:
    optimizer = fusedopt.AdamW(params, **_FORMATS["bf16 split24 8bit"][1])
    if released:
        fusedopt.release_gradients(optimizer)
    for step in range(3):
        if step == 1:
            _forget_peak()
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=2)
    parser.add_argument("--stored", type=int)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(_peak(arguments.peak[0] == "1", arguments.peak[1])))
        return
    if arguments.stored is not None:
        print(json.dumps(_stored(bool(arguments.stored))))
        return
    for name, (dtype, _) in _FORMATS.items():
        usual, released = _child("--peak", "0", name), _child("--peak", "1", name)
        saved, gradients = usual["peak"] - released["peak"], usual["numel"] * dtype.itemsize
        print(
            f"{name}: {usual['numel'] / 1e6:.1f} M parameters, peak {usual['peak'] / 1e6:.0f} MB, with release "
            f"{released['peak'] / 1e6:.0f} MB: {saved / gradients:.1%} of the gradients' {gradients / 1e6:.0f} MB; "
            f"losses {usual['loss']!r} and {released['loss']!r}"
        )
    usual, released = _child("--stored", "0"), _child("--stored", "1")
    print(
        f"W2, bf16 with split24 and 8-bit states: {usual['peak'] / usual['numel']:.2f} bytes per parameter at the "
        f"peak, {released['peak'] / released['numel']:.2f} with release"
    )
    runs = {released: _Run(released, "fp32", context=128) for released in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(arguments.repeats + 1):
        for released, run in runs.items():
            taken, _ = run.step()
            if number > 0:
                seconds[released].append(taken)
    ratio = statistics.median(b / a for a, b in zip(seconds[False], seconds[True]))
    print(
        f"backward and step: {1e3 * statistics.median(seconds[False]):.0f} ms, with release "
        f"{1e3 * statistics.median(seconds[True]):.0f} ms, ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
