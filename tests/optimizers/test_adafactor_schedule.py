"""Adafactor's presets, and the learning rates that its schedule reports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_same_run, make_params, saved, train
from matrices import EXTERNAL

import fusedopt
from fusedopt import Adafactor


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_presets() -> None:
    params = make_params([(3,)], torch.float32)
    t5 = fusedopt.recommended_adafactor(params).defaults
    assert (t5["lr"], t5["scale_parameter"], t5["relative_step"], t5["warmup_init"]) == (None, True, True, True)
    external = fusedopt.recommended_adafactor(params, "external_lr", lr=1e-4, beta1=0.9).defaults
    assert (external["lr"], external["beta1"], external["clip_threshold"]) == (1e-4, 0.9, 1.0)
    assert not external["scale_parameter"] | external["relative_step"] | external["warmup_init"]
    assert fusedopt.recommended_adafactor(params, "external_lr").defaults["lr"] == 1e-3
    with pytest.raises(ValueError, match="preset='t6' is not known; pass one of 't5', 'external_lr'"):
        fusedopt.recommended_adafactor(params, "t6")
    with pytest.raises(ValueError, match="together with relative_step=True"):
        fusedopt.recommended_adafactor(params, "t5", lr=1e-3)


@pytest.mark.parametrize("master", [None, "split32"])
def test_schedule_reports_the_learning_rates_and_changes_nothing(master: str | None) -> None:
    def groups() -> list[dict[str, Any]]:
        params = make_params([(20, 30), (7,), (5, 5), (3,)], torch.bfloat16)
        return [
            {"params": params[:2], "warmup_init": True},
            {"params": params[2:3], **EXTERNAL, "scale_parameter": False},
            {"params": params[3:], "scale_parameter": False},
        ]

    optimizer, plain = Adafactor(groups(), master_weights=master), Adafactor(groups(), master_weights=master)
    before = [dict(group) for group in optimizer.param_groups]
    schedule = fusedopt.AdafactorSchedule(optimizer, initial_lr=0.5)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.get_last_lr() == [0.5, 0.5, 0.5]
    for step in range(4):
        train(optimizer, 1, first=step)
        schedule.step()
    train(plain, 4)
    assert_same_run(optimizer, plain)
    assert before == [dict(group) for group in optimizer.param_groups]
    params = [group["params"][0] for group in optimizer.param_groups]
    weights = params[0].detach().float()
    if master:
        held = optimizer.state[params[0]]["master_low16"]
        weights = fusedopt.reference.master.join(master, params[0].detach(), held)
    assert schedule.get_last_lr() == pytest.approx([4e-6 * rms(weights), 1e-2, 1e-2], rel=1e-12)
    # through a checkpoint, into a new process
    resumed = fusedopt.AdafactorSchedule(copy.deepcopy(optimizer))
    resumed.load_state_dict(saved(schedule.state_dict()))
    assert (resumed.last_epoch, resumed.initial_lr) == (4, 0.5)
    assert resumed.get_last_lr() == schedule.get_last_lr()


def test_schedule_of_torchs_variant_and_of_another_optimizer() -> None:
    params = make_params([(4, 4)], torch.float32)
    optimizer = train(Adafactor(params, variant="torch", lr=0.4), 25)
    assert optimizer.actual_lrs() == pytest.approx([0.2 * rms(params[0])], rel=1e-12)
    with pytest.raises(TypeError, match=r"optimizer is a SGD.*pass a fusedopt\.Adafactor"):
        fusedopt.AdafactorSchedule(fusedopt.SGD(params))


def test_schedulers_drive_an_external_learning_rate() -> None:
    optimizer = Adafactor(make_params([(4, 4)], torch.float32), **EXTERNAL)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
