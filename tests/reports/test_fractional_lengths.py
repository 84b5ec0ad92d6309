"""Lengths of schedules that are not whole, as 0.06 * len(loader) * epochs makes them.

Public reports: Nerogar/OneTrainer#559 (a warmup as a float), deepset-ai/FARM#46 (a total that was rounded the wrong
way).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusedopt import get_scheduler, schedules
from fusedopt.schedules import (
    ConstantWithWarmup,
    Cosine,
    CosineWarmupWithMinLR,
    CosineWithRestarts,
    Linear,
    Plateau,
    Schedule,
    WarmupStableDecay,
    constant,
    decay,
    warmup,
)

optimization = pytest.importorskip("transformers.optimization")

TOLERANCE = 1e-12  # as in tests/schedules/test_transformers.py: the order of roundings differs
LR = 0.03
SHAPES = ("linear", "cosine", "1-sqrt")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "constant_with_warmup": [{}],
    "linear": [{}],
    "cosine": [{"num_cycles": n} for n in (0.5, 0.75, 7)],
    "cosine_with_restarts": [{"num_cycles": n} for n in (1, 2.5, 7, 49)],
    "polynomial": [{"power": p, "lr_end": e} for p in (0.5, 1.0, 2.7) for e in (0.0, 0.01)],
    "inverse_sqrt": [{}, {"timescale": 33.3}],
    "cosine_with_min_lr": [{"min_lr": 0.003}, {"min_lr_rate": 0.3, "num_cycles": 1.25}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.3}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.4}],
    "warmup_stable_decay": [
        {"num_decay_steps": d, "warmup_type": up, "decay_type": down, "min_lr_ratio": 0.1}
        for d, up, down in itertools.product((5, 12.7), SHAPES, SHAPES)
    ],
}
WARMUPS = (20.34, 1.5, 2.0, np.float64(7.77), np.float32(3.3), 0.06 * 339)
TOTALS = (40, 339, 49.0, 339.4)


def make_optimizer(lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr)


def lrs_of(scheduler: Any, steps: int) -> np.ndarray:
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(seen)


def both(name: str, w: Any, total: Any, steps: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    ours = get_scheduler(name, make_optimizer(), w, total, kwargs)
    # As a float, because theirs would compute in the float32 of a numpy number.
    theirs = optimization.get_scheduler(name, make_optimizer(), float(w), total, kwargs)
    return lrs_of(ours, steps), lrs_of(theirs, steps)


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_transformers_up_to_the_end(name: str) -> None:
    for kwargs, w, total in itertools.product(SETTINGS[name], WARMUPS, TOTALS):
        if kwargs.get("decay_type") == "1-sqrt" and isinstance(kwargs["num_decay_steps"], int) and total == int(total):
            continue  # the next test
        ours, theirs = both(name, w, total, int(total) + 1, **kwargs)
        if name == "cosine_warmup_with_min_lr":  # which has arrived at T - 1, and whose last step of the warmup differs
            keep = [step for step in range(int(total)) if step != int(w) or w == int(w)]
            ours, theirs = ours[keep], theirs[keep]
        assert np.abs(ours - theirs).max() <= TOLERANCE * LR, (w, total, kwargs)


def test_a_decay_that_begins_at_a_step_begins_at_the_lr() -> None:
    """To transformers the first step is 4e-15 of one before its beginning, and it takes the root of that."""
    kwargs = {"num_decay_steps": 5, "decay_type": "1-sqrt"}
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        both("warmup_stable_decay", 7.77, 40, 41, **kwargs)
    ours = lrs_of(get_scheduler("warmup_stable_decay", make_optimizer(), 7.77, 40, kwargs), 41)
    expected = np.array([1.0 - (k / 5) ** 0.5 for k in range(6)])
    # The root of what the beginning is rounded by, of up to an ulp of 35, is 4e-8.
    assert np.abs(ours[35:] / LR - expected).max() <= 5e-8


def test_a_warmup_that_is_one_step_ahead_does_not_pass_the_lr() -> None:
    """The one step in which ours deviates: transformers' formula of the warmup ends above 1 there."""
    for kwargs in SETTINGS["cosine_warmup_with_min_lr"]:
        ours, theirs = both("cosine_warmup_with_min_lr", 20.34, 339, 40, **kwargs)
        assert theirs[20] > 1.02 * LR
        assert ours.max() <= LR
        assert theirs[19] < LR
        assert theirs[21] < ours[20] < LR


def test_steps_by_hand() -> None:
    w, total = 20.34, 339
    schedule = Linear(w, total)
    for step in (0, 1, 20):
        assert schedule(step) == step / w
    for step in (21, 200, 338):
        assert schedule(step) == pytest.approx((total - step) / (total - w), rel=1e-13)  # k = step - w is rounded
    assert schedule(339) == schedule(400) == 0
    assert schedule.length == 339
    assert ConstantWithWarmup(w)(20) < ConstantWithWarmup(w)(21) == 1
    assert CosineWithRestarts(w, total, 7)(339) == 0


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "gradient_norm"])
def test_a_rule_is_warmed_up(name: str) -> None:
    scheduler = get_scheduler(name, make_optimizer(1.0), 2.5)
    seen = [scheduler.get_last_lr()[0]]
    for _ in range(4):
        scheduler.optimizer.step()
        scheduler.step(1.0)
        seen.append(scheduler.get_last_lr()[0])
    assert seen == [0, 1 / 2.5, 2 / 2.5, 1, 1]


def test_compositions() -> None:
    schedule = warmup(20.34) >> constant() >> decay("linear", 50.85)
    resolved = schedule.resolve(339)
    assert resolved.parts[1].steps == pytest.approx(339 - 20.34 - 50.85)
    theirs = optimization.get_scheduler(
        "warmup_stable_decay", make_optimizer(), 20.34, 339, {"num_decay_steps": 50.85, "decay_type": "linear"}
    )
    ours = get_scheduler(schedule, make_optimizer(), None, 339)
    assert np.abs(lrs_of(ours, 340) - lrs_of(theirs, 340)).max() <= TOLERANCE * LR
    # Parts of a total that fill it leave nothing, whatever the rounding.
    for part in np.linspace(0.01, 0.99, 197):
        filled = (warmup(1 + part * 337) >> constant() >> decay("linear", 1 + (1 - part) * 337)).resolve(339)
        assert filled.parts[1].steps == 0
        assert WarmupStableDecay(1 + part * 337, 1 + (1 - part) * 337, 339)(339) <= 1e-15
    with pytest.raises(ValueError, match=r"the phases take 340\.5 steps, more than total=340\.4"):
        (warmup(20.5) >> decay("linear", 320)).resolve(340.4)
    with pytest.raises(ValueError, match=r"num_warmup_steps=20\.34 and num_decay_steps=319 together exceed"):
        WarmupStableDecay(20.34, 319, 339)
    assert (warmup(0.06) >> decay("linear", 0.94)).resolve(339.4).length <= 340
    # A product inside of a sequence is evaluated at steps that are not whole.
    product = warmup(2.5) >> 0.5 * Linear(0, 10.25)
    assert product(3) == 0.5 * (10.25 - 0.5) / 10.25
    assert product(np.arange(20)).tolist() == [product(step) for step in range(20)]


def test_no_warning_of_a_total_that_is_met() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stable in (None, 339 - 20.34 - 50.85):
            kwargs = {"num_decay_steps": 50.85, "num_stable_steps": stable}
            get_scheduler("warmup_stable_decay", make_optimizer(), 20.34, 339, kwargs)
    kwargs = {"num_decay_steps": 50.85, "num_stable_steps": 100}
    with pytest.warns(UserWarning, match=r"makes the schedule 171\.19 steps long and num_training_steps is 339"):
        get_scheduler("warmup_stable_decay", make_optimizer(), 20.34, 339, kwargs)


EXAMPLES: dict[str, Callable[[], Schedule]] = {
    "cosine": lambda: Cosine(20.34, 339.4),
    "phases": lambda: WarmupStableDecay(20.34, 50.85, 339),
    "ahead": lambda: CosineWarmupWithMinLR(20.34, 339, min_lr_rate=0.1),
    "sequence": lambda: warmup(20.34, "1-sqrt") >> constant(7.5) >> decay("cosine", 50.85),
    "product": lambda: warmup(20.34) * Linear(0, 339),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_values_are_written_read_and_drawn(example: str, tmp_path: Any) -> None:
    schedule = EXAMPLES[example]()
    assert "20.34" in repr(schedule)
    assert eval(repr(schedule), dict(vars(schedules))) == schedule
    assert Schedule.from_json(json.dumps(schedule.to_dict())) == schedule == Schedule.from_json(schedule.to_json())
    assert isinstance(schedule.length, int)
    assert schedule(np.arange(400)).tolist() == [schedule(step) for step in range(400)]
    assert f"{schedule.length} steps" in schedule.sketch()
    pytest.importorskip("matplotlib").use("agg")
    line = schedule.plot().get_lines()[0]
    assert line.get_xdata()[-1] == schedule.length
    # resumed within the warmup and after it
    for begun in (20, 21, 60):
        whole = get_scheduler(schedule, make_optimizer())
        lrs_of(whole, begun)
        torch.save(whole.state_dict(), tmp_path / "state")
        resumed = get_scheduler(constant(), make_optimizer())
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert lrs_of(resumed, 30)[1:].tolist() == lrs_of(whole, 30)[1:].tolist()


def test_command_line() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fusedopt.cli.app import app

    result = CliRunner().invoke(app, ["schedule", "dump", "linear", "--steps", "339", "--warmup", "20.34"])
    rows = list(csv.DictReader(io.StringIO(result.output)))
    assert [float(row["multiplier"]) for row in rows] == Linear(20.34, 339)(np.arange(339)).tolist()
    result = CliRunner().invoke(app, ["schedule", "plot", "cosine:num_warmup_steps=20.34", "--steps", "339"])
    assert result.exit_code == 0
    assert "339 steps" in result.output


@pytest.mark.parametrize("name", ["patience", "cooldown"])
def test_counts_of_measurements_stay_whole(name: str) -> None:
    """A measurement happens or does not: to torch 2.5 of them are 3, which nobody means."""
    with pytest.raises(TypeError, match=rf"{name}=2\.5 is a float; pass an int"):
        Plateau(**{name: 2.5})
