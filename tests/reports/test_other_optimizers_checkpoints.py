"""State dicts of other optimizers: what decides stays with the class, and half a state is no state.

Reports: pytorch/pytorch#144972 (AdamW and the state dicts of what it is derived from), and
HRNet/HRNet-Semantic-Segmentation#252 (a state that is not this optimizer's steps wrongly after resuming).
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, train

import fusedopt

SHAPES = [(64, 128), (70,)]
# With momentum where there may be none: an optimizer without state takes any.
MAKES = {case.name: (case.ours, {**case.kwargs}) for case in CASES}
MAKES["sgd"] = (fusedopt.SGD, {"lr": 1e-2, "momentum": 0.9})
MAKES["rmsprop"] = (fusedopt.RMSprop, {"lr": 1e-2, "momentum": 0.9})


def make(name: str) -> fusedopt.FusedOptimizer:
    cls, kwargs = MAKES[name]
    return cls(make_params(SHAPES, torch.float32), **kwargs)


def keys_of(optimizer: torch.optim.Optimizer) -> set[str]:
    return set(next(iter(optimizer.state.values())))


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(MAKES, 2)), ids=lambda name: name)
def test_a_state_is_loaded_whole_or_refused(source: str, target: str) -> None:
    saved = train(make(source), 3).state_dict()
    taker = train(make(target), 2)
    before = copy.deepcopy(taker)
    needed = keys_of(taker)
    missing = needed - set(saved["state"][0])
    if not missing and len(saved["param_groups"][0].get("betas", ())) == len(taker.defaults.get("betas", ())):
        taker.load_state_dict(saved)
        for param, held in zip(taker.param_groups[0]["params"], saved["state"].values()):
            assert all(torch.equal(taker.state[param][name], held[name]) for name in needed)
        return
    with pytest.raises(ValueError, match=r"lacks|betas|alpha") as error:  # or a setting that does not fit either
        taker.load_state_dict(saved)
    if "lacks" in str(error.value):
        assert all(repr(name) in str(error.value) for name in missing)
        assert type(taker).__name__ in str(error.value)
    assert_same_run(taker, before)
    assert str(taker) == str(before)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("source", [fusedopt.Adam, torch.optim.Adam])
def test_decoupled_weight_decay_stays_with_the_class(source: type[torch.optim.Optimizer], amsgrad: bool) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.5, "amsgrad": amsgrad}
    saved = train(source(make_params(SHAPES, torch.float32), **options), 3)
    ours, theirs = (cls(make_params(SHAPES, torch.float32), **options) for cls in (fusedopt.AdamW, torch.optim.AdamW))
    ours.load_state_dict(saved.state_dict())
    assert ours.param_groups[0]["decoupled_weight_decay"] is True
    kept = fusedopt.AdamW(make_params(SHAPES, torch.float32), **options)
    kept.load_state_dict({**saved.state_dict(), "param_groups": kept.state_dict()["param_groups"]})
    assert_same_run(train(ours, 2, first=3), train(kept, 2, first=3))
    if "decoupled_weight_decay" in theirs.param_groups[0]:  # torch has it since 2.7
        theirs.load_state_dict(saved.state_dict())
        assert theirs.param_groups[0]["decoupled_weight_decay"] is True


def test_a_parameter_without_any_state_is_no_half_state() -> None:
    """Not every parameter has had a gradient, and masters come before the first step."""
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = fusedopt.AdamW(params, master_weights="float32")
    model = torch.nn.ParameterList(params)
    fusedopt.load_fp32_parameters(optimizer, model, fusedopt.fp32_parameters(optimizer, model))
    other = fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), master_weights="float32")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_run(train(other, 1), train(optimizer, 1))
    saved = torch.optim.SGD(make_params(SHAPES, torch.float32), momentum=0.9).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    fusedopt.SGD(make_params(SHAPES, torch.float32), momentum=0.9).load_state_dict(saved)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_torchs], ids=lambda case: case.name)
def test_torchs_state_of_the_same_optimizer_is_whole(case: Case) -> None:
    for variant in case.variants:
        kwargs = {**case.kwargs, **variant}
        theirs = train(case.build_theirs(make_params(SHAPES, torch.float32), kwargs), 2)
        ours = case.ours(make_params(SHAPES, torch.float32), **kwargs)
        ours.load_state_dict(theirs.state_dict())
        assert all(float(ours.state[param]["step"]) >= 1 for param in ours.state if "step" in ours.state[param])
