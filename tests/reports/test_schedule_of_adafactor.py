"""The AdafactorSchedule of transformers, around an Adafactor that is not its own.

Public reports: huggingface/transformers#11612 (without a learning rate a Trainer needs that schedule),
kohya-ss/sd-scripts#342 (stepped with gradients before the optimizer, it looks for a step that there is not).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import make_params, saved, train

import fusedopt
from fusedopt import Adafactor

optimization = pytest.importorskip("transformers.optimization")

SHAPES = [(20, 30), (7,), (3, 4, 5)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"warmup_init": True},
    {"scale_parameter": False},
    {"scale_parameter": False, "warmup_init": True},
    {"weight_decay": 0.01, "beta1": 0.9, "compat": True},
    {"eps": (1e-30, 10.0)},
    {"lr": 0.05, "relative_step": False},
    {"lr": 0.05, "relative_step": False, "scale_parameter": False},
]


def make(kwargs: dict[str, Any], *, backend: str = "auto") -> tuple[Any, Adafactor]:
    """Theirs and ours, with two groups of the same weights."""

    def groups() -> list[dict[str, Any]]:
        params = make_params(SHAPES, torch.float32)
        return [{"params": params[:1]}, {"params": params[1:]}]

    theirs = {key: value for key, value in kwargs.items() if key != "compat"}
    return optimization.Adafactor(groups(), **theirs), Adafactor(groups(), backend=backend, **kwargs)


def numbers(lrs: list[Any]) -> list[float]:
    return [float(lr) for lr in lrs]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("initial_lr", [0.0, 0.5])
@pytest.mark.parametrize("kwargs", SETTINGS, ids=lambda kwargs: "-".join(kwargs) or "as made")
def test_reports_what_it_does_around_theirs(kwargs: dict[str, Any], initial_lr: float, backend: str) -> None:
    runs = make(kwargs, backend=backend)
    schedules = [optimization.AdafactorSchedule(run, initial_lr=initial_lr) for run in runs]
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr() == [initial_lr] * 2
    for step in range(5):
        for run, schedule in zip(runs, schedules):
            train(run, 1, first=step)
            schedule.step()
        theirs, ours = (numbers(schedule.get_last_lr()) for schedule in schedules)
        if kwargs.get("scale_parameter", True):
            # Their RMS is a float32, of weights that differ by roundings.
            assert ours == pytest.approx(theirs, rel=1e-5)
        else:
            assert ours == theirs
        assert ours == [group["lr"] for group in runs[1].param_groups]
    for twin, mine in zip(*([p for group in run.param_groups for p in group["params"]] for run in runs)):
        torch.testing.assert_close(mine, twin, rtol=1e-5, atol=1e-6)  # as for their checkpoints


@pytest.mark.parametrize("kwargs", SETTINGS[:5], ids=lambda kwargs: "-".join(kwargs) or "as made")
def test_reporting_changes_nothing(kwargs: dict[str, Any]) -> None:
    """Nor does its initial_lr, which it writes into the groups."""
    _, plain = make(kwargs)
    train(plain, 4)
    for initial_lr in (0.0, 0.5):
        _, watched = make(kwargs)
        schedule = optimization.AdafactorSchedule(watched, initial_lr=initial_lr)
        for step in range(4):
            train(watched, 1, first=step)
            schedule.step()
        for group, other in zip(plain.param_groups, watched.param_groups):
            for param, twin in zip(group["params"], other["params"]):
                assert torch.equal(param, twin)
                assert all(torch.equal(value, watched.state[twin][key]) for key, value in plain.state[param].items())


@pytest.mark.parametrize("master", [None, "split32"])
def test_the_weights_are_those_before_the_step(master: str | None) -> None:
    """In 16 bits, too, and with what is kept of them beside."""
    optimizer = Adafactor(make_params([(64, 64)], torch.bfloat16), master_weights=master)
    schedule = optimization.AdafactorSchedule(optimizer)
    param = optimizer.param_groups[0]["params"][0]
    for step in range(3):
        low = optimizer.state[param].get("master_low16") if param in optimizer.state else None
        weights = param.detach().float() if low is None else fusedopt.reference.master.join(master, param.detach(), low)
        before = weights.double().square().mean().sqrt().item()
        train(optimizer, 1, first=step)
        schedule.step()
        # The squares are added in another order.
        assert schedule.get_last_lr() == [pytest.approx(1e-2 * before, rel=1e-12)]
        assert optimizer.actual_lrs() != schedule.get_last_lr()  # of the weights as they are now


@pytest.mark.parametrize("initial_lr", [0.0, 0.5])
def test_a_run_goes_on(initial_lr: float) -> None:
    _, whole = make({})
    schedule = optimization.AdafactorSchedule(whole, initial_lr=initial_lr)
    for step in range(3):
        train(whole, 1, first=step)
        schedule.step()
    _, resumed = make({})
    again = optimization.AdafactorSchedule(resumed, initial_lr=initial_lr)
    resumed.load_state_dict(saved(whole.state_dict()))
    again.load_state_dict(saved(schedule.state_dict()))
    for group, other in zip(whole.param_groups, resumed.param_groups):
        for param, twin in zip(group["params"], other["params"]):
            twin.data.copy_(param.data)
    for step in range(3, 6):
        for run, its in ((whole, schedule), (resumed, again)):
            train(run, 1, first=step)
            its.step()
        assert numbers(schedule.get_last_lr()) == numbers(again.get_last_lr())
    # What was remembered of a step is not taken for one of another run.
    lrs = [0.01 * max(1e-3, g["params"][0].detach().double().square().mean().sqrt().item()) for g in whole.param_groups]
    whole.load_state_dict(saved(whole.state_dict()))
    whole.param_groups[0]["params"][0].grad = torch.zeros(20, 30)
    assert schedule.get_lr()[0] == pytest.approx(lrs[0], rel=1e-12)


def test_stepped_with_gradients_before_the_optimizer() -> None:
    for initial_lr in (0.0, 0.5):
        _, optimizer = make({})
        _, twin = make({})
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        schedule = optimization.AdafactorSchedule(optimizer, initial_lr=initial_lr)  # which asks for the lr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the order
            schedule.step()
        assert schedule.get_last_lr() == [initial_lr] * 2
        train(optimizer, 2)
        train(twin, 2)
        schedule.step()
        assert schedule.get_last_lr() == pytest.approx(twin.actual_lrs(), rel=1e-2)  # before a step instead of after it
        assert torch.equal(optimizer.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])


def test_other_schedulers_are_told_that_they_do_nothing() -> None:
    """Unlike in transformers, where they write an lr that nobody reads."""
    for relative in (True, False):
        _, optimizer = make({} if relative else {"lr": 0.5, "relative_step": False})
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        if relative:
            with pytest.raises(ValueError, match=r"lr=0\.5 together with relative_step=True"):
                train(optimizer, 1)
        else:
            train(optimizer, 1)
            schedule.step()
            assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_variant_of_torch_says_what_to_use() -> None:
    optimizer = train(Adafactor(make_params(SHAPES, torch.float32), variant="torch"), 1)
    with pytest.raises(TypeError, match=r"use fusedopt\.AdafactorSchedule"):
        optimization.AdafactorSchedule(optimizer)


def test_under_compile() -> None:
    """The RMS is then that of the weights after the step."""
    torch.compiler.reset()
    _, plain = make({})
    _, optimizer = make({})
    schedule = optimization.AdafactorSchedule(optimizer)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for step in range(3):
        for run in (plain, optimizer):
            for group in run.param_groups:
                for param in group["params"]:
                    param.grad = torch.full_like(param, 0.1 * (step + 1))
        plain.step()
        if step == 1:
            optimizer.step()  # what is remembered of this one is not the next one's
        else:
            compiled()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx(optimizer.actual_lrs(), rel=1e-12)
    for group, other in zip(plain.param_groups, optimizer.param_groups):
        for param, twin in zip(group["params"], other["params"]):
            assert torch.equal(param, twin)


def test_a_copy_of_the_optimizer_starts_without_what_was_remembered() -> None:
    _, optimizer = make({})
    schedule = optimization.AdafactorSchedule(optimizer)
    train(optimizer, 1)
    schedule.step()
    twin = copy.deepcopy(optimizer)
    group = twin.param_groups[0]
    group["lr"] = None
    expected = optimizer.actual_lrs()[0]
    assert twin._get_lr(group, twin.state[group["params"][0]]) == pytest.approx(expected, rel=1e-12)
