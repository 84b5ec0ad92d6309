"""Checkpoints that are none, or those of something else, are refused in sentences, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_run, make_params, train

import fusedopt

SHAPES = [(65, 99), (300,), (), (1, 7)]


@pytest.mark.parametrize(
    ("passed", "error", "message"),
    [
        (None, TypeError, "state_dict is a NoneType; pass what an optimizer's"),
        ("checkpoint.pt", TypeError, "state_dict is a str"),
        ({}, ValueError, r"has no 'state' of an optimizer \(it is empty\)"),
        ({"model": {}, "optimizer": {}}, ValueError, r"has no 'state' .*\(what is there: 'model', 'optimizer'\)"),
        ({"state": {}}, ValueError, "has no 'param_groups'"),
        ({"state": [], "param_groups": []}, ValueError, "has no 'state'"),
        ({"state": {}, "param_groups": [{"lr": 1.0}]}, ValueError, r"param groups of \[0\] parameters"),
    ],
)
def test_what_is_no_state_dict_is_refused(passed: Any, error: type[Exception], message: str) -> None:
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32))
    before = optimizer.state_dict()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(passed)
    assert optimizer.state_dict() == before


def test_a_hook_may_make_the_state_dict() -> None:
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32))
    whole = {"model": {}, "optimizer": {**optimizer.state_dict()}}
    optimizer.register_load_state_dict_pre_hook(lambda _, checkpoint: checkpoint["optimizer"])
    optimizer.load_state_dict(whole)


def test_what_full_weights_are_not_of_is_refused() -> None:
    model = torch.nn.Linear(2, 2).bfloat16()
    optimizer = fusedopt.AdamW(model.parameters(), master_weights="split32")
    weights = fusedopt.fp32_parameters(optimizer, model)
    for function, more in ((fusedopt.fp32_parameters, ()), (fusedopt.load_fp32_parameters, (weights,))):
        with pytest.raises(TypeError, match="optimizer is a Linear; pass the optimizer"):
            function(model, optimizer, *more)
        with pytest.raises(TypeError, match="model is a list"):
            function(optimizer, list(model.parameters()), *more)
    before = model.weight.clone()
    with pytest.raises(TypeError, match=r"weights\['bias'\] is a list; pass a tensor"):
        fusedopt.load_fp32_parameters(optimizer, model, {"weight": weights["weight"] + 1, "bias": [0.0, 0.0]})
    assert torch.equal(model.weight, before)
    # An optimizer of torch's keeps nothing beside the weights, which are then all there is.
    theirs = torch.optim.AdamW(model.parameters())
    assert torch.equal(fusedopt.fp32_parameters(theirs, model)["weight"], before.float())
    fusedopt.load_fp32_parameters(theirs, model, {name: value + 1 for name, value in weights.items()})
    assert torch.equal(model.weight, (weights["weight"] + 1).bfloat16())


def _drop_group(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"] = []


def _a_whole_checkpoint(state_dict: dict[str, Any]) -> None:
    state_dict["optimizer"] = {key: state_dict.pop(key) for key in list(state_dict)}
    state_dict["model"] = {}


def _nothing_of_a_parameter(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1] = None  # as ZeroRedundancyOptimizer leaves what other ranks hold in what it has loaded


def _other_shape(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg_sq"] = torch.zeros(299)


def _not_a_tensor(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg"] = 3.0


def _codes(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["exp_avg"] = torch.zeros(65, 99, dtype=torch.uint8)


def _half_of_a_pair(state_dict: dict[str, Any]) -> None:
    del state_dict["state"][0]["exp_avg"]
    state_dict["state"][0]["exp_avg_codes"] = torch.zeros(65, 99, dtype=torch.uint8)


def _wrong_scales(state_dict: dict[str, Any]) -> None:
    _half_of_a_pair(state_dict)
    state_dict["state"][0]["exp_avg_scales"] = torch.zeros(65, 1, dtype=torch.uint8)


def _twice(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["exp_avg_codes"] = torch.zeros(65, 99, dtype=torch.uint8)
    state_dict["state"][0]["exp_avg_scales"] = torch.zeros(65, 2, dtype=torch.uint8)


def _bad_master(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["master_low"] = torch.zeros(65, 99)


def _bad_step(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["step"] = torch.zeros(2)


def _bad_betas(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["betas"] = (0.9, 1.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_group, r"param groups of \[\] parameters and the optimizer of \[4\]"),
        (
            _a_whole_checkpoint,
            r"state_dict has no 'state' .*what is there: 'optimizer', 'model'.; pass what",
        ),
        (_nothing_of_a_parameter, r"parameter 1 has a NoneType in the place of its states"),
        (_other_shape, r"parameter 1 has a state 'exp_avg_sq' of shape \(299,\).*\(300,\)"),
        (_not_a_tensor, r"parameter 1 has a state 'exp_avg' of type float"),
        (_codes, r"'exp_avg' of dtype torch.uint8"),
        (_half_of_a_pair, r"'exp_avg_codes' without 'exp_avg_scales'"),
        (_wrong_scales, r"'exp_avg_scales' of shape \(65, 1\).*\(65, 2\)"),
        (_twice, r"'exp_avg_codes' together with 'exp_avg'"),
        (_bad_master, r"'master_low' of dtype torch.float32; it must be one of int8"),
        (_bad_step, r"'step' of shape \(2,\)"),
        (_bad_betas, r"betas\[1\]=1.5"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil: Callable[[dict], None], message: str) -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.5), 2)
    twin = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.5), 2)
    state_dict = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.1), 1).state_dict()
    spoil(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same_run(optimizer, twin)
    train(optimizer, 1, first=2)
    train(twin, 1, first=2)
    assert_same_run(optimizer, twin)
