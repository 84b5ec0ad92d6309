"""Loops for tests of what trains: small, in plain Python, the same for the same seed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fusedopt


def valley(recipe: Any, seed: int, budget: int) -> Iterator[dict[str, float]]:
    """Descent into a noisy valley; the best lr is near 0.3, above 2 it diverges, and a seed moves all alike."""
    draw = random.Random(seed)
    offset, x = draw.gauss(0.0, 0.2), 3.0
    for step in range(1, budget + 1):
        x -= recipe.lr * (x + 0.05 * draw.gauss(0.0, 1.0))
        loss = offset + x * x + 1e-3 * draw.gauss(0.0, 1.0)
        yield {"step": step, "loss": loss if abs(x) < 1e6 else math.inf, "lr": recipe.lr, "grad_norm": abs(x)}


def plain(recipe: Any, seed: int, budget: int) -> Any:
    yield from ((step, recipe.lr / step) for step in range(1, budget + 1))


def saving(recipe: Any, seed: int, budget: int, folder: Path) -> Any:
    """Its learning rate is in the checkpoint, as an optimizer's is."""
    file = folder / "checkpoint.json"
    done, lr = json.loads(file.read_text()) if file.exists() else (0, recipe.lr)
    for step in range(done + 1, budget + 1):
        file.write_text(json.dumps([step, lr]))
        yield {"step": step, "loss": 1.0 / step, "lr": lr}
    return {"accuracy": 0.5}


def killed(function: Callable[..., Any], *args: Any, after: int, **kwargs: Any) -> None:
    """Calls a function with `watch` in another process, which kills itself (-9) at its `after`-th step."""

    def run() -> None:
        steps = 0

        def watch(_: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == after:
                os.kill(os.getpid(), signal.SIGKILL)

        function(*args, watch=watch, **kwargs)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def optimizer_of(**kwargs: Any) -> fusedopt.AdamW:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = fusedopt.AdamW(model.named_parameters(), **{"lr": 1e-3, **kwargs})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return optimizer
