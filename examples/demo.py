"""Train the same small GPT with torch's AdamW and with fusedopt's, and lay the curves over each other.

    python examples/demo.py [--steps N] [--out out]

Every run starts from the same weights and sees the same batches, so only the optimizer differs.
The runs take turns, one step each, so that a busy machine slows all of them alike.
Writes demo.png and demo.json; fails if the float32 curve strays from torch's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from gpt import Config, Training
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch.optim import Optimizer

import fusedopt

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

LIMIT = 2e-3  # largest loss difference allowed between torch and fusedopt, both in float32
LAST = 5  # logged steps that the training loss in the table is averaged over
Summary = dict[str, float]


@dataclass(frozen=True)
class Configuration:
    """An optimizer to train with, and its colour."""

    name: str
    colour: str
    make: Callable[[list[dict], Config], Optimizer]


TORCH = Configuration(
    "torch AdamW(fused=True)",
    "#c5cad3",
    lambda groups, c: torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, fused=True),
)
FP32 = Configuration(
    "fusedopt AdamW",
    "#1f5fd0",
    lambda groups, c: fusedopt.AdamW(groups, lr=c.lr, betas=c.betas),
)
EIGHT_BIT = Configuration(
    'fusedopt AdamW(state_dtype="8bit")',
    "#e8590c",
    lambda groups, c: fusedopt.AdamW(groups, lr=c.lr, betas=c.betas, state_dtype="8bit"),
)
CLIPPED = Configuration(
    "fusedopt AdamW(max_grad_norm=1.0)",
    "#12936f",
    lambda groups, c: fusedopt.AdamW(groups, lr=c.lr, betas=c.betas, max_grad_norm=1.0),
)
CONFIGURATIONS = (TORCH, FP32, EIGHT_BIT, CLIPPED)


def train_all(config: Config, console: Console) -> dict[str, Training]:
    """One run per configuration, each with its progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss [bold]{task.fields[loss]:.4f}[/]"),
        TextColumn("{task.fields[rate]:6,.0f} tokens/s"),
    )
    trainings = {c.name: Training(c.make, config) for c in CONFIGURATIONS}
    with Progress(*columns, console=console, expand=True) as progress:
        tasks = {name: progress.add_task(name, total=config.steps, loss=float("nan"), rate=0.0) for name in trainings}
        for step in range(1, config.steps + 1):
            for name, training in trainings.items():
                loss = training.step()
                rate = step * config.batch * config.context / training.seconds
                progress.update(tasks[name], completed=step, loss=loss, rate=rate)
    return trainings


def differences(training: Training, baseline: Training) -> list[float]:
    """Loss minus the baseline's, per logged step."""
    return [training.losses[step] - loss for step, loss in baseline.losses.items()]


def summarise(training: Training, baseline: Training) -> Summary:
    """The figures of one run's row."""
    return {
        "train_loss": statistics.fmean(list(training.losses.values())[-LAST:]),
        "validation_loss": training.validation_loss(),
        "optimizer_ms": statistics.median(training.optimizer_ms),
        "state_bytes_per_parameter": training.state_bytes() / training.parameters,
        # Not Python's max(), which passes over a NaN.
        "largest_difference": torch.tensor(differences(training, baseline)).abs().max().item(),
    }


def table(summaries: dict[str, Summary], config: Config, parameters: int) -> Table:
    """The summaries as a table."""
    out = Table(
        title=f"Byte-level GPT, {parameters:,} parameters, {config.steps} steps of "
        f"{config.batch} x {config.context} bytes, {torch.get_num_threads()} threads",
        caption="Losses in nats per byte, training over the last logged steps; ms: median of optimizer.step().\n"
        "Clipped gradients make a training of its own: its difference is no error.",
    )
    out.add_column("configuration", no_wrap=True)
    for header in ("training\nloss", "validation\nloss", "optimizer\nms/step", "state bytes/\nparameter"):
        out.add_column(header, justify="right")
    out.add_column("largest |loss\n- torch's|", justify="right")
    for configuration in CONFIGURATIONS:
        s = summaries[configuration.name]
        out.add_row(
            configuration.name if configuration is TORCH else f"[{configuration.colour}]{configuration.name}[/]",
            f"{s['train_loss']:.4f}",
            f"{s['validation_loss']:.4f}",
            f"{s['optimizer_ms']:.2f}",
            f"{s['state_bytes_per_parameter']:.2f}",
            "" if configuration is TORCH else f"{s['largest_difference']:.1e}",
        )
    return out


def plot(trainings: dict[str, Training], path: Path) -> None:
    """The curves over each other, and below them their differences from torch's."""
    plt.rcParams.update({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 8), sharex=True, height_ratios=(3, 2), layout="constrained")
    baseline = trainings[TORCH.name]
    steps, losses = list(baseline.losses), list(baseline.losses.values())
    top.plot(steps, losses, color=TORCH.colour, lw=9, solid_capstyle="round", label=TORCH.name)
    # Dashes that take turns along torch's broad band, so that every curve stays visible where all coincide.
    others, dash = CONFIGURATIONS[1:], 3.5
    for i, c in enumerate(others):
        pattern = (dash * (len(others) - i), (dash, dash * (len(others) - 1)))
        top.plot(steps, list(trainings[c.name].losses.values()), color=c.colour, lw=2.4, ls=pattern)
        delta = differences(trainings[c.name], baseline)
        remark = "a training of its own" if c is CLIPPED else f"off by up to {max(map(abs, delta)):.1e}"
        top.plot([], color=c.colour, lw=2.4, ls=(0, (dash, 2)), label=f"{c.name}: {remark}")
        bottom.plot(steps, delta, color=c.colour, lw=1.3, marker="o", ms=3.5)
    figure.suptitle(
        f"One GPT of {baseline.parameters / 1e6:.1f} M parameters, the same weights and batches, four optimizers",
        fontsize=14,
        fontweight="bold",
    )
    top.set_ylabel("training loss, nats per byte")
    top.legend(frameon=False, handlelength=4.5, labelspacing=0.7)
    bottom.axhspan(-LIMIT, LIMIT, color=FP32.colour, alpha=0.06, lw=0)
    corner = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "top"}
    bottom.annotate(
        f"±{LIMIT:g}, allowed in float32", (1, LIMIT), xytext=(-6, -4), color=FP32.colour, fontsize=9, **corner
    )
    bottom.set_yscale("symlog", linthresh=1e-6, linscale=0.6)
    bottom.set_yticks([-1e-2, -1e-4, -1e-6, 0, 1e-6, 1e-4, 1e-2])
    bottom.minorticks_off()
    bottom.set_ylabel("loss minus torch's")
    bottom.set_xlabel("step")
    bottom.margins(x=0.01)
    for axis in (top, bottom):
        axis.grid(alpha=0.25, lw=0.6)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=Config.steps, help="steps per configuration (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png and demo.json (%(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    start = time.perf_counter()
    config = Config(steps=args.steps)
    console = Console(width=None if sys.stdout.isatty() else 120)
    trainings = train_all(config, console)

    baseline = trainings[TORCH.name]
    summaries = {name: summarise(training, baseline) for name, training in trainings.items()}
    console.print(table(summaries, config, baseline.parameters))
    args.out.mkdir(parents=True, exist_ok=True)
    plot(trainings, args.out / "demo.png")
    figures = {
        "config": asdict(config),
        "parameters": baseline.parameters,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fusedopt": fusedopt.__version__},
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "logged_steps": list(baseline.losses),
        "runs": {
            name: {
                **summaries[name],
                "losses": list(training.losses.values()),
                "differences": differences(training, baseline),
            }
            for name, training in trainings.items()
        },
    }
    (args.out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"{figures['seconds']:.0f} s; wrote {args.out / 'demo.png'} and {args.out / 'demo.json'}")

    largest = summaries[FP32.name]["largest_difference"]
    if not largest <= LIMIT:  # NaN included
        sys.exit(f"The float32 losses of fusedopt and torch differ by {largest:.1e}, more than the {LIMIT:g} allowed.")
    console.print(f"The float32 curves agree to {largest:.1e} at every logged step; {LIMIT:g} is allowed.")


if __name__ == "__main__":
    main()
