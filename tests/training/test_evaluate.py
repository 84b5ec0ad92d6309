"""Evaluator: points, ranks and the Pareto front; Student's intervals."""

from __future__ import annotations

import math
import random

import pytest

from fusedopt.training import Evaluator, Metric
from fusedopt.training.evaluate import size
from fusedopt.training.intervals import paired, t_bound, t_inside, t_outside

LOSS = Metric("loss", scale=0.05, weight=2.0, unit="nats")
ACCURACY = Metric("accuracy", "maximize", scale=0.01)
SECONDS = Metric("seconds", log=True, weight=0.0, unit="s")
TABLE = {
    "a": {"loss": 1.00, "accuracy": 0.80, "seconds": 100.0},
    "b": {"loss": 0.90, "accuracy": 0.79, "seconds": 200.0},
    "c": {"loss": 1.10, "accuracy": 0.80, "seconds": 150.0},  # a is better or equal in everything
    "d": {"loss": 0.90, "accuracy": 0.70, "seconds": 50.0},
}


def test_a_score_counts_points_by_scale_and_weight() -> None:
    found = Evaluator([LOSS, ACCURACY, SECONDS]).evaluate(TABLE)
    # b against a: 0.1 of loss is two points with weight 2, 0.01 of accuracy one the other way.
    assert math.isclose(found.scores["b"] - found.scores["a"], 2 * 2 - 1)
    assert found.order == ("b", "a", "c", "d")
    # A ratio of two is a point where ratios count.
    assert math.isclose(found.points["a"]["seconds"] - found.points["b"]["seconds"], 1.0)


def test_a_single_metric_needs_no_list() -> None:
    assert [metric.name for metric in Evaluator("lr").metrics] == ["lr"]
    assert Evaluator(LOSS).metrics == (LOSS,)


def test_a_unit_is_no_argument() -> None:
    """Percent instead of fractions, with the scale in percent: the same score. The brief's (accuracy + 1 - loss) / 2
    would have called the one with the worse loss and 100 times the accuracy better."""
    percent = {name: {**row, "accuracy": 100 * row["accuracy"]} for name, row in TABLE.items()}
    one = Evaluator([LOSS, ACCURACY]).evaluate(TABLE)
    other = Evaluator([LOSS, Metric("accuracy", "maximize", scale=1.0)]).evaluate(percent)
    for name in TABLE:
        assert math.isclose(one.scores[name], other.scores[name])


def test_ranks_share_places_and_the_front_is_what_nobody_beats() -> None:
    found = Evaluator([LOSS, ACCURACY, SECONDS]).evaluate(TABLE)
    assert found.ranks["loss"] == {"a": 3, "b": 1.5, "c": 4, "d": 1.5}
    assert found.ranks["accuracy"] == {"a": 1.5, "b": 3, "c": 1.5, "d": 4}
    assert found.pareto == ("a", "b", "d")
    assert math.isclose(found.mean_ranks["a"], (2 * 3 + 1.5) / 3)
    assert str(found).splitlines()[1].startswith("b ")


def test_what_is_not_a_number_is_the_worst() -> None:
    found = Evaluator(["loss"]).evaluate({"nan": {"loss": math.nan}, "inf": {"loss": math.inf}, "ok": {"loss": 9.0}})
    assert found.best == "ok"
    assert found.pareto == ("ok",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metric("loss", "down"), "direction='down' is not known"),
        (lambda: Metric("loss", scale=0.0), "scale=0.0 is not positive"),
        (lambda: Metric("s", log=True, scale=1.0), "scale=1.0 is no ratio"),
        (lambda: Metric("loss", weight=-1), "weight=-1.0 is negative"),
        (lambda: Evaluator([]), "none with a weight"),
        (lambda: Evaluator(["loss", "loss"]), "'loss' twice"),
        (lambda: Evaluator(["loss"]).evaluate({}), "no candidates"),
        (lambda: Evaluator(["loss"]).evaluate({"a": {"accuracy": 1.0}}), "a has no 'loss', only 'accuracy'"),
        (lambda: Evaluator([SECONDS, "loss"]).evaluate({"a": {"seconds": 0.0, "loss": 1.0}}), "no logarithm"),
    ],
)
def test_errors_are_sentences(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Abramowitz and Stegun, table 26.10: t that is exceeded on either side with probability 1 - level.
@pytest.mark.parametrize(
    ("degrees", "level", "t"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571), (9, 0.95, 2.262),
        (30, 0.95, 2.042), (1, 0.5, 1.000), (2, 0.99, 9.925), (5, 0.99, 4.032), (10, 0.99, 3.169), (120, 0.95, 1.980),
    ],
)  # fmt: skip
def test_students_t_is_as_in_the_tables(degrees: int, level: float, t: float) -> None:
    assert round(t_bound(level, degrees), 3) == t
    assert math.isclose(t_inside(t_bound(level, degrees), degrees), level, rel_tol=1e-12)  # the bisection's last bits
    assert math.isclose(t_outside(t, degrees), 1 - level, rel_tol=1e-3)  # the table's t has four digits


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 2,000 samples of four; 95 % of them within four standard errors, sqrt(.05 .95 / 2000)."""
    draw = random.Random(0)
    hits = 0
    for _ in range(2_000):
        found = paired([draw.gauss(0.3, 1.0) for _ in range(4)], 0.95)
        hits += found.low < 0.3 < found.high
    assert abs(hits / 2_000 - 0.95) < 4 * math.sqrt(0.05 * 0.95 / 2_000)


def test_one_pair_says_nothing_of_chance_and_equal_ones_say_all() -> None:
    one = paired([0.5], 0.95)
    assert (one.mean, one.low, one.p, one.excludes_zero) == (0.5, None, None, False)
    same = paired([0.5, 0.5, 0.5], 0.95)
    assert (same.low, same.high, same.p, same.excludes_zero) == (0.5, 0.5, 0.0, True)
    assert paired([0.0, 0.0], 0.95).p == 1.0


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (-1536, "-1.5 KiB"),
        (999.7 * 2**20, "1000 MiB"),
        (1023 * 2**20, "1023 MiB"),
        (2**30, "1.00 GiB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(value: float, told: str) -> None:
    assert size(value) == told
