"""What a search found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evaluate import Metric, aligned
from .recipe import Recipe
from .records import finite
from .search_space import Space

_SHOWN = 10  # trials of a table


@dataclass(frozen=True)
class SearchTrial:
    """One training of a search.

    Attributes:
        number: From 0, in the order in which they began.
        values: What varies, by field.
        status: "finished", "stopped early", "diverged", "out of memory", "no recipe" (the values do not go together),
            or "running", which is also what a kill leaves.
        value: Of the metric; of one that was stopped early, where it was. None if there is none.
        step: The last step.
        metrics: All metrics.
        reason: Why it did not finish.
    """

    number: int
    values: dict[str, Any]
    status: str
    value: float | None
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Search:
    """What `search` found.

    Attributes:
        base: The recipe that all else is from.
        space: What varies.
        metric: What is best.
        trials: All trials that began.
        total: How many there will be.
        budget: Steps of a training.
        seed: Of what was drawn and of all trainings.
        sampler: Its name.
        halving: ASHA's factor, or None.
        environment: What it was measured with.
        train: The loop as MODULE:FUNCTION, if it has such a name.
        folder: Where everything is.
    """

    base: Recipe
    space: Space
    metric: Metric
    trials: tuple[SearchTrial, ...]
    total: int
    budget: int
    seed: int
    sampler: str
    halving: int | None
    environment: dict[str, Any]
    train: str | None
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether all trials are done."""
        return sum(trial.status != "running" for trial in self.trials) == self.total

    @property
    def order(self) -> tuple[SearchTrial, ...]:
        """Trials that were trained to the end, the best first."""
        done = [trial for trial in self.trials if trial.status == "finished" and trial.value is not None]
        return tuple(sorted(done, key=lambda trial: (-self.metric.points(float(trial.value or 0.0)), trial.number)))

    @property
    def best(self) -> SearchTrial | None:
        """The best trial; None if none finished."""
        return self.order[0] if self.order else None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the best trial."""
        return None if self.best is None else self.recipe_of(self.best)

    def recipe_of(self, trial: SearchTrial) -> Recipe:
        """The recipe of a trial."""
        return self.space.recipe(self.base, trial.values)

    def recipes(self, count: int) -> dict[str, Recipe]:
        """The best recipes that differ, to `compare` them with several seeds.

        Args:
            count: How many at most.

        Returns:
            By name: "trial-7" and so on.
        """
        found: dict[str, Recipe] = {}
        for trial in self.order:
            recipe = self.recipe_of(trial)
            if len(found) < count and recipe not in found.values():
                found[f"trial-{trial.number}"] = recipe
        return found

    @property
    def command(self) -> str | None:
        """The command line that does the same again, from inside of the folder; None if the loop has no name."""
        return None if self.train is None else "fusedopt search search.yaml --folder again"

    @property
    def verdict(self) -> str:
        """A sentence or two."""
        counts: dict[str, int] = {}
        for trial in self.trials:
            counts[trial.status] = counts.get(trial.status, 0) + 1
        told = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none begun"
        text = f"{len(self.trials)} of {self.total} trials: {told}"
        if self.best is None:
            return f"{text}; none is trained to the end"
        text += f"; best: trial {self.best.number}"
        if self.is_finished:
            return f"{text}, by one seed: compare the best few with several, because the best of many was lucky, too"
        return text

    def rows(self) -> list[list[str]]:
        """A table to show: a row of headers, then trials, the best first."""
        rows = [["", *self.space, self.metric.name, "seconds", "memory_bytes"]]
        for trial in self.order[:_SHOWN]:
            seconds, memory = trial.metrics.get("seconds"), trial.metrics.get("memory_bytes")
            cells = [shown(trial.values.get(name)) for name in self.space]
            cells += [self.metric.shown(trial.value), Metric("s", unit="s").shown(seconds)]
            rows.append([f"trial {trial.number}", *cells, Metric("m", unit="B").shown(memory)])
        return rows

    def __str__(self) -> str:
        return "\n".join([*([aligned(self.rows())] if self.order else []), self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; numbers that are not finite are None."""
        values = {
            "best": None if self.best is None else self.best.number,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "verdict": self.verdict,
            "finished": self.is_finished,
            "total": self.total,
            "budget": self.budget,
            "seed": self.seed,
            "sampler": self.sampler,
            "halving": self.halving,
            "metric": self.metric.to_dict(),
            "space": self.space.to_dict(),
            "trials": [vars(trial) for trial in self.trials],
            "base": self.base.to_dict(),
            "environment": self.environment,
            "command": self.command,
        }
        return finite(values)


def shown(value: Any) -> str:
    """A value of a field, short."""
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
