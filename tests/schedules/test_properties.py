"""Properties of schedules for random parameters."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedopt.schedules import (
    Constant,
    ConstantWithWarmup,
    Cosine,
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    Decay,
    GradientNorm,
    GradientSparsity,
    Greedy,
    InverseSqrt,
    Linear,
    Plateau,
    Polynomial,
    Schedule,
    Warmup,
    WarmupStableDecay,
    create_schedule,
)

LR = 0.01
unit = st.floats(0, 1)
cycles = st.floats(0, 20)
steps = st.integers(0, 300) | st.floats(1, 300)
positive = st.floats(0.01, 50)
UP = st.sampled_from(["linear", "exponential", "cosine", "1-sqrt"])
SHAPE = st.sampled_from(["linear", "cosine", "1-sqrt"])


@st.composite
def lengths_within(draw: Any, parts: int = 1) -> tuple[list[float], float]:
    """Lengths of phases and a total that they fit into."""
    lengths = draw(st.lists(steps, min_size=parts, max_size=parts))
    return lengths, sum(lengths) + draw(steps)


@st.composite
def named(draw: Any) -> Schedule:
    (w, d), total = draw(lengths_within(2))
    low = draw(st.sampled_from([{"min_lr": draw(unit) * LR}, {"min_lr_rate": draw(unit)}]))
    start = draw(st.sampled_from([{}, {"warmup_lr_rate": draw(unit)}]))
    return draw(
        st.sampled_from(
            [
                Constant(),
                ConstantWithWarmup(w),
                Linear(w, total),
                Cosine(w, total, num_cycles=draw(cycles)),
                CosineWithRestarts(w, total, num_cycles=draw(cycles)),
                Polynomial(w, total, lr_end=draw(st.floats(0, 0.99)) * LR, power=draw(positive)),
                InverseSqrt(w, draw(st.none() | positive)),
                CosineWithMinLR(w, total, draw(cycles), **low),
                CosineWarmupWithMinLR(w, total, draw(cycles), **low, **start),
                WarmupStableDecay(w, d, total, None, draw(SHAPE), draw(SHAPE), draw(unit), draw(cycles)),
            ]
        )
    )


@st.composite
def composed(draw: Any) -> Schedule:
    """Phases that each begin where the one before ended."""
    top = draw(unit)
    rising = Warmup(draw(steps), draw(UP), top, draw(unit) * top)
    falling = Decay(draw(st.sampled_from(["linear", "exponential", "cosine", "1-sqrt"])), draw(steps), draw(unit) * top)
    return rising >> Constant(draw(steps)) >> falling


def values_of(schedule: Schedule) -> np.ndarray:
    return schedule(np.arange((schedule.length or 1_000) + 50), LR)


@given(named() | composed())
@settings(max_examples=300, deadline=None)
def test_multipliers_are_finite_and_between_0_and_1(schedule: Schedule) -> None:
    values = values_of(schedule)
    assert np.isfinite(values).all()
    # A composed level is rounded once more: start + (end - start) may be an ulp beyond the end.
    assert values.min() >= 0
    assert values.max() <= (1 + 2**-52 if schedule.name == "sequence" else 1)


@given(named() | composed())
@settings(max_examples=150, deadline=None)
def test_numbers_and_arrays_agree_and_round_trips_are_equal(schedule: Schedule) -> None:
    values = values_of(schedule)
    assert [schedule(s, LR) for s in range(len(values))] == values.tolist()
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert hash(again) == hash(schedule)


@given(named() | composed())
@settings(max_examples=150, deadline=None)
def test_the_end_holds(schedule: Schedule) -> None:
    if schedule.length is not None:
        values = schedule(np.array([0, 1, 10, 10**6]) + schedule.length, LR)
        assert (values == values[0]).all()


@given(composed())
@settings(max_examples=150, deadline=None)
def test_compositions_are_continuous(schedule: Schedule) -> None:
    """No step is larger than what the steepest shape covers in one, and phases meet."""
    rising, _, falling = schedule.parts
    jumps = np.abs(np.diff(values_of(schedule)))
    bounds = [0.0]
    for part, shape in ((rising, rising.shape), (falling, falling.shape)):
        if part.steps:
            q = 1 / part.steps
            # The first step of a root, or of an exponential, is its largest; a cosine's steepest slope is pi / 2.
            first = {
                "1-sqrt": q**0.5,
                "exponential": min(1.0, 5.04 * q),
                "cosine": min(1.0, np.pi / 2 * q),
                "linear": q,
            }
            bounds.append(first[shape])
    height = rising.end
    # A phase of no steps is a jump by definition; and rounding.
    if rising.steps and falling.steps:
        assert jumps.max() <= height * max(bounds) + 1e-15


@given(named())
@settings(max_examples=150, deadline=None)
def test_schedules_are_continuous_between_their_phases(schedule: Schedule) -> None:
    """Halving the step size of training about halves the largest jump of a smooth schedule."""
    if not isinstance(schedule, (Linear, Cosine, CosineWithMinLR)) or schedule.name == "cosine_warmup_with_min_lr":
        return
    w, total = schedule.num_warmup_steps, schedule.num_training_steps
    if w == 0 or total == w:
        return
    nc = getattr(schedule, "num_cycles", 0.5)
    steepest = max(1 / w, max(1.0, np.pi * nc) / (total - w))
    assert np.abs(np.diff(values_of(schedule))).max() <= steepest + 1e-15  # rounding


BOUNDS: dict[type, dict[str, tuple[float, float | None, bool, bool]]] = {
    # argument: lowest, highest, and whether each of them is allowed
    Cosine: {"num_cycles": (0, None, True, False)},
    CosineWithRestarts: {"num_cycles": (0, None, True, False)},
    Polynomial: {"power": (0, None, False, False), "lr_end": (0, None, True, False)},
    InverseSqrt: {"timescale": (0, None, False, False)},
    CosineWithMinLR: {"min_lr_rate": (0, 1, True, True), "num_cycles": (0, None, True, False)},
    CosineWarmupWithMinLR: {"warmup_lr_rate": (0, 1, True, True), "min_lr_rate": (0, 1, True, True)},
    WarmupStableDecay: {"min_lr_ratio": (0, 1, True, True), "num_cycles": (0, None, True, False)},
    Warmup: {"end": (0, None, True, False), "start": (0, 1, True, True)},
    Decay: {"end": (0, None, True, False), "start": (0, None, True, False)},
    Constant: {"value": (0, None, True, False)},
    Plateau: {
        "factor": (0, 1, False, False),
        "threshold": (0, None, True, False),
        "eps": (0, None, True, False),
        "min_lr": (0, None, True, False),
        "patience": (0, None, True, False),
        "cooldown": (0, None, True, False),
    },
    Greedy: {
        "factor": (0, 1, False, False),
        "window_size": (0, None, False, False),
        "warmup": (0, None, True, False),
        "reset_start": (0, None, True, False),
        "max_lr": (0, None, True, False),
    },
    GradientNorm: {
        "beta": (0, 1, True, False),
        "threshold": (1, None, False, False),
        "recovery": (0, 1, True, False),
        "min_scale": (0, 1, False, True),
    },
    GradientSparsity: {
        "beta": (0, 1, True, False),
        "reference": (0, 1, False, True),
        "min_scale": (0, 1, False, True),
        "max_scale": (1, None, True, False),
    },
}
NEEDED: dict[type, dict[str, Any]] = {
    CosineWithMinLR: {"min_lr_rate": 0.5},
    CosineWarmupWithMinLR: {"min_lr_rate": 0.5},
    WarmupStableDecay: {"num_warmup_steps": 3, "num_decay_steps": 3},
    Warmup: {"steps": 3},
    Decay: {"shape": "linear", "steps": 3},
}
WHOLE = ("patience", "cooldown", "warmup", "window_size", "reset_start")
ARGUMENTS = [(cls, name) for cls, names in BOUNDS.items() for name in names]


@pytest.mark.parametrize(("cls", "name"), ARGUMENTS, ids=[f"{cls.__name__}-{name}" for cls, name in ARGUMENTS])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_invalid_numbers_raise_and_name_the_argument(cls: type, name: str, data: Any) -> None:
    low, high, low_allowed, high_allowed = BOUNDS[cls][name]
    if name in WHOLE:
        outside = st.integers(max_value=low - 1)
    else:
        outside = st.floats(max_value=low, exclude_max=low_allowed) | st.just(float("nan")) | st.just(float("inf"))
        if high is not None:
            outside |= st.floats(min_value=high, exclude_min=high_allowed)
    value = data.draw(outside)
    with pytest.raises(ValueError, match=name):
        cls(**{**NEEDED.get(cls, {}), name: value})


norms = st.lists(st.floats(min_value=0, allow_nan=False) | st.just(float("nan")), max_size=50)


@given(norms, st.floats(0, 0.999), st.floats(1.001, 1e6), st.floats(0, 0.999), st.floats(0.001, 1))
@settings(max_examples=200, deadline=None)
def test_gradient_norms_of_any_size_keep_the_scale_in_its_bounds(
    values: list[float], beta: float, threshold: float, recovery: float, min_scale: float
) -> None:
    rule = GradientNorm(beta, threshold, recovery, min_scale)
    state = rule.start([LR])
    for value in values:
        rule.update(state, value, [LR])
        assert min_scale <= state["scale"] <= 1
        assert state["average"] is None or np.isfinite(state["average"])
        assert state["lrs"] == [LR * state["scale"]]


@given(st.lists(unit, max_size=50), st.floats(0, 0.999), st.floats(-1e3, 1e3), st.floats(0.001, 1), st.floats(1, 1e6))
@settings(max_examples=200, deadline=None)
def test_sparsities_of_any_size_keep_the_scale_in_its_bounds(
    values: list[float], beta: float, power: float, min_scale: float, max_scale: float
) -> None:
    rule = GradientSparsity(beta, power, None, min_scale, max_scale)
    state = rule.start([LR])
    for value in values:
        rule.update(state, value, [LR])
        assert min_scale <= state["scale"] <= max_scale


@given(st.lists(st.floats(), max_size=80), st.booleans(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_metrics_of_any_size_keep_the_lr_in_its_bounds(values: list[float], smooth: bool, patience: int) -> None:
    for rule in (Greedy(patience=patience, min_lr=LR / 10, max_lr=2 * LR, smooth=smooth, factor=0.5), Plateau("max")):
        state = rule.start([LR])
        for value in values:
            rule.update(state, value, [LR])
            assert 0 < state["lrs"][0] <= 2 * LR
            assert rule.name != "greedy" or state["lrs"][0] >= LR / 10


@given(st.floats() | st.integers())
@settings(max_examples=200, deadline=None)
def test_lengths_are_steps_or_ratios(value: float) -> None:
    if 0 <= value < float("inf"):
        kept = Cosine(value).num_warmup_steps
        assert kept == value
        assert isinstance(kept, int) == (value == int(value))
        assert Cosine(value).is_resolved is False
        assert (Cosine(value, 10).num_warmup_steps == value) == (kept >= 1 or kept == 0)
    else:
        with pytest.raises(ValueError, match="num_warmup_steps"):
            Cosine(value)


@given(st.lists(unit, min_size=1, max_size=5), st.integers(1, 10_000))
@settings(max_examples=200, deadline=None)
def test_ratios_of_no_more_than_the_total_fit_into_it(ratios: list[float], total: int) -> None:
    fractions = [r / (sum(ratios) + 1e-9) for r in ratios]
    sequence = list(itertools.accumulate((Constant(f) for f in fractions), lambda a, b: a >> b))[-1]
    resolved = sequence.resolve(total)
    assert (resolved.length or 0) <= total


def test_unknown_keywords_are_errors_of_every_schedule() -> None:
    for name in ("cosine", "warmup", "sequence", "product", "constant"):
        with pytest.raises(TypeError, match="nonsense=3"):
            create_schedule(name, nonsense=3)
