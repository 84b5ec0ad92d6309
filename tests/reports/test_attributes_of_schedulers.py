"""Attributes that others read from a scheduler and set: those of torch's and of transformers' own.

Public reports: flairNLP/flair#2970 (a trainer prints num_bad_epochs), erew123/alltalk_tts#618 (another one needs
_last_lr, which a ReduceLROnPlateau did not have).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import fusedopt
from fusedopt import get_scheduler
from fusedopt.schedules import Cosine, GradientLR, Greedy, MetricLR, Plateau, Polynomial, ScheduleLR, warmup

LRS = (0.5, 0.02)
PLATEAU = (
    *("factor", "patience", "cooldown", "eps", "mode", "threshold", "threshold_mode", "mode_worse", "min_lrs"),
    *("default_min_lr", "best", "num_bad_epochs", "cooldown_counter", "in_cooldown", "last_epoch", "_last_lr"),
)
GREEDY = (
    *("factor", "patience", "cooldown", "warmup", "eps", "mode", "threshold", "threshold_mode", "min_lrs", "max_lrs"),
    *("smooth", "window_size", "verbose", "reset_start", "reset_start_original", "best", "last_epoch", "_last_lr"),
    *("num_bad_epochs", "num_good_epochs", "cooldown_counter", "warmup_counter"),
)
# At which measurement what is set, and to what.
PLATEAUS_CHANGES: dict[int, dict[str, Any]] = {
    20: {"patience": 0, "factor": 0.9},
    40: {"cooldown": 4, "threshold": 0.03},
    60: {"threshold_mode": "abs", "eps": 1e-4},
    80: {"min_lrs": [0.3, 1e-3]},
    100: {"best": 0.5, "num_bad_epochs": 1, "patience": 2},
    120: {"cooldown_counter": 6, "best": math.inf},
    140: {"mode": "max", "best": -math.inf, "cooldown": 0},
    160: {"last_epoch": 1000},
}
GREEDYS_CHANGES: dict[int, dict[str, Any]] = {
    20: {"patience": 1, "factor": 0.8, "warmup": 2},
    40: {"cooldown": 3, "threshold": 0.03, "num_good_epochs": 1},
    60: {"min_lrs": [0.3, 1e-3], "max_lrs": [0.6, 0.5]},
    80: {"warmup_counter": 5, "eps": 1e-3},
    100: {"reset_start": 2, "reset_start_original": 5},
    140: {"best": 9.0, "mode": "max"},
}


def make_optimizer(*lrs: Any) -> torch.optim.Optimizer:
    return fusedopt.SGD([{"params": [torch.nn.Parameter(torch.ones(4))], "lr": lr} for lr in lrs or LRS], lr=0.1)


def metrics(seed: int) -> list[float]:
    """Falls, stalls, rises, and has a NaN."""
    trend = np.concatenate([np.linspace(3, 1, 80), np.full(40, 1.0), np.linspace(1, 2, 80)])
    values = (trend + 0.2 * np.random.default_rng(seed).standard_normal(len(trend))).tolist()
    values[55] = math.nan
    return values


def greedy_of_transformers(optimizer: Any, **kwargs: Any) -> Any:
    return pytest.importorskip("transformers.optimization").GreedyLR(optimizer, **kwargs)


CASES = {
    "reduce_lr_on_plateau": (ReduceLROnPlateau, {"patience": 3, "min_lr": 1e-3}, PLATEAU, PLATEAUS_CHANGES),
    "greedy": (greedy_of_transformers, {"patience": 2, "min_lr": 1e-3, "reset_start": 4}, GREEDY, GREEDYS_CHANGES),
}


def same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


def is_fixed_here(name: str, changed: set[str]) -> bool:
    """What torch keeps as it was made with, and here follows from what has been set since."""
    return (name == "mode_worse" and "mode" in changed) or (name == "default_min_lr" and "min_lrs" in changed)


@pytest.mark.parametrize("changes", ["as made", "changed"])
@pytest.mark.parametrize("name", CASES)
def test_in_lockstep_with_theirs(name: str, changes: str) -> None:
    theirs_class, kwargs, attributes, table = CASES[name]
    theirs = theirs_class(make_optimizer(), **kwargs)
    ours = get_scheduler(name, make_optimizer(), scheduler_specific_kwargs=kwargs)
    assert isinstance(ours, ReduceLROnPlateau)
    public = {key for key in vars(theirs) if not key.startswith("_")} - {"optimizer"}
    assert public - {"verbose"} <= set(attributes)  # that is torch's no longer since 2.7
    changed: set[str] = set()
    seen = set()
    for number, metric in enumerate(metrics(5)):
        for key, value in (table if changes == "changed" else {}).get(number, {}).items():
            for scheduler in (theirs, ours):
                setattr(scheduler, key, copy.copy(value))
            changed.add(key)
        for scheduler in (theirs, ours):
            scheduler.step(metric)
        for key in attributes:
            if not is_fixed_here(key, changed):
                assert same(getattr(ours, key), getattr(theirs, key)), (number, key)
        seen.add(tuple(ours.get_last_lr()))
        if number % 50 == 10:  # through a checkpoint, into a scheduler that was made otherwise
            resumed = get_scheduler(name, make_optimizer(), scheduler_specific_kwargs={"min_lr": 1e-9})
            resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
            again = theirs_class(make_optimizer(), min_lr=1e-9)
            again.load_state_dict(copy.deepcopy(theirs.state_dict()))
            for group, other in zip(again.optimizer.param_groups, theirs.optimizer.param_groups):
                group["lr"] = other["lr"]  # torch leaves the lr to the optimizer's state_dict
            theirs, ours = again, resumed
    assert len(seen) > 3


@pytest.mark.parametrize("name", CASES)
def test_bounds_may_be_set_one_by_one(name: str) -> None:
    theirs_class, kwargs, *_ = CASES[name]
    runs = theirs_class(make_optimizer(), **kwargs), get_scheduler(name, make_optimizer(), None, None, kwargs)
    theirs, ours = runs
    for number, metric in enumerate(metrics(6)):
        if number == 5:
            for scheduler in runs:
                scheduler.min_lrs[0] = 0.1
                scheduler.patience = 0  # which must not lose the other
        for scheduler in runs:
            scheduler.step(metric)
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert ours.min_lrs == theirs.min_lrs
        assert number < 5 or ours.get_last_lr()[0] >= 0.1
    ours.min_lrs[1] = 0.015
    resumed = get_scheduler(name, make_optimizer(), scheduler_specific_kwargs={"min_lr": 1e-9})
    resumed.load_state_dict(ours.state_dict())
    assert resumed.min_lrs == [0.1, 0.015]


def test_attributes_of_another_rule_are_not_there() -> None:
    plateau = get_scheduler("reduce_lr_on_plateau", make_optimizer())
    for name in sorted(set(GREEDY) - set(PLATEAU)):
        assert not hasattr(plateau, name), name
        with pytest.raises(AttributeError, match=name.removesuffix("_original").removesuffix("s")):
            setattr(plateau, name, 1)


BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("patience", -1, ValueError, "patience=-1 is negative"),
    ("patience", 2.5, TypeError, r"patience=2\.5 is a float"),
    ("factor", 1.0, ValueError, r"factor=1\.0 is outside \(0, 1\)"),
    ("mode", "best", ValueError, "mode='best' is not known"),
    ("threshold", math.nan, ValueError, "threshold=nan is not finite"),
    ("min_lrs", [0.1], ValueError, "min_lr has 1 values for 2 param groups"),
    ("num_bad_epochs", -1, ValueError, "num_bad_epochs=-1 is negative"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=[f"{row[0]}-{row[1]}" for row in BAD])
def test_what_cannot_be_is_refused_and_changes_nothing(name: str, value: Any, error: type, message: str) -> None:
    scheduler = get_scheduler("reduce_lr_on_plateau", make_optimizer())
    scheduler.step(1.0)
    before = scheduler.state_dict()
    with pytest.raises(error, match=message):
        setattr(scheduler, name, value)
    assert scheduler.state_dict() == before


def test_starting_anew() -> None:
    """`_reset` is private and called all the same: torch's keeps the lr, transformers' does not."""
    for name, (theirs_class, kwargs, attributes, _) in CASES.items():
        runs = theirs_class(make_optimizer(), **kwargs), get_scheduler(name, make_optimizer(), None, None, kwargs)
        for number, metric in enumerate(metrics(7)):
            for scheduler in runs:
                if number == 120:
                    scheduler._reset()
                scheduler.step(metric)
            for key in attributes:
                assert same(*(getattr(scheduler, key) for scheduler in runs)), (name, number, key)


def test_the_mode_as_code_for_old_versions_of_torch_sets_it() -> None:
    scheduler = get_scheduler("reduce_lr_on_plateau", make_optimizer())
    scheduler._init_is_better(mode="max", threshold=0.5, threshold_mode="abs")
    assert (scheduler.mode, scheduler.threshold, scheduler.threshold_mode) == ("max", 0.5, "abs")
    assert scheduler.mode_worse == -math.inf
    assert scheduler.rule == Plateau(mode="max", threshold=0.5, threshold_mode="abs")


def test_a_warmup_goes_on_when_the_rule_after_it_is_changed() -> None:
    scheduler = get_scheduler(warmup(4) >> Plateau(patience=5), make_optimizer(1.0))
    for _ in range(2):
        scheduler.step()
    scheduler.patience = 0
    scheduler.factor = 0.5
    lrs = [scheduler.get_last_lr()[0]]
    for _ in range(2):
        scheduler.step()
        lrs.append(scheduler.get_last_lr()[0])
    assert lrs == [0.5, 0.75, 1.0]
    scheduler.step(1.0)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.guided == warmup(4) >> Plateau(patience=0, factor=0.5)


def schedulers() -> list[Any]:
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4)
    adafactor = fusedopt.Adafactor([torch.nn.Parameter(torch.ones(4))])
    made = [
        ScheduleLR(make_optimizer(), Cosine(2, 20)),
        MetricLR(make_optimizer(), Plateau()),
        MetricLR(make_optimizer(), Greedy()),
        get_scheduler("gradient_norm", optimizer),
        fusedopt.AdafactorSchedule(adafactor, initial_lr=0.5),
    ]
    assert isinstance(made[3], GradientLR)
    return made


@pytest.mark.parametrize("index", range(5))
def test_every_scheduler_has_what_torchs_have(index: int) -> None:
    scheduler = schedulers()[index]
    plain = LambdaLR(make_optimizer(), lambda step: 1.0)
    for name in vars(plain).keys() - {"lr_lambdas", "verbose"}:  # the latter is torch's no longer since 2.7
        assert type(getattr(scheduler, name)) is type(getattr(plain, name)) or name == "optimizer", name
    assert scheduler._last_lr == scheduler.get_last_lr()
    assert len(scheduler.base_lrs) == len(scheduler.optimizer.param_groups)


def test_base_lrs_may_be_set() -> None:
    """Also where the multiplier depends on them, since the schedule ends at an absolute lr."""
    for schedule in (Cosine(0, 10), Polynomial(0, 10, lr_end=0.01)):
        scheduler, other = (ScheduleLR(make_optimizer(*lrs), schedule) for lrs in ((0.5, 0.02), (0.25, 0.02)))
        scheduler.base_lrs[0] = 0.25
        for _ in range(11):
            for each in (scheduler, other):
                each.optimizer.step()
                each.step()
            assert scheduler.get_last_lr() == other.get_last_lr()
    assert scheduler.get_last_lr() == pytest.approx([0.01, 0.01], rel=1e-15)  # lr * (lr_end / lr) rounds twice
