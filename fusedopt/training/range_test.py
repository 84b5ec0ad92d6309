"""`range_test`: one short training while the learning rate rises, to see which rates train and which diverge."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from .. import checks
from ..engine.optimizer import FusedOptimizer
from .loops import Loop, Progress, Watch, check_loop, follow
from .recipe import Recipe, a_recipe
from .records import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST = 0.05  # of the losses, at the lowest rates: where the loss is before it moves
_NOISES = 6.0  # deviations that are no divergence yet


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        lrs: The learning rate of each step that the loop has yielded.
        losses: The loss of each of them.
        smoothed: Its exponential mean, as long as a tenth of the test.
        steepest: The rate at which the smoothed loss falls fastest per decade: to begin with. None if it never fell.
        lowest: The rate at which it is lowest. Nearly too high.
        diverged: The rate at which the test stopped because of divergence; None if it reached the end.
        recipe: The recipe.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float | None
    lowest: float | None
    diverged: float | None
    recipe: Recipe = field(repr=False)

    def __str__(self) -> str:
        if self.steepest is None or self.lowest is None:
            text = f"the loss never fell from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g}"
        else:
            text = f"lr {self.steepest:.2g}: there the loss falls fastest; it is lowest at {self.lowest:.2g}"
        return text + (f", and diverges at {self.diverged:.2g}" if self.diverged is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; numbers that are not finite are None."""
        return finite({**vars(self), "recipe": self.recipe.to_dict()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the loss over the learning rate.

        Args:
            ax: Axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .pictures import axes, finish

        ax = axes(ax)
        ax.semilogx(self.lrs, self.losses, color="#c5cad3", linewidth=1.2, label="loss of the step")
        ax.semilogx(self.lrs, self.smoothed, color="#1f5fd0", linewidth=2, label="smoothed")
        for rate, colour, text in (
            (self.steepest, "#12936f", "falls fastest"), (self.lowest, "#e8590c", "lowest"),
            (self.diverged, "#c92a2a", "diverged"),
        ):  # fmt: skip
            if rate is not None:
                ax.axvline(rate, color=colour, linewidth=1.5, linestyle="--", label=f"{text}: {rate:.2g}")
        seen = [loss for loss in self.smoothed if math.isfinite(loss)]
        low, high = min(seen), max(seen[: max(1, len(seen) * 9 // 10)])
        ax.set_ylim(low - 0.1 * (high - low or 1.0), high + 0.25 * (high - low or 1.0))
        return finish(ax, "learning rate", "loss")


def range_test(
    recipe: Recipe,
    train: Loop,
    *,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 100,
    seed: int | None = None,
    watch: Watch | None = None,
) -> RangeTest:
    """Trains once while the learning rate rises from step to step, and stops when the loss diverges.

    After Smith, "Cyclical learning rates for training neural networks" (arXiv:1506.01186, section 3.3), with a rate
    that rises by the same factor in each step. What is found is a place to begin a `search`, not its result: a rate
    that trains well for one step may not do so for ten thousand.

    It stops when the smoothed loss is further above where it began than it ever was below, or than 6 deviations of the
    losses at the beginning.

    Args:
        recipe: What is trained; its schedule and warmup are replaced.
        train: Called with (recipe, seed, steps), as `compare` calls it. It takes optimizer and scheduler from
            `recipe.build`.
        low: The first rate.
        high: The last one.
        steps: How many.
        seed: The recipe's by default.
        watch: Called with `Progress` after each step.

    Returns:
        Rates and losses, and what they say.

    Raises:
        ValueError: A number is out of range, or the loop does not step the recipe's scheduler.
        TypeError: Something is of the wrong type.
    """
    check_loop(train)
    a_recipe(recipe)
    checks.positive("low", low)
    if checks.positive("high", high) <= low:
        raise ValueError(f"high={high!r} is not above low={low!r}; pass a higher one")
    if checks.whole("steps", steps) < 20:
        raise ValueError(f"steps={steps!r} are too few to see anything; pass at least 20")
    losses: list[float] = []
    taken: list[int] = []  # steps that were taken before the one of each loss

    first = 1

    def rate(before: int) -> float:
        return low * (high / low) ** (before / (steps - 1))

    def tell(record: dict[str, Any]) -> None:
        nonlocal first
        if "loss" not in record:
            raise ValueError("the loop yields no 'loss', which a range test looks at; yield (step, loss)")
        if not taken:  # a loop may count its steps from 0
            first = min(1, record["step"])
        taken.append(record["step"] - first)
        expected = rate(taken[-1])
        if not math.isclose(record.get("lr", expected), expected, rel_tol=1e-6):
            raise ValueError(
                f"the loop trains with lr={record['lr']!r} at step {record['step']}, not {expected:.3g}; step the "
                "scheduler that recipe.build makes, and yield the rate that the step had"
            )
        losses.append(record["loss"])
        if watch is not None:
            watch(Progress(taken[-1] + 1, steps, "range test", record["loss"]))

    ramp = _ramp(recipe, low, high, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        chosen = recipe.seed if seed is None else checks.uint32("seed", seed)
        found = follow(
            train, ramp, chosen, steps, path, on_record=tell,
            stops_at=lambda *_: _has_diverged(losses, _expected(taken, steps)),
        )  # fmt: skip
    rates = list(map(rate, taken))
    smoothed = smooth(losses, _expected(taken, steps))
    steepest, lowest = _read(rates, smoothed)
    diverged = rates[-1] if found.status in ("diverged", "stopped early") else None
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), steepest, lowest, diverged, recipe)


def _expected(taken: Sequence[int], steps: int) -> int:
    """How many losses a loop yields in so many steps, by those that it has yielded."""
    if len(taken) < 2:
        return steps
    return round(steps * (len(taken) - 1) / (taken[-1] - taken[0]))


def smooth(losses: Sequence[float], count: int) -> list[float]:
    """The exponential mean of losses, as long as a tenth of their whole count, without the bias of its beginning."""
    beta = 1 - 10 / max(20, count)
    mean, weight, result = 0.0, 0.0, []
    for loss in losses:
        mean, weight = beta * mean + (1 - beta) * loss, beta * weight + (1 - beta)
        result.append(mean / weight)
    return result


def _has_diverged(losses: Sequence[float], count: int) -> bool:
    first = losses[: max(3, int(_FIRST * count))]
    if len(losses) <= len(first):
        return False
    smoothed = smooth(losses, count)
    start = statistics.fmean(first)
    allowed = max(start - min(smoothed), _NOISES * statistics.stdev(first), 1e-3 * abs(start))
    return smoothed[-1] - start > allowed


def _read(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float | None, float | None]:
    """Where the smoothed loss falls fastest, over a tenth of the steps, and where it is lowest."""
    seen = [value if math.isfinite(value) else math.inf for value in smoothed]
    lowest = seen.index(min(seen))
    span = max(2, len(seen) // 10)
    falls = {i: seen[i + span] - seen[i] for i in range(lowest - span + 1) if math.isfinite(seen[i + span])}
    if not falls or min(falls.values()) >= 0:
        return None, None
    at = min(falls, key=lambda i: falls[i])
    return rates[at + span // 2], rates[lowest]


def _ramp(recipe: Recipe, low: float, high: float, steps: int) -> Recipe:
    """A recipe whose scheduler rises by the same factor in each step."""

    class Ramp(Recipe):
        def build(self, model: nn.Module, total_steps: int | None = None) -> tuple[FusedOptimizer, LRScheduler]:
            optimizer, _ = super().build(model, steps)
            factor = (low / high) ** (1 / (steps - 1))
            # Counted from the end: the last step has the rate `high` itself. A loop may step once more.
            return optimizer, LambdaLR(optimizer, lambda step: factor ** max(0, steps - 1 - step))

    values = {**recipe.to_dict(), "lr": high, "schedule": {"name": "constant"}, "warmup": 0, "release_gradients": False}
    del values["version"]
    return Ramp(**values)
