"""What a comparison found: the pick, how sure it is, and what it is told from."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, Evaluator, Metric, aligned
from .intervals import Interval, paired, t_bound
from .loops import MEASURED
from .recipe import Recipe
from .records import finite, read_json

_MOST_SEEDS = 1_000  # beyond which nobody would train


@dataclass(frozen=True)
class Trial:
    """One training of a comparison.

    Attributes:
        candidate: Its name.
        seed: Its seed.
        until: The step that it was trained to.
        status: "finished", "diverged" or "out of memory".
        step: Its last step.
        metrics: Values by name.
        reason: Why it did not finish.
    """

    candidate: str
    seed: int
    until: int
    status: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        recipes: The candidates by name.
        metrics: What was measured.
        rounds: For each round the step that it trains to, and the names that take part.
        seeds: The seeds, which all candidates have in common.
        level: The confidence of all intervals together.
        trials: All trainings.
        total: How many there will be; more than `trials` if it was stopped.
        environment: What it was measured with.
        train: The loop as MODULE:FUNCTION, if it has such a name.
        budget: Steps of a whole training.
        command: A command line that repeats it, if there is one.
        folder: Where everything is, run files included; None if nothing was kept.
    """

    recipes: dict[str, Recipe]
    metrics: tuple[Metric, ...]
    rounds: tuple[tuple[int, tuple[str, ...]], ...]
    seeds: tuple[int, ...]
    level: float
    trials: tuple[Trial, ...]
    total: int
    environment: dict[str, Any]
    train: str | None
    budget: int
    command: str | None = None
    folder: Path | None = None
    curves: dict[tuple[str, int], list[tuple[int, float]]] = field(default_factory=dict, repr=False)

    # ---- who won -----------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        """Whether all trainings are done."""
        return len(self.trials) == self.total

    @property
    def finalists(self) -> tuple[str, ...]:
        """Names of those that were trained with the whole budget."""
        return self.rounds[-1][1] if self.is_finished else ()

    @property
    def evaluation(self) -> Evaluation | None:
        """Means over seeds of the finalists that did not fail, judged; None if it was stopped before."""
        if not self.is_finished:
            return None
        well = [name for name in self.finalists if name not in self.failed] or self.finalists
        return evaluated(self.metrics, self._of(self.rounds[-1][0]), well)

    @property
    def failed(self) -> dict[str, str]:
        """Why candidates failed, with some seed."""
        return {t.candidate: f"{t.reason} (seed {t.seed})" for t in reversed(self.trials) if t.status != "finished"}

    @property
    def pick(self) -> str | None:
        """The name of the best candidate; None if it was stopped before, or all failed."""
        found = self.evaluation
        return None if found is None or found.best in self.failed else found.best

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the pick."""
        return None if self.pick is None else self.recipes[self.pick]

    @property
    def pairs(self) -> int:
        """How many pairs of candidates there are, of which any may turn out to be the one that is looked at."""
        return len(self.recipes) * (len(self.recipes) - 1) // 2

    def difference(self, other: str, metric: str | None = None) -> Interval | None:
        """How far another candidate is from the pick, over the seeds that both have.

        Both had the same seeds and so the same data, in the last round that both took part in. The level is corrected
        for the number of pairs (Bonferroni), so that all intervals hold together with `level`.

        Args:
            other: Its name.
            metric: The other's value minus the pick's; by default points of the score, the pick's minus the other's.

        Returns:
            The interval; None if there is no pick, or one of the two failed or did not measure it.

        Raises:
            ValueError: The name or the metric is not known.
        """
        if other not in self.recipes:
            raise ValueError(f"other={other!r} is no candidate; there are {', '.join(self.recipes)}")
        if metric is not None and metric not in [m.name for m in self.metrics]:
            raise ValueError(f"metric={metric!r} was not compared; there are {', '.join(m.name for m in self.metrics)}")
        if self.pick is None or other in self.failed or other == self.pick:
            return None
        until = max(until for until, names in self.rounds if other in names)
        mine, others = self._of(until)[self.pick], self._of(until)[other]
        score = Evaluator(self.metrics).score
        differences = []
        for seed in self.seeds:
            a, b = mine[seed].metrics, others[seed].metrics
            if metric is None:
                differences.append(score(a) - score(b))
            elif metric in a and metric in b:
                differences.append(b[metric] - a[metric])
        return paired(differences, 1 - (1 - self.level) / self.pairs) if differences else None

    @property
    def confidence(self) -> float | None:
        """The largest level at which the pick beats every other in its interval; None if chance cannot be judged."""
        found = [self.difference(name) for name in self.recipes if name != self.pick]
        values = [interval.p for interval in found if interval is not None]
        if self.pick is None or not values or any(p is None for p in values):
            return None
        return max(0.0, 1.0 - self.pairs * max(p for p in values if p is not None))

    @property
    def tied(self) -> tuple[str, ...]:
        """Candidates that cannot be told from the pick at this level."""
        found = {name: self.difference(name) for name in self.recipes}
        return tuple(name for name, each in found.items() if each is not None and not each.excludes_zero)

    def seeds_needed(self, other: str) -> int | None:
        """About how many seeds would tell another from the pick, if means and spread stay as they are.

        Args:
            other: Its name.

        Returns:
            A number; None if a thousand are not enough, or one seed tells no spread.
        """
        found = self.difference(other)
        if found is None or found.high is None or found.mean == 0:
            return None
        deviation = (found.high - found.mean) / t_bound(found.level, found.count - 1) * math.sqrt(found.count)

        def tells(count: int) -> bool:
            return t_bound(found.level, count - 1) * deviation / math.sqrt(count) < abs(found.mean)

        needed = bisect.bisect_left(range(2, _MOST_SEEDS + 1), True, key=tells) + 2
        return needed if needed <= _MOST_SEEDS else None

    # ---- telling -----------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """A sentence or two: the pick, and how sure it is."""
        if not self.is_finished:
            return f"stopped after {len(self.trials)} of {self.total} trainings; call it again to go on"
        if self.pick is None:
            return "no pick: " + "; ".join(f"{name}: {why}" for name, why in self.failed.items())
        text = f"pick: {self.pick}"
        others = [name for name in self.recipes if name not in self.failed and name != self.pick]
        if not others:
            return f"{text}, because all others failed"
        if len(self.seeds) < 2:
            return f"{text}, by one seed, which says nothing of chance; train with three at least"
        if not self.tied:
            return f"{text}, better than every other with a confidence of {percent(self.confidence or 0.0)}"
        told = []
        for name in self.tied:
            count = self.seeds_needed(name)
            told.append(f"{name} ({'more than a thousand' if count is None else f'about {count}'} seeds would)")
        return f"{text}, but {len(self.seeds)} seeds do not tell it from {', '.join(told)} at {percent(self.level)}"

    def rows(self) -> list[list[str]]:
        """A table to show: a row of headers, then candidates, the best first: means, and differences from the pick."""
        scored = [metric for metric in self.metrics if metric.weight]
        shown = [m for m in self.metrics if m.weight or any(m.name in trial.metrics for trial in self.trials)]
        head = ["", "steps", *(m.name for m in shown), *(f"{m.name} - pick's" for m in scored)]
        rows = [head]
        for until, names in reversed(self.rounds):
            of = self._of(until)
            rest = [name for name in names if not any(name == row[0] for row in rows)]
            done = [name for name in rest if len(of.get(name, {})) == len(self.seeds)]
            if not done:
                continue
            for name in evaluated(self.metrics, of, done).order:
                values = means(of[name].values())
                cells = [m.shown(values.get(m.name)) for m in shown]
                cells = ["failed" if "inf" in cell else cell for cell in cells]
                rows.append([name, f"{until:,}", *cells, *(self._difference_cell(name, m) for m in scored)])
        return rows

    def _difference_cell(self, name: str, metric: Metric) -> str:
        found = self.difference(name, metric.name)
        if found is None:
            return "" if name == self.pick else "-"
        if found.low is None or found.high is None:
            return f"{found.mean:+.4g}"
        return f"{found.mean:+.4g} [{found.low:+.3g}, {found.high:+.3g}]"

    def notes(self) -> list[str]:
        """What the numbers of the table mean."""
        lines = []
        if len(self.seeds) > 1:
            together = f" for all {self.pairs} pairs together" if self.pairs > 1 else ""
            how = " (Bonferroni)" if self.pairs > 1 else ""
            lines.append(
                f"Means over {len(self.seeds)} seeds. In brackets: paired t intervals over seeds, which hold{together} "
                f"with {percent(self.level)}{how}."
            )
        if len(self.rounds) > 1:
            rounds = ", ".join(f"{len(names)} to step {until:,}" for until, names in self.rounds)
            lines.append(f"Successive halving: {rounds}. Who left early is compared at the step where it left.")
        lines += [f"{name} failed: {why}." for name, why in self.failed.items()]
        if (found := self.evaluation) is not None and len(found.pareto) > 1:
            front = ", ".join(found.pareto)
            lines.append(f"Pareto front of {', '.join(metric.name for metric in found.metrics)}: {front}.")
        return lines

    def __str__(self) -> str:
        return "\n".join([aligned(self.rows()), *self.notes(), self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """Everything but curves as plain values; numbers that are not finite are None."""
        names = [name for name in self.recipes if name != self.pick]
        differences: dict[str, Any] = {}
        for name in names:
            each = {m.name: self.difference(name, m.name) for m in self.metrics}
            differences[name] = {key: found.to_dict() for key, found in each.items() if found is not None}
        evaluation = self.evaluation
        values = {
            "pick": self.pick,
            "confidence": self.confidence,
            "tied": self.tied,
            "verdict": self.verdict,
            "finished": self.is_finished,
            "budget": self.budget,
            "seeds": self.seeds,
            "level": self.level,
            "rounds": [{"until": until, "candidates": taking_part} for until, taking_part in self.rounds],
            "evaluation": None if evaluation is None else evaluation.to_dict(),
            "differences": differences,
            "failed": self.failed,
            "trials": [vars(trial) for trial in self.trials],
            "recipes": {name: recipe.to_dict() for name, recipe in self.recipes.items()},
            "environment": self.environment,
            "command": self.command,
        }
        return finite(values)

    def _of(self, until: int) -> dict[str, dict[int, Trial]]:
        found: dict[str, dict[int, Trial]] = {}
        for trial in self.trials:
            if trial.until == until:
                found.setdefault(trial.candidate, {})[trial.seed] = trial
        return found


def read_trial(path: Path, metrics: Sequence[Metric]) -> Trial:
    """A trial's file; what is scored is infinite, on the bad side, if it did not finish."""
    trial = Trial(**read_json(path))
    if trial.status != "finished":
        trial.metrics.update({metric.name: metric.worst for metric in metrics if metric.weight})
    return trial


def means(trials: Any) -> dict[str, float]:
    """Metrics that all trainings have, averaged over them."""
    trials = list(trials)
    names = [name for name in trials[0].metrics if all(name in trial.metrics for trial in trials)]
    return {name: statistics.fmean([trial.metrics[name] for trial in trials]) for name in names}


def evaluated(metrics: Sequence[Metric], trials: Mapping[str, Mapping[int, Trial]], names: Sequence[str]) -> Evaluation:
    """Means over seeds, judged; what is measured but not scored, and some lack, is left out."""
    table = {name: means(trials[name].values()) for name in names}
    there = [metric for metric in metrics if metric.weight or all(metric.name in row for row in table.values())]
    return Evaluator(there).evaluate(table)


def percent(level: float) -> str:
    """0.95 as "95 %"; never "100 %" for less."""
    return f"{math.floor(1e4 * level) / 100:g} %"


def with_measured(metrics: Sequence[Metric | str] | Metric | str) -> tuple[Metric, ...]:
    """Metrics, and those that are measured of every training."""
    given = Evaluator(metrics).metrics
    return (*given, *(metric for metric in MEASURED if metric.name not in [m.name for m in given]))
