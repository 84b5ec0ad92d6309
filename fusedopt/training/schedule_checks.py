"""Whether a schedule goes with the length of the training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..engine.optimizer import CLASSES
from ..schedules import Schedule, scheduler_names
from ..schedules.lengths import resolved
from .findings import Finding
from .recipe import Recipe

_POINTS = 2000  # of a curve that are looked at
_HELD = 0.9  # of the peak, above which a schedule counts as constant
_LITTLE = 0.2  # of the peak, at which a schedule that is to end should have arrived


def check_recipe_schedule(recipe: Recipe, steps: int | None) -> Iterator[Finding]:
    """Findings about a recipe's schedule and warmup."""
    if recipe.lr is None:
        if recipe.schedule["name"] != "constant":
            yield Finding(
                "error", "schedule.name", recipe.schedule["name"],
                "there is no lr to multiply: lr=None takes it from the step's number",
                "use the schedule 'constant', or give an lr",
            )  # fmt: skip
        return
    fine = True
    for finding in _warmup(recipe, steps):
        fine = fine and finding.severity != "error"
        yield finding
    if steps is None or steps < 1 or not fine:
        return
    try:
        schedule = recipe.schedule_value(steps)
    except (ValueError, TypeError) as error:
        yield Finding("error", "schedule", recipe.schedule, str(error), f"make its phases fit into {steps:,} steps")
        return
    if isinstance(schedule, Schedule):
        yield from check_schedule(schedule, steps, recipe.lr, "schedule", recipe.schedule, CLASSES[recipe.optimizer])


def _warmup(recipe: Recipe, steps: int | None) -> Iterator[Finding]:
    warmup = recipe.warmup
    if isinstance(warmup, float) and 1 < warmup < 2:
        yield Finding("warning", "warmup", warmup, f"is {warmup} steps, since ratios are below 1", "pass 0.05 or 0.1")
    if steps is None or recipe.schedule["name"] not in scheduler_names():
        return
    taken = resolved(warmup, steps)
    if taken >= steps > 0:
        yield Finding(
            "error", "warmup", warmup, f"is no shorter than the training of {steps:,} steps, so the peak is never held",
            "pass a ratio, such as 0.05",
        )  # fmt: skip
    elif taken > steps / 2:
        yield Finding(
            "warning", "warmup", warmup, f"is {taken / steps:.0%} of the training", "pass 0.05 to 0.1, the usual ratio"
        )


def check_schedule(
    schedule: Schedule, steps: int, lr: float, field: str, value: Any, optimizer: type[Any]
) -> Iterator[Finding]:
    """Findings about a schedule for a training of a known length, by an optimizer of that class."""
    curve = schedule.resolve(steps) if not schedule.is_resolved else schedule
    at = np.unique(np.linspace(0, steps - 1, min(steps, _POINTS)).astype(np.int64))
    multipliers = np.asarray(curve(at, lr), dtype=np.float64)
    peak = float(multipliers.max())
    if peak <= 0:
        yield Finding("error", field, value, "the learning rate is 0 in every step", "give it a peak above 0")
        return
    length = curve.length
    if length is not None and length > steps:
        reached = float(curve(steps - 1, lr))
        if reached > _LITTLE * peak:
            yield Finding(
                "warning", field, value,
                f"is {length:,} steps long and the training {steps:,}: it ends at {reached / peak:.0%} of the peak",
                f"make the schedule for {steps:,} steps",
            )  # fmt: skip
    idle = int(np.count_nonzero(multipliers[1:] == 0))  # the first step of a warmup is 0 by design
    if idle > max(1, 0.01 * len(multipliers)):
        yield Finding(
            "warning", field, value, f"the learning rate is 0 in {idle / len(multipliers):.0%} of the steps",
            f"make the schedule for {steps:,} steps, or train for fewer",
        )  # fmt: skip
    if getattr(optimizer, "replaces_schedules", False):
        lowest = float(multipliers[multipliers.argmax() :].min())
        if lowest < _HELD * peak:
            yield Finding(
                "warning", field, value,
                f"falls to {lowest / peak:.0%} of its peak, where {optimizer.__name__} averages weights: "
                "late steps only weigh less then",
                "use the schedule 'constant', and the optimizer's own warmup_steps",
            )  # fmt: skip
    if multipliers.min() < 0:
        yield Finding("error", field, value, "the learning rate becomes negative", "keep multipliers at 0 or above")
