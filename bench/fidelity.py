"""`python bench/fidelity.py`: what formats of states and weights cost in fidelity, as tables.

- Tracking: how the second moment follows when the deviation of gradients drops tenfold, in all of a block or in half.
- Movement: how far 2,000 updates of 1e-5 move a bfloat16 weight, and what 1,000 steps of weight decay leave of one.
- Training: the final loss of the demo's GPT (examples/gpt.py), paired with that of the same seed in float32.

Results are appended to a file of JSON lines as they are found, and what it has already is not measured again. So runs
can be cut off, and those of two versions compared: measure each into a file of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Beside the demo, nothing of the repository: fusedopt is the installed package, whose sources have no compiled core.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from gpt import Config, Training
from rich.console import Console
from rich.table import Table

import fusedopt
from fusedopt.storage import quantization

Make = Callable[[list[dict[str, Any]], Config], torch.optim.Optimizer]
Measurement = tuple[str, Callable[[], float]]

ROWS = 1024  # of 64 elements: the means are over 2^16


def tracking(share: slice) -> float:
    """The root of the mean second moment over what it should be, 8,000 steps after the deviation of gradients has
    dropped from 1 to .1 in part of each block.
    """
    beta2, before, after = 0.999, 1000, 8000
    param = torch.nn.Parameter(torch.zeros(ROWS, 64))
    optimizer = fusedopt.AdamW([param], lr=0.0, betas=(0.9, beta2), state_dtype="8bit")
    generator = torch.Generator().manual_seed(0)
    for step in range(before + after):
        param.grad = torch.randn(ROWS, 64, generator=generator)
        if step >= before:
            param.grad[:, share] *= 0.1
        optimizer.step()
    held = optimizer.state[param]
    v = quantization.decode(held["exp_avg_sq_codes"], held["exp_avg_sq_scales"], is_signed=False)[:, share]
    expected = (1.0 - beta2**before) * beta2**after + 0.1**2 * (1.0 - beta2**after)
    return float((v.double().mean() / expected).sqrt())


def _mean_weight(param: torch.nn.Parameter, optimizer: Any) -> float:
    model = torch.nn.Module()
    model.weight = param
    return float(fusedopt.fp32_parameters(optimizer, model)["weight"].double().mean())


def movement(grad: float, **kwargs: Any) -> float:
    """The mean movement of a weight of 1 in 2,000 updates of 1e-5, over the exact one."""
    param = torch.nn.Parameter(torch.ones(ROWS, 64, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=1e-5, **kwargs)
    param.grad = torch.full_like(param, grad)
    for _ in range(2000):
        optimizer.step()
    return abs(_mean_weight(param, optimizer) - 1.0) / 0.02


def decay(**kwargs: Any) -> float:
    """What 1,000 steps of lr 1e-3 and weight decay .1 leave of a weight: exactly .9048."""
    param = torch.nn.Parameter(torch.ones(ROWS, 64, dtype=torch.bfloat16))
    optimizer = fusedopt.AdamW([param], lr=1e-3, weight_decay=0.1, **kwargs)
    param.grad = torch.zeros_like(param)
    for _ in range(1000):
        optimizer.step()
    return _mean_weight(param, optimizer)


BETAS = ((0.9, 0.95), (0.9, 0.999))
SPLIT24 = {"state_dtype": "8bit", "master_weights": "split24"}


def _adamw(betas: tuple[float, float], dtype: torch.dtype, kwargs: dict[str, Any]) -> Make:
    def make(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
        for group in groups:
            for param in group["params"]:
                param.data = param.data.to(dtype)
        return fusedopt.AdamW(groups, lr=config.lr, betas=betas, **kwargs)

    return make


def _lion(kwargs: dict[str, Any]) -> Make:
    return lambda groups, config: fusedopt.Lion(groups, lr=config.lr / 5, **kwargs)


def trainings() -> dict[str, dict[str, Make]]:
    """What is trained: the float32 run, called "", and the runs that are compared with it."""
    runs: dict[str, dict[str, Make]] = {}
    for betas in BETAS:
        runs[f"AdamW {betas}"] = {
            "": _adamw(betas, torch.float32, {}),
            "8bit": _adamw(betas, torch.float32, {"state_dtype": "8bit"}),
            "bf16 + split24 + 8bit": _adamw(betas, torch.bfloat16, SPLIT24),
        }
    runs["Lion"] = {"": _lion({}), "8bit": _lion({"state_dtype": "8bit"})}
    return runs


def final_loss(make: Make, config: Config) -> float:
    """The validation loss, with the full weights in float32: what is left is what the optimizer did."""
    training = Training(make, config)
    for _ in range(config.steps):
        training.step()
    weights = fusedopt.fp32_parameters(training.optimizer, training.model)
    training.model.float().load_state_dict(weights, strict=False)
    return float(training.validation_loss())


def measurements(config: Config, seeds: int) -> Iterator[Measurement]:
    """All that is measured, by name."""
    yield "tracking, whole block", lambda: tracking(slice(0, 64))
    yield "tracking, half block", lambda: tracking(slice(0, 32))
    for name, kwargs in {"stochastic": {"rounding": "stochastic"}, "split24": {"master_weights": "split24"}}.items():
        yield f"movement up, {name}", lambda kwargs=kwargs: movement(-1.0, **kwargs)
        yield f"movement down, {name}", lambda kwargs=kwargs: movement(1.0, **kwargs)
        yield f"decay, {name}", lambda kwargs=kwargs: decay(**kwargs)
    for seed in range(seeds):  # of all runs before the next, so that what is cut off is paired
        for optimizer, runs in trainings().items():
            for run, make in runs.items():
                name = "|".join((optimizer, run, str(seed)))
                yield name, lambda make=make, seed=seed: final_loss(make, replace(config, seed=seed))


def table_of(found: dict[str, float]) -> Table:
    """What has been measured so far."""
    table = Table("measured", "result")
    for name, value in found.items():
        if "|" not in name:
            table.add_row(name, f"{value:.4f}")
    for optimizer, runs in trainings().items():
        losses = {run: {} for run in runs}  # type: dict[str, dict[str, float]]
        for name, value in found.items():
            if name.startswith(optimizer + "|"):
                _, run, seed = name.split("|")
                losses[run][seed] = value
        for run in runs:
            paired = [losses[run][seed] - losses[""][seed] for seed in losses[run] if seed in losses[""]]
            if run and paired:
                mean, bias = statistics.fmean(map(abs, paired)), statistics.fmean(paired)
                table.add_row(
                    f"{optimizer}, {run}, {len(paired)} seeds", f"|difference of loss| {mean:.5f}, mean {bias:+.5f}"
                )
    return table


def main() -> None:
    """Measures what a file has not yet, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/fidelity.jsonl"), help="file of JSON lines")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=Config.width, help="of the model; the demo's is the default")
    parser.add_argument("--context", type=int, default=Config.context)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = Config.heads if arguments.width % Config.heads == 0 else 4
    config = replace(Config(), steps=arguments.steps, width=arguments.width, context=arguments.context, heads=heads)

    model = {"steps": config.steps, "width": config.width, "context": config.context}
    found: dict[str, float] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.out.exists():
        lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
        found = {line["name"]: line["value"] for line in lines if line["model"] == model}
    for name, measure in measurements(config, arguments.seeds):
        if name not in found:
            found[name] = measure()
            with arguments.out.open("a") as file:
                file.write(json.dumps({"name": name, "model": model, "value": found[name]}) + "\n")
    Console().print(table_of(found))


if __name__ == "__main__":
    main()
