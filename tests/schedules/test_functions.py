"""transformers' functions and GreedyLR under their names: signatures, values, attributes and state dicts."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import schedules

optimization = pytest.importorskip("transformers.optimization")

LR = 0.03
TOLERANCE = 1e-12  # both compute in double and round in another order (test_transformers.py)
W, T = 7, 40

CALLS: dict[str, tuple[dict[str, Any], ...]] = {
    "get_constant_schedule": ({},),
    "get_constant_schedule_with_warmup": ({"num_warmup_steps": W},),
    "get_linear_schedule_with_warmup": ({"num_warmup_steps": W, "num_training_steps": T},),
    "get_cosine_schedule_with_warmup": ({"num_warmup_steps": W, "num_training_steps": T, "num_cycles": 1.5},),
    "get_cosine_with_hard_restarts_schedule_with_warmup": (
        {"num_warmup_steps": W, "num_training_steps": T},
        {"num_warmup_steps": W, "num_training_steps": T, "num_cycles": 3},
    ),
    "get_polynomial_decay_schedule_with_warmup": (
        {"num_warmup_steps": W, "num_training_steps": T, "lr_end": 1e-3, "power": 2.0},
    ),
    "get_inverse_sqrt_schedule": ({"num_warmup_steps": W}, {"num_warmup_steps": 0, "timescale": 12}),
    "get_cosine_with_min_lr_schedule_with_warmup": (
        {"num_warmup_steps": W, "num_training_steps": T, "min_lr": 1e-3},
        {"num_warmup_steps": W, "num_training_steps": T, "min_lr_rate": 0.2},
    ),
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": (
        {"num_warmup_steps": W, "num_training_steps": T + 1, "min_lr_rate": 0.2, "warmup_lr_rate": 0.1},
    ),
    "get_wsd_schedule": (
        {"num_warmup_steps": W, "num_decay_steps": 9, "num_training_steps": T, "decay_type": "1-sqrt"},
        {"num_warmup_steps": W, "num_decay_steps": 9, "num_stable_steps": 11, "min_lr_ratio": 0.1},
    ),
}


def make_optimizer(lr: float = LR) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": value} for value in (lr, lr / 3)]
    return torch.optim.SGD(groups, lr=lr)


def theirs_of(name: str) -> Any:
    return getattr(optimization, name)


def functions() -> list[str]:
    return sorted(n for n in vars(optimization) if n.startswith("get_") and "schedule" in n and n != "get_scheduler")


def test_every_function_of_theirs_is_here_with_its_signature() -> None:
    assert set(functions()) <= set(schedules.__all__)
    for name in functions():
        ours, theirs = (inspect.signature(f).parameters for f in (getattr(schedules, name), theirs_of(name)))
        assert list(ours) == list(theirs), name
        assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}, name


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:Detected call of")  # there is no optimizer step between those of the scheduler
def test_values_are_theirs(name: str) -> None:
    for kwargs in CALLS[name]:
        # The warmup by position, as those whose imports are replaced may give it.
        ours = getattr(schedules, name)(
            make_optimizer(), *(kwargs[key] for key in list(kwargs)[:1]), **dict(list(kwargs.items())[1:])
        )
        theirs = theirs_of(name)(make_optimizer(), **kwargs)
        for step in range(T):
            # Of the first group: theirs end every group at a fraction of the first one's lr (test_transformers.py).
            found, expected = (scheduler.get_last_lr()[0] for scheduler in (ours, theirs))
            assert abs(found - expected) <= TOLERANCE * LR, (kwargs, step)
            ours.step(), theirs.step()


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_last_epoch_resumes() -> None:
    whole = schedules.get_linear_schedule_with_warmup(make_optimizer(), W, T)
    for _ in range(12):
        whole.step()
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    resumed = schedules.get_linear_schedule_with_warmup(optimizer, W, T, last_epoch=11)
    assert resumed.get_last_lr() == whole.get_last_lr()


def test_adafactors_own_learning_rate() -> None:
    optimizer = fusedopt.Adafactor([torch.nn.Parameter(torch.ones(4))])
    scheduler = schedules.get_adafactor_schedule(optimizer, 0.25)
    assert isinstance(scheduler, fusedopt.AdafactorSchedule)
    assert scheduler.get_last_lr() == [0.25]


def metrics() -> list[float]:
    """Falls, stalls, rises, and has a NaN."""
    trend = np.concatenate([np.linspace(3, 1, 60), np.full(40, 1.0), np.linspace(1, 2, 40)])
    values = (trend + 0.2 * np.random.default_rng(3).standard_normal(len(trend))).tolist()
    values[55] = math.nan
    return values


GREEDY: dict[str, Any] = {"patience": 2, "min_lr": [1e-3, 1e-4], "reset_start": 4, "cooldown": 1, "warmup": 1}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize("smooth", [False, True])
def test_greedy_has_their_state_dict_and_checkpoints_go_both_ways(smooth: bool) -> None:
    kwargs = {**GREEDY, "smooth": smooth, "window_size": 5}
    ours, theirs = schedules.GreedyLR(make_optimizer(), **kwargs), optimization.GreedyLR(make_optimizer(), **kwargs)
    assert (
        inspect.signature(schedules.GreedyLR).parameters.keys()
        == inspect.signature(optimization.GreedyLR).parameters.keys()
    )
    seen = set()
    for number, metric in enumerate(metrics()):
        ours.step(metric), theirs.step(metric)
        assert ours.get_last_lr() == theirs.get_last_lr(), number
        assert equal(ours.state_dict(), theirs.state_dict()), number
        seen.add(ours.get_last_lr()[0])
        if number % 30 == 20:  # each goes on from the other's checkpoint
            saved = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
            ours, theirs = schedules.GreedyLR(make_optimizer(0.3)), optimization.GreedyLR(make_optimizer(0.3))
            ours.load_state_dict(saved[1]), theirs.load_state_dict(saved[0])
    assert len(seen) > 5


def test_greedy_is_what_a_trainer_steps_after_evaluations() -> None:
    assert isinstance(
        schedules.get_greedy_schedule(make_optimizer(), patience=3), torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    scheduler = schedules.GreedyLR(make_optimizer(), mode="max")
    assert scheduler.is_better(2.0, 1.0)
    assert not scheduler.is_better(1.0, 1.0)


def test_greedy_takes_a_checkpoint_of_the_same_rule() -> None:
    rule = schedules.Greedy(patience=1, min_lr=1e-4)
    saved = schedules.MetricLR(make_optimizer(), rule)
    for metric in metrics()[:30]:
        saved.step(metric)
    resumed = schedules.GreedyLR(make_optimizer())
    resumed.load_state_dict(saved.state_dict())
    assert resumed.get_last_lr() == saved.get_last_lr()
    assert resumed.patience == 1
