"""Schedules as values: evaluation, composition, lengths, JSON, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fusedopt import schedules
from fusedopt.schedules import (
    Constant,
    ConstantWithWarmup,
    Cosine,
    CosineWarmupWithMinLR,
    CosineWithMinLR,
    CosineWithRestarts,
    Decay,
    InverseSqrt,
    Linear,
    Polynomial,
    Schedule,
    Warmup,
    WarmupStableDecay,
    constant,
    create_schedule,
    decay,
    warmup,
)
from fusedopt.schedules.elementary import exp, half_wave, power

LR = 3e-4
EXAMPLES: list[Schedule] = [
    Constant(),
    Constant(20, 0.5),
    ConstantWithWarmup(30),
    Linear(10, 100),
    Cosine(0, 100),
    Cosine(10, 100, num_cycles=1.7),
    CosineWithRestarts(10, 100, num_cycles=3),
    Polynomial(10, 100, lr_end=1e-5, power=1.7),
    InverseSqrt(10),
    InverseSqrt(0, timescale=33.5),
    CosineWithMinLR(10, 100, min_lr=1e-5),
    CosineWithMinLR(10, 100, min_lr_rate=0.1),
    CosineWarmupWithMinLR(10, 100, min_lr_rate=0.1, warmup_lr_rate=0.2),
    CosineWarmupWithMinLR(10, 100, min_lr=1e-5),
    WarmupStableDecay(10, 40, 100, decay_type="1-sqrt", warmup_type="cosine", min_lr_ratio=0.1),
    *(Warmup(50, shape) for shape in ("linear", "exponential", "cosine", "1-sqrt")),
    *(Decay(shape, 50, 0.1) for shape in ("linear", "exponential", "cosine", "1-sqrt", "cosine_with_restarts")),
    Decay("polynomial", 50, power=2.5),
    warmup(20) >> constant(50) >> decay("1-sqrt", 30),
    constant(30, 0.1) >> warmup(20, "cosine"),
    warmup(10, end=0.3) >> constant(20) >> warmup(10) >> decay("exponential", 40, end=0.05),
    0.1 * Cosine(10, 100) * Polynomial(0, 50),
    Linear(10, 60) >> (warmup(5, start=0.0, end=0.5) >> decay("linear", 5)),
    (Linear(0, 30) * 0.5) >> constant(10),
]
IDS = [f"{i}-{schedule.name}" for i, schedule in enumerate(EXAMPLES)]
each_example = pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)


@each_example
def test_an_array_has_the_bits_of_the_numbers(schedule: Schedule) -> None:
    steps = np.concatenate([np.arange(150), [2**20, 2**40]])
    values = schedule(steps, LR)
    assert values.dtype == np.float64
    assert values.tolist() == [schedule(int(step), LR) for step in steps]
    assert all(type(schedule(int(step), LR)) is float for step in steps)
    shuffled = np.random.default_rng(0).permutation(steps).reshape(4, -1)
    assert (schedule(shuffled, LR) == values[np.argsort(steps)][np.searchsorted(steps, shuffled)]).all()
    assert schedule(np.int32(7), LR) == schedule(7, LR)
    assert schedule(steps[:0]).shape == (0,) if not schedule.needs_base_lr else True


def test_long_arrays_are_cut_without_a_seam() -> None:
    schedule = Cosine(1_000, 50_000)
    assert schedule(np.arange(60_000)).tolist() == [schedule(step) for step in range(60_000)]


def test_elementary_functions_are_accurate_and_equal_for_numbers_and_arrays() -> None:
    random = np.random.default_rng(0).random(20_000)
    x = 6 * random
    for values, exact in (
        (half_wave(x), [(1 + math.cos(math.pi * v)) / 2 for v in (x % 2).tolist()]),
        (power(random, 0.37), [v**0.37 for v in random.tolist()]),
        (power(random, 41.0), [v**41.0 for v in random.tolist()]),
        (exp(-x), [math.exp(-v) for v in x.tolist()]),
    ):
        # Two units in the last place of 1, of which math's cosine takes one by rounding its argument.
        assert np.abs(values - exact).max() <= 2**-51
    for function in (half_wave, exp, lambda v: power(v, 0.37)):
        inside = -random if function is exp else random
        assert function(inside).tolist() == [function(v) for v in inside.tolist()]
    steep = -np.linspace(0, 800, 3_000)  # through subnormal numbers to 0
    assert exp(steep).tolist() == [exp(v) for v in steep.tolist()]
    # Relatively, too, for as long as numbers are normal: small multipliers are as exact as large ones.
    tiny = -np.linspace(0, 700, 1_000)
    assert np.abs(exp(tiny) / [math.exp(v) for v in tiny.tolist()] - 1).max() <= 2**-51
    assert [half_wave(float(v)) for v in range(5)] == [1, 0, 1, 0, 1]


@each_example
def test_round_trip_equality_and_hash(schedule: Schedule) -> None:
    text = schedule.to_json()
    again = Schedule.from_json(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_json() == text
    assert json.loads(text)["name"] == schedule.name
    assert repr(again) == repr(schedule)
    steps = np.arange(120)
    assert (again(steps, LR) == schedule(steps, LR)).all()
    for copied in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert copied == schedule
        assert vars(copied).keys() == {field.name for field in dataclasses.fields(schedule)}
        assert (copied(steps, LR) == schedule(steps, LR)).all()


def test_different_schedules_are_not_equal() -> None:
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert Cosine(10, 100) != Cosine(10, 100, num_cycles=1)
    assert Cosine(10, 100) != Linear(10, 100)


def test_repr_reads_like_the_call() -> None:
    assert repr(Cosine(10, 100)) == "Cosine(num_warmup_steps=10, num_training_steps=100, num_cycles=0.5)"
    for schedule in EXAMPLES:
        if schedule.name != "product":
            assert eval(repr(schedule), vars(schedules)) == schedule


def test_composition_by_hand() -> None:
    schedule = warmup(4) >> constant(3) >> decay("linear", 4)
    assert schedule.length == 11
    assert [schedule(s) for s in range(14)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert (warmup(4) >> (constant(3) >> decay("linear", 4))) == schedule
    late = constant(2, 0.5) >> warmup(2)
    assert [late(s) for s in range(6)] == [0.5, 0.5, 0.5, 0.75, 1, 1]
    stages = warmup(2, end=0.5) >> constant(2) >> warmup(2)
    assert [stages(s) for s in range(8)] == [0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]
    sawtooth = decay("linear", 2, end=0.5) >> decay("linear", 2, start=1.0)
    assert [sawtooth(s) for s in range(5)] == [1, 0.75, 1, 0.5, 0]
    product = warmup(2) * decay("linear", 4) * 0.5
    assert [product(s) for s in range(5)] == [0, 0.1875, 0.25, 0.125, 0]
    assert product.length == 4
    assert (0.5 * Linear(0, 4))(1) == (Linear(0, 4) * 0.5)(1) == 0.375


def test_warmup_shapes_by_hand() -> None:
    middle = {shape: Warmup(2, shape)(1) for shape in ("linear", "cosine", "1-sqrt", "exponential")}
    assert middle["linear"] == 0.5
    # Rounded in other places than here.
    assert middle["cosine"] == pytest.approx(0.5, rel=1e-15)
    assert middle["1-sqrt"] == pytest.approx(1 - math.sqrt(0.5), rel=1e-15)
    assert middle["exponential"] == pytest.approx((1 - math.exp(-2.5)) / (1 - math.exp(-5)), rel=1e-15)
    for shape in middle:
        whole = Warmup(1_000, shape)
        values = whole(np.arange(1_200))
        assert values[0] == 0
        assert (np.diff(values[:1_001]) > 0).all()
        assert (values[1_000:] == 1).all()


def test_decay_shapes_by_hand() -> None:
    assert Decay("polynomial", 4, power=2)(2) == 0.25
    assert Decay("linear", 4, end=0.2, start=0.6)(1) == pytest.approx(0.5, rel=1e-15)  # 0.2 + 0.4 * 0.75, rounded
    assert Decay("exponential", 4)(1) == pytest.approx(1 - (1 - math.exp(-1.25)) / (1 - math.exp(-5)), rel=1e-15)
    assert Decay("cosine", 4, num_cycles=1)(2) == 0
    assert Decay("cosine", 4, num_cycles=1)(4) == 1
    for shape in ("linear", "exponential", "cosine", "1-sqrt"):
        values = Decay(shape, 1_000, 0.125)(np.arange(1_200))
        assert values[0] == 1
        assert (np.diff(values[:1_001]) < 0).all()
        assert (values[1_000:] == 0.125).all()


def test_lengths_are_steps_or_ratios_rounded_up() -> None:
    assert Cosine(0.07, 100) == Cosine(8, 100)  # 100 * 0.07 is 7.000000000000001, in transformers' warmup, too
    assert Cosine(0.1).resolve(95) == Cosine(10, 95)
    assert Cosine(0.0, 10) == Cosine(0, 10)
    assert Cosine(5.0, 10) == Cosine(np.int64(5), 10) == Cosine(5, 10)
    assert Cosine(0.1, 50).resolve(1_000) == Cosine(5, 50)  # its own total stays
    assert ConstantWithWarmup(0.25).resolve(10) == ConstantWithWarmup(3)
    assert InverseSqrt(0.25).resolve(10) == InverseSqrt(3)
    assert WarmupStableDecay(0.1, 0.25).resolve(50) == WarmupStableDecay(5, 13, 50)
    assert WarmupStableDecay(0.1, 0.2, num_stable_steps=0.5).resolve(50).length == 40
    assert not Cosine(0.1).is_resolved
    assert Cosine(0.1, 7).is_resolved


def test_ratios_of_a_composition() -> None:
    schedule = warmup(0.02) >> constant() >> decay("1-sqrt", 0.2)
    assert not schedule.is_resolved
    assert schedule.resolve(1_000) == warmup(20) >> constant(780) >> decay("1-sqrt", 200)
    assert schedule.resolve(1_000).resolve(2_000) == schedule.resolve(1_000)
    # Three ratios that fill the total exceed it by two when each is rounded up; it is 15 all the same.
    full = (warmup(0.1) >> constant(0.5) >> decay("linear", 0.4)).resolve(15)
    assert full == warmup(2) >> constant(8) >> decay("linear", 5)
    assert (warmup(10) >> Cosine(0.1, 50)).resolve(100).length == 60
    assert (warmup(0.5) * Linear()).resolve(8) == warmup(4) * Linear(0, 8)


def test_a_frozen_group_stays_frozen() -> None:
    """A group whose lr is 0 has no ratio to an absolute lr."""
    assert [Polynomial(2, 10)(s, 0.0) * 0.0 for s in range(12)] == [0.0] * 12
    assert CosineWithMinLR(0, 10, min_lr=1e-5)(10, 0.0) == 0


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: Cosine(-1, 10), ValueError, "num_warmup_steps=-1"),
    (lambda: Cosine(float("nan"), 10), ValueError, "num_warmup_steps=nan"),
    (lambda: Cosine("3", 10), TypeError, "num_warmup_steps='3'"),
    (lambda: Cosine(True, 10), TypeError, "num_warmup_steps=True"),
    (lambda: Cosine(0, 0.5), ValueError, "num_training_steps=0.5 .* pass 0, or 1 and more"),
    (lambda: Cosine(0, 10, num_cycles=-1), ValueError, "num_cycles=-1"),
    (lambda: Polynomial(0, 10, power=0), ValueError, "power=0"),
    (lambda: Polynomial(0, 10, lr_end=-1), ValueError, "lr_end=-1"),
    (lambda: Polynomial(0, 10, lr_end=1e-3)(0, 1e-3), ValueError, "lr_end=0.001 .* lr 0.001"),
    (lambda: Polynomial(0, 10)(0), ValueError, "pass base_lr"),
    (lambda: CosineWithMinLR(0, 10), ValueError, "min_lr=None and min_lr_rate=None are not"),
    (
        lambda: CosineWithMinLR(0, 10, min_lr=0.0, min_lr_rate=0.1),
        ValueError,
        "min_lr=0.0 and min_lr_rate=0.1 are both",
    ),
    (lambda: CosineWithMinLR(0, 10, min_lr_rate=1.1), ValueError, "min_lr_rate=1.1"),
    (lambda: CosineWithMinLR(0, 10, min_lr=0.1)(3, 0.01), ValueError, "min_lr=0.1 .* lr 0.01"),
    (lambda: CosineWarmupWithMinLR(0, 10, min_lr_rate=0, warmup_lr_rate=2), ValueError, "warmup_lr_rate=2"),
    (lambda: InverseSqrt(0, timescale=0), ValueError, "timescale=0"),
    (lambda: WarmupStableDecay(4, 7, 10), ValueError, "num_warmup_steps=4 and num_decay_steps=7"),
    (lambda: WarmupStableDecay(4, None, 10), ValueError, "num_decay_steps=None"),
    (lambda: WarmupStableDecay(4, 4, 10, warmup_type="exp"), ValueError, "warmup_type='exp'"),
    (lambda: WarmupStableDecay(4, 4, 10, decay_type="sqrt"), ValueError, "decay_type='sqrt'"),
    (lambda: WarmupStableDecay(4, 4, 10, min_lr_ratio=-0.1), ValueError, "min_lr_ratio=-0.1"),
    (lambda: warmup(10, "quadratic"), ValueError, "shape='quadratic'"),
    (lambda: warmup(10, end=0.5, start=0.6), ValueError, "start=0.6"),
    (lambda: warmup(10) >> warmup(10, end=0.5), ValueError, "end=0.5"),
    (lambda: decay("linear", 10, end=2.0)(0), ValueError, "end=2.0"),
    (lambda: decay("linear", 10, start=0.1, end=0.2), ValueError, "start=0.1"),
    (lambda: decay("linear", 10, num_cycles=2), ValueError, "num_cycles=2"),
    (lambda: decay("cosine", 10, power=2), ValueError, "power=2"),
    (lambda: decay("polynomial", 10), ValueError, "power"),
    (lambda: InverseSqrt(0) >> constant(), ValueError, "no end"),
    (lambda: constant() >> warmup(1) >> constant() >> constant(3), ValueError, "no end"),
    (lambda: (warmup(0.5) >> constant())(3), ValueError, r"resolve\(total\)"),
    (lambda: (warmup(5) >> constant() >> decay("linear", 6)).resolve(10), ValueError, "11 steps, more than total=10"),
    (lambda: Cosine().resolve(-1), ValueError, "total=-1"),
    (lambda: Linear(0, 10)(-1), ValueError, "step=-1"),
    (lambda: Linear(0, 10)(1.0), TypeError, "step=1.0"),
    (lambda: Linear(0, 10)(True), TypeError, "step=True"),
    (lambda: Linear(0, 10)(torch.arange(4)), TypeError, r"step=tensor\(.*is a Tensor; pass an int or a numpy array"),
    (lambda: schedules.get_scheduler(None, None, 5, 10), TypeError, "name=None is a NoneType; pass a name, a schedule"),
    (lambda: schedules.get_scheduler(len, None, 5, 10), TypeError, "is a builtin_function_or_method; pass a name"),
    (lambda: Schedule.from_json("linear"), ValueError, "text is not JSON .*; pass what to_json"),
    (lambda: Linear(0, 10).sketch(base_lr=math.nan), ValueError, "base_lr=nan is not finite"),
    (lambda: Linear(0, 10).sketch(base_lr=-1.0), ValueError, "base_lr=-1.0 is negative"),
    (lambda: Linear(0, 10)(np.arange(3) - 1), ValueError, "negative element -1"),
    (lambda: Linear(0, 10)(np.arange(3.0)), TypeError, "float64"),
    (lambda: create_schedule("cosin"), ValueError, "did you mean 'cosine'"),
    (lambda: create_schedule("cosine", num_cycels=1), TypeError, "did you mean 'num_cycles'"),
    (lambda: create_schedule("warmup_stable_decay", num_warmup_steps=1), ValueError, "num_decay_steps"),
    (lambda: Schedule.from_dict({"num_cycles": 1}), ValueError, "name"),
    (lambda: schedules.Sequence(()), TypeError, "parts"),
    (lambda: schedules.Sequence((3,)), TypeError, "parts has 3"),
    (lambda: schedules.Product((Linear(0, 1), 2)), TypeError, "factors has 2"),
    (lambda: Linear(0, 10) >> 3, TypeError, "unsupported operand"),
    (lambda: Linear(0, 10) * "3", TypeError, "unsupported operand|can't multiply"),
    (lambda: -1.0 * Linear(0, 10), ValueError, "value=-1.0"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_errors_are_sentences(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_every_schedule_is_among_the_examples_and_documented() -> None:
    assert {schedule.name for schedule in EXAMPLES} == set(schedules.schedule_names())
    for name in schedules.__all__:
        assert len(getattr(schedules, name).__doc__) > 40, name


def test_import_loads_nothing_that_few_need() -> None:
    code = "import sys, fusedopt; print(*{name.split('.')[0] for name in sys.modules})"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    heavy = {"matplotlib", "typer", "rich", "click", "transformers", "lightning", "pytorch_lightning", "accelerate"}
    assert not heavy & set(output.split())
