"""Schedules against transformers' own, and where ours deviate on purpose."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fusedopt import get_scheduler, schedules

optimization = pytest.importorskip("transformers.optimization")

# Both compute in double but round in another order, and their cosine of pi q rounds its argument.
TOLERANCE = 1e-12
LR = 0.03


def make_optimizer(*lrs: Any) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs or (LR,)]
    return torch.optim.SGD(groups, lr=lrs[0] if lrs else LR)


def lrs_of(scheduler: LRScheduler, steps: int, group: int = 0) -> list[float]:
    """The lr of every step, as an optimizer would see it."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no optimizer step between those of the scheduler
        for _ in range(steps):
            seen.append(float(scheduler.optimizer.param_groups[group]["lr"]))
            scheduler.step()
    return seen


def both(name: str, w: int, total: int, steps: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    ours = get_scheduler(name, make_optimizer(), w, total, kwargs)
    theirs = optimization.get_scheduler(name, make_optimizer(), w, total, kwargs)
    assert isinstance(theirs, LambdaLR)
    return np.array(lrs_of(ours, steps)), np.array(lrs_of(theirs, steps))


SHAPES = ("linear", "cosine", "1-sqrt")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "constant": [{}],
    "constant_with_warmup": [{}],
    "linear": [{}],
    "cosine": [{"num_cycles": n} for n in (0.0, 0.25, 0.5, 0.75, 1, 2.5, 7)],
    "cosine_with_restarts": [{"num_cycles": n} for n in (1, 2, 3, 6, 7, 2.5, 49)],
    "polynomial": [{"power": p, "lr_end": e} for p in (0.1, 0.5, 1.0, 2, 2.7) for e in (0.0, 1e-7, 0.01)],
    "inverse_sqrt": [{}, {"timescale": 1}, {"timescale": 33}, {"timescale": 10_000}],
    "cosine_with_min_lr": [
        {"num_cycles": n, **low} for n in (0.5, 1.25) for low in ({"min_lr": 0.003}, {"min_lr_rate": 0.3})
    ],
    "cosine_warmup_with_min_lr": [
        {"num_cycles": n, **low, **start}
        for n in (0.5, 1.25)
        for low in ({"min_lr": 0.003}, {"min_lr_rate": 0.3}, {"min_lr_rate": 1.0})
        for start in ({}, {"warmup_lr_rate": 0.0}, {"warmup_lr_rate": 0.4})
    ],
    "warmup_stable_decay": [
        {"num_decay_steps": d, "warmup_type": up, "decay_type": down, "min_lr_ratio": r, **cycles}
        for d, up, down, r in itertools.product((0, 5, 12), SHAPES, SHAPES, (0.0, 0.1))
        for cycles in ([{}, {"num_cycles": 1.3}] if down == "cosine" else [{}])
    ],
}
# 49 (1 / 49) rounds to less than 1, so in the restarts 49 cycles of 49 steps show where the remainder is taken.
LENGTHS = [(0, 40), (1, 40), (0, 49), (7, 40), (13, 29), (0, 1), (3, 1_000)]
GRID = [(name, w, total, kwargs) for name, all_ in SETTINGS.items() for kwargs in all_ for w, total in LENGTHS]
GRID = [row for row in GRID if row[1] + row[3].get("num_decay_steps", 0) <= row[2]]


def test_the_grid_is_large() -> None:
    assert len(GRID) >= 200
    assert {row[0] for row in GRID} | {"greedy", "reduce_lr_on_plateau"} == {
        kind.value for kind in optimization.TYPE_TO_SCHEDULER_FUNCTION
    }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:num_warmup_steps")
def test_equal_to_transformers_up_to_the_end(name: str) -> None:
    for _, w, total, kwargs in (row for row in GRID if row[0] == name):
        ours, theirs = both(name, w, total, total + 1, **kwargs)
        end = total if name == "cosine_warmup_with_min_lr" else total + 1
        error = np.abs(ours - theirs)[:end].max()
        assert error <= TOLERANCE * LR, (w, total, kwargs, error)


@pytest.mark.parametrize("name", ["linear", "cosine_with_restarts", "inverse_sqrt", "constant_with_warmup"])
def test_equal_to_transformers_after_the_end_where_that_stays(name: str) -> None:
    for w, total in LENGTHS:
        ours, theirs = both(name, w, total, 3 * total)
        assert np.abs(ours - theirs).max() <= TOLERANCE * LR, (w, total)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "inverse_sqrt"])
def test_equal_to_transformers_without_steps_after_the_warmup(name: str) -> None:
    for w, total in [(5, 5), (9, 5)]:
        ours, theirs = both(name, w, total, total + 1)
        assert np.abs(ours - theirs).max() <= TOLERANCE * LR, (w, total)


# lr = 10, w = 2, T = 10 unless noted: what transformers computes, written down to three decimals; the values from T on
# are ours.
STEPS = (0, 1, 2, 4, 6, 8, 10, 12)
TABLE = [
    ("linear", {}, (0, 5, 10, 7.5, 5, 2.5, 0, 0)),
    ("cosine", {}, (0, 5, 10, 8.536, 5, 1.464, 0, 0)),
    ("cosine_with_restarts", {"num_cycles": 2}, (0, 5, 10, 5, 10, 5, 0, 0)),
    ("polynomial", {"power": 2, "lr_end": 1}, (0, 5, 10, 6.062, 3.25, 1.562, 1, 1)),
    ("inverse_sqrt", {}, (0, 5, 10, 7.071, 5.774, 5, 4.472, 4.082)),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, (0, 5, 10, 8.682, 5.5, 2.318, 1, 1)),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}, (5, 10, 9.657, 7.222, 3.778, 1.343, 1, 1)),
    ("warmup_stable_decay", {"num_decay_steps": 4}, (0, 5, 10, 10, 10, 5, 0, 0)),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 4, "min_lr_ratio": 0.1, "decay_type": "linear"},
        (1, 5.5, 10, 10, 10, 5.5, 1, 1),
    ),
    (
        "warmup_stable_decay",
        {"num_warmup_steps": 4, "num_decay_steps": 4, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
        (0, 1.340, 2.929, 10, 10, 2.929, 0, 0),
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "expected"), TABLE)
def test_values_by_hand(name: str, kwargs: dict[str, Any], expected: tuple[float, ...]) -> None:
    w = None if "num_warmup_steps" in kwargs else 2
    seen = lrs_of(get_scheduler(name, make_optimizer(10.0), w, 10, kwargs), 13)
    assert [round(seen[step], 3) for step in STEPS] == [round(value, 3) for value in expected]


# Where ours deviate: each shows theirs and ours.


@pytest.mark.parametrize(
    ("name", "kwargs", "end"),
    [
        ("cosine", {}, 0.0),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 0.1),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}, 0.1),
    ],
)
def test_cosines_stay_at_their_end_where_theirs_bounce_back(name: str, kwargs: dict[str, Any], end: float) -> None:
    ours, theirs = both(name, 2, 10, 19, **kwargs)
    assert theirs[17:].max() > 0.9 * LR
    assert (ours[10:] == end * LR).all()
    late = schedules.create_schedule(name, num_warmup_steps=2, num_training_steps=10, **kwargs)
    assert (late(np.arange(10, 10_000, 7)) == end).all()


def test_polynomial_without_steps_after_the_warmup() -> None:
    with pytest.raises(ZeroDivisionError):
        both("polynomial", 5, 5, 6)
    ours = lrs_of(get_scheduler("polynomial", make_optimizer(), 5, 5), 7)
    assert ours[4] == LR * 0.8
    assert ours[5:] == [pytest.approx(1e-7, rel=1e-15)] * 2  # lr * (lr_end / lr) rounds twice


def test_polynomial_ends_every_group_at_lr_end() -> None:
    steps, lr_end = 11, 1e-3
    ours = get_scheduler("polynomial", make_optimizer(LR, 0.5), 0, 10, {"lr_end": lr_end})
    theirs = optimization.get_scheduler("polynomial", make_optimizer(LR, 0.5), 0, 10, {"lr_end": lr_end})
    # Rounded twice, as above.
    assert lrs_of(ours, steps, group=1)[-1] == pytest.approx(lr_end, rel=1e-15)
    assert ours.get_last_lr() == pytest.approx([lr_end, lr_end], rel=1e-15)
    assert lrs_of(theirs, steps, group=1)[-1] == pytest.approx(0.5 * lr_end / LR)  # 17 times too high


def test_min_lr_is_that_of_every_group() -> None:
    ours = get_scheduler("cosine_with_min_lr", make_optimizer(LR, 0.5), 0, 10, {"min_lr": 1e-3})
    theirs = optimization.get_scheduler("cosine_with_min_lr", make_optimizer(LR, 0.5), 0, 10, {"min_lr": 1e-3})
    lrs_of(ours, 10)
    lrs_of(theirs, 10)
    assert ours.get_last_lr() == pytest.approx([1e-3, 1e-3], rel=1e-15)  # rounded twice
    assert theirs.get_last_lr()[1] == pytest.approx(0.5 * 1e-3 / LR)


def test_polynomial_and_min_lr_with_a_tensor_lr() -> None:
    lr = torch.tensor(LR, dtype=torch.float64)
    theirs = optimization.get_scheduler("polynomial", make_optimizer(lr.clone()), 1, 10)
    assert any(math.isnan(value) for value in lrs_of(theirs, 10))
    for name, kwargs in (("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 1e-3})):
        optimizer = make_optimizer(lr.clone())
        kept = optimizer.param_groups[0]["lr"]
        ours = lrs_of(get_scheduler(name, optimizer, 2, 10, kwargs), 12)
        assert ours == lrs_of(get_scheduler(name, make_optimizer(), 2, 10, kwargs), 12)
        assert optimizer.param_groups[0]["lr"] is kept


def test_warmup_and_decay_longer_than_the_training() -> None:
    theirs = optimization.get_scheduler("warmup_stable_decay", make_optimizer(), 8, 10, {"num_decay_steps": 6})
    seen = lrs_of(theirs, 10)
    assert seen[8] < 0.8 * seen[7]  # falls before it has risen to the lr
    with pytest.raises(
        ValueError, match=r"num_warmup_steps=8 and num_decay_steps=6 together exceed num_training_steps=10"
    ):
        get_scheduler("warmup_stable_decay", make_optimizer(), 8, 10, {"num_decay_steps": 6})


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_constants_do_not_drop_unknown_keywords(name: str) -> None:
    optimization.get_scheduler(name, make_optimizer(), 2, 10, {"num_cycels": 3})
    with pytest.raises(TypeError, match="num_cycels"):
        get_scheduler(name, make_optimizer(), 0, 10, {"num_cycels": 3})


def test_constant_says_that_it_has_no_warmup() -> None:
    with pytest.warns(UserWarning, match="num_warmup_steps=5 means nothing to 'constant'"):
        assert lrs_of(get_scheduler("constant", make_optimizer(), 5, 10), 3) == [LR] * 3


def test_greedy_guards_against_an_lr_below_its_minimum() -> None:
    theirs = optimization.get_scheduler("greedy", make_optimizer(1e-4), scheduler_specific_kwargs={"patience": 0})
    for loss in range(100):
        theirs.step(float(loss))
    assert theirs.get_last_lr()[0] > 1e-4  # the loss has grown a hundred times, and so has the lr
    with pytest.raises(ValueError, match=r"min_lr=0.001 is above the lr 0.0001 of param group 0"):
        get_scheduler("greedy", make_optimizer(1e-4))


def test_greedy_keeps_a_tensor_lr() -> None:
    for get, replaced in ((optimization.get_scheduler, True), (get_scheduler, False)):
        optimizer = make_optimizer(torch.tensor(0.1))
        kept = optimizer.param_groups[0]["lr"]
        scheduler = get("greedy", optimizer, scheduler_specific_kwargs={"patience": 0})
        scheduler.step(1.0)
        assert (optimizer.param_groups[0]["lr"] is not kept) == replaced
        assert float(optimizer.param_groups[0]["lr"]) != float(torch.tensor(0.1))


def test_state_dict_restores_the_arguments() -> None:
    for get, restored in ((optimization.get_scheduler, False), (get_scheduler, True)):
        saved = get("cosine", make_optimizer(), 5, 100, {"num_cycles": 2}).state_dict()
        other = get("cosine", make_optimizer(), 0, 50)
        other.load_state_dict(saved)
        assert (
            lrs_of(other, 60)[1:] == lrs_of(get("cosine", make_optimizer(), 5, 100, {"num_cycles": 2}), 60)[1:]
        ) == restored


def test_names_are_theirs_and_may_be_their_enum() -> None:
    from transformers import SchedulerType

    assert {kind.value for kind in SchedulerType} <= set(schedules.scheduler_names())
    assert lrs_of(get_scheduler(SchedulerType.LINEAR, make_optimizer(), 2, 10), 9) == lrs_of(
        get_scheduler("linear", make_optimizer(), 2, 10), 9
    )


def test_a_checkpoint_of_theirs_goes_on() -> None:
    theirs = optimization.get_scheduler("cosine", make_optimizer(), 5, 50)
    lrs_of(theirs, 20)
    ours = get_scheduler("cosine", make_optimizer(), 5, 50)
    ours.load_state_dict(theirs.state_dict())
    assert np.abs(np.array(lrs_of(ours, 20)[1:]) - lrs_of(theirs, 20)[1:]).max() <= TOLERANCE * LR


def test_warmup_before_a_plateau() -> None:
    """torch's SequentialLR takes no plateau; a warmup composed with one is a schedule like any other."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    phases = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    ]
    with pytest.raises(ValueError, match="SequentialLR does not support `ReduceLROnPlateau`"):
        torch.optim.lr_scheduler.SequentialLR(optimizer, phases, milestones=[2])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedules.warmup(2) >> schedules.Plateau(patience=0), optimizer)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(1.0)  # never better than the first
    assert seen[:3] == [0.0, 0.5, 1.0]
    assert optimizer.param_groups[0]["lr"] < 1.0
