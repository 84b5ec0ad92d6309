"""`Evaluator`: what is good about results that are measured in several ways, without mixing their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import checks

DIRECTIONS = ("minimize", "maximize")
Table = Mapping[str, Mapping[str, float]]  # candidate: {metric: value}


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    Args:
        name: What a training calls it, such as "eval_loss".
        direction: "minimize" or "maximize".
        scale: The difference that counts as one point, in the metric's unit: 0.01 of an accuracy that is worth as much
            as 0.05 of a loss, say. With `log`, the ratio that does, above 1.
        weight: What a point counts in the score. 0 for what is shown and belongs to the Pareto front only.
        log: Whether ratios matter instead of differences, as for times and sizes.
        unit: What numbers are shown with, such as "s" or "nats".

    Raises:
        ValueError: A direction is not known, or a scale or weight out of range.
        TypeError: Something is of the wrong type.
    """

    name: str
    direction: str = "minimize"
    scale: float | None = None
    weight: float = 1.0
    log: bool = False
    unit: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name={self.name!r} is no name; pass what the training calls the metric")
        checks.one_of("direction", self.direction, DIRECTIONS)
        checks.nonnegative("weight", self.weight)
        checks.flag("log", self.log)
        scale = (2.0 if self.log else 1.0) if self.scale is None else checks.positive("scale", self.scale)
        if self.log and scale <= 1:
            raise ValueError(f"scale={scale!r} is no ratio that counts with log=True; pass one above 1, such as 2")
        object.__setattr__(self, "scale", scale)

    def points(self, value: float) -> float:
        """Points, of which more are better: -inf for NaN, and for infinities on the wrong side."""
        sign = 1.0 if self.direction == "maximize" else -1.0
        if math.isnan(value):
            return -math.inf
        assert self.scale is not None  # filled in above
        if not self.log:
            return sign * value / self.scale
        if value <= 0:
            raise ValueError(f"{self.name}={value!r} has no logarithm; use log=False, or leave out what is not above 0")
        return sign * math.log(value) / math.log(self.scale)

    @property
    def worst(self) -> float:
        """What a training that failed has: infinity, on the bad side."""
        return math.inf if self.direction == "minimize" else -math.inf

    def shown(self, value: float | None) -> str:
        """A value with its unit."""
        if value is None:
            return "-"
        if self.unit == "B" and math.isfinite(value):
            return size(value)
        return f"{value:.4g} {self.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; `Metric(**values)` reads it back."""
        return asdict(self)


def size(value: float) -> str:
    """Bytes with the unit that suits them, as "1.23 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found.

    Attributes:
        metrics: The metrics.
        values: By candidate and metric.
        points: By candidate and metric; more are better, and only differences mean anything.
        scores: By candidate: the weighted sum of its points.
        ranks: By metric and candidate: 1 is best; those that are equal share the mean of their places.
        mean_ranks: By candidate: the weighted mean of its ranks.
        pareto: Candidates that no other beats in one metric without losing in another.
        order: Candidates, the best score first.
    """

    metrics: tuple[Metric, ...]
    values: dict[str, dict[str, float]]
    points: dict[str, dict[str, float]]
    scores: dict[str, float]
    ranks: dict[str, dict[str, float]]
    mean_ranks: dict[str, float]
    pareto: tuple[str, ...]
    order: tuple[str, ...]

    @property
    def best(self) -> str:
        """The candidate with the best score."""
        return self.order[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "best": self.best}

    def rows(self) -> list[list[str]]:
        """A table to show: a row of headers, and one for each candidate in order."""
        head = ["", *(f"{m.name} (rank)" for m in self.metrics), "score", "mean rank", "on the Pareto front"]
        rows = [head]
        for name in self.order:
            cells = [f"{m.shown(self.values[name][m.name])} ({self.ranks[m.name][name]:g})" for m in self.metrics]
            score, rank = f"{self.scores[name]:.4g}", f"{self.mean_ranks[name]:.3g}"
            rows.append([name, *cells, score, rank, "yes" if name in self.pareto else ""])
        return rows

    def __str__(self) -> str:
        return aligned(self.rows())


def aligned(rows: list[list[str]]) -> str:
    """Rows as text, in columns: the first one to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Evaluator:
    """Judges candidates by several metrics.

    A score adds points, not values: each metric says how large a difference counts as one point, so that a loss and an
    accuracy are never added as if they had one unit. Ranks and the Pareto front need no scales at all.

    Args:
        metrics: What is measured, with direction, scale and weight. A name alone is one to minimize. A single one need
            not be in a list.

    Raises:
        ValueError: There is no metric, none has a weight, or a name is there twice.
    """

    def __init__(self, metrics: Iterable[Metric | str] | Metric | str) -> None:
        if isinstance(metrics, (Metric, str)):  # a single one
            metrics = [metrics]
        self.metrics = tuple(Metric(metric) if isinstance(metric, str) else metric for metric in metrics)
        for metric in self.metrics:
            if not isinstance(metric, Metric):
                raise TypeError(f"metrics has {metric!r}, a {type(metric).__name__}; pass names or Metric")
        names = [metric.name for metric in self.metrics]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"metrics has {twice[0]!r} twice; keep one")
        if not any(metric.weight for metric in self.metrics):
            raise ValueError("metrics has none with a weight above 0, so nothing is better; give one a weight")

    @property
    def scored(self) -> tuple[Metric, ...]:
        """The metrics that have a weight."""
        return tuple(metric for metric in self.metrics if metric.weight)

    def score(self, values: Mapping[str, float]) -> float:
        """The weighted sum of points; more is better, and only differences mean anything.

        Args:
            values: By metric; those without a weight may be missing.

        Raises:
            ValueError: A metric with a weight is missing.
        """
        total = 0.0
        for metric in self.scored:
            total += metric.weight * metric.points(_found(metric, values, "values"))
        return total if not math.isnan(total) else -math.inf

    def evaluate(self, table: Table) -> Evaluation:
        """Judges candidates.

        Args:
            table: For each candidate the values by metric. NaN is the worst.

        Returns:
            Scores, ranks and the Pareto front.

        Raises:
            ValueError: There are none, or a value is missing.
        """
        if not table:
            raise ValueError("table={} has no candidates; pass at least one")
        values = {
            name: {metric.name: float(_found(metric, row, name)) for metric in self.metrics}
            for name, row in table.items()
        }
        points = {
            name: {metric.name: metric.points(row[metric.name]) for metric in self.metrics}
            for name, row in values.items()
        }
        scores = {name: self.score(row) for name, row in values.items()}
        ranks = {m.name: _ranks({name: row[m.name] for name, row in points.items()}) for m in self.metrics}
        weight = sum(metric.weight for metric in self.metrics)
        mean = {name: sum(m.weight * ranks[m.name][name] for m in self.metrics) / weight for name in table}
        front = tuple(name for name in table if not any(_beats(points[o], points[name]) for o in table))
        order = tuple(sorted(table, key=lambda name: (-scores[name], mean[name])))
        return Evaluation(self.metrics, values, points, scores, ranks, mean, front, order)


def _found(metric: Metric, values: Mapping[str, float], where: str) -> float:
    if metric.name not in values or values[metric.name] is None:
        there = ", ".join(map(repr, values)) or "nothing"
        raise ValueError(f"{where} has no {metric.name!r}, only {there}; measure it, or leave the metric out")
    return values[metric.name]


def _ranks(points: Mapping[str, float]) -> dict[str, float]:
    """1 for the most points; those that are equal share the mean of their places."""
    all_points = list(points.values())
    return {
        name: 1 + sum(other > value for other in all_points) + (all_points.count(value) - 1) / 2
        for name, value in points.items()
    }


def _beats(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return all(a[name] >= b[name] for name in b) and any(a[name] > b[name] for name in b)
