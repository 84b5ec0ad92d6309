"""Options that are set in param groups between steps: checked like those of a constructor, and in the same forms.

torch computes with whatever stands there. Typical are values by which other libraries turn clipping off (0 or -1), and
formats as torch.dtypes.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, params_of, set_grads, train

import fusedopt
from fusedopt.storage import masters

SHAPES = [(3,), (66, 64)]
# Taken for torch's sake, whatever they are; and the learning rate, which schedulers set.
UNCHECKED = {"foreach", "fused", "capturable", "lr"}

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def groups() -> list[dict[str, Any]]:
    return [{"params": make_params([shape], torch.float32, seed)} for seed, shape in enumerate(SHAPES)]


def new(case: Case, **kwargs: Any) -> Any:
    return case.ours(groups(), **{**case.kwargs, **kwargs})


@rows
def test_every_option_is_checked_before_anything_moves(case: Case) -> None:
    for steps in (0, 1):
        optimizer, untouched = (train(new(case), steps) for _ in range(2))
        for option in optimizer.defaults.keys() - optimizer.own_defaults().keys() - UNCHECKED:
            with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b.*nonsense"):
                new(case, **({option: "nonsense"} if option != "compensation_buffer_dtype" else {}))
            optimizer.param_groups[1][option], was = "nonsense", optimizer.param_groups[1][option]
            with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b.*nonsense"):
                train(optimizer, 1)
            optimizer.param_groups[1][option] = was
            assert_same_run(optimizer, untouched)
        assert_same_run(train(optimizer, 2), train(untouched, 2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_grad_norm", 0),
        ("max_grad_norm", -1.0),
        ("betas", (0.9, 1.5)),
        ("betas", [0.9]),
        ("weight_decay", None),
        ("nonfinite", "skip-block"),
        ("seed", 2**33),
        ("differentiable", True),
    ],
)
@pytest.mark.parametrize("way", ["step", "compiled", "released", "init_state"])
def test_every_way_to_step_checks(option: str, value: Any, way: str) -> None:
    """With the constructor's sentence; torch.compile adds some of its own."""
    with pytest.raises((TypeError, ValueError)) as expected:
        fusedopt.AdamW(make_params(SHAPES, torch.float32), **{option: value})
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    params = params_of(optimizer)
    before = [param.detach().clone() for param in params]
    set_grads(params, 0)
    if way == "released":
        optimizer.zero_grad()
        fusedopt.release_gradients(optimizer, bucket_numel=1)
    optimizer.param_groups[0][option] = value
    take = {
        "step": optimizer.step,
        "compiled": torch.compile(optimizer.step, backend="eager"),
        "released": lambda: sum(param.sum() for param in params).backward(),
        "init_state": optimizer.init_state,
    }[way]
    with pytest.raises(Exception) as found:
        take()
    assert str(expected.value) in str(found.value)
    assert way == "compiled" or type(found.value) is expected.type
    assert all(torch.equal(param, was) for param, was in zip(params, before))


def test_a_list_that_is_written_to_is_an_edit() -> None:
    optimizer = train(fusedopt.AdamW(groups(), betas=[0.9, 0.99]), 1)
    optimizer.param_groups[1]["betas"][1] = 2
    with pytest.raises(ValueError, match=r"betas\[1\]=2.0 is outside"):
        train(optimizer, 1)


@pytest.mark.parametrize("way", ["stepped", "loaded", "copied", "pickled"])
def test_formats_that_are_set_before_the_next_step_are_noticed(way: str) -> None:
    optimizer = train(fusedopt.AdamW(groups(), min_quantized_numel=1), 1)
    if way == "loaded":
        loaded = fusedopt.AdamW(groups(), min_quantized_numel=1)
        loaded.load_state_dict(optimizer.state_dict())
        optimizer = loaded
    elif way == "copied":
        optimizer = copy.deepcopy(optimizer)
    elif way == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.param_groups[1]["state_dtype"] = "8bit"
    with pytest.raises(ValueError, match="state_dtype='8bit' was set in group 1, but parameter 0"):
        train(optimizer, 1, first=1)
    optimizer.load_state_dict(optimizer.state_dict())  # as the error says
    train(optimizer, 1, first=1)
    assert "exp_avg_codes" in optimizer.state[params_of(optimizer)[1]]


def test_forms_of_the_constructor_are_taken() -> None:
    edits = {
        "betas": np.array([0.5, 0.75]),
        "eps": np.float32(2**-20),
        "state_dtype": {"exp_avg": torch.bfloat16},
        "master_weights": "kahan",
        "maximize": 1,
        "step_device": torch.device("cpu"),
    }
    edited, passed = fusedopt.AdamW(groups()), fusedopt.AdamW(groups(), **edits)
    for group in edited.param_groups:
        group.update(copy.deepcopy(edits))
        group["params"] = tuple(group["params"])
    assert_same_run(train(edited, 3), train(passed, 3))
    for ours, theirs in zip(edited.param_groups, passed.param_groups):
        assert {**ours, "params": None} == {**theirs, "params": None}
        assert type(ours["params"]) is list


def test_a_learning_rate_below_zero_is_stepped_with_as_in_torch() -> None:
    """Schedules come to one by rounding at their end."""
    runs = []
    for cls in (fusedopt.SGD, torch.optim.SGD):
        optimizer = cls(make_params([(2,)], torch.float32), lr=1.0)
        optimizer.param_groups[0].update(lr=-0.5, weight_decay=0.25)
        runs.append(train(optimizer, 2))
    assert torch.equal(*(params_of(optimizer)[0] for optimizer in runs))


@rows
def test_options_that_are_missing_are_the_defaults(case: Case) -> None:
    """As in a group that was appended to param_groups, or a pickle of an earlier version."""
    whole, bare = new(case), new(case)
    bare.param_groups[1] = {"params": bare.param_groups[1]["params"], "lr": bare.param_groups[1]["lr"]}
    assert_same_run(train(bare, 2), train(whole, 2))
    pickled = bare.__getstate__()
    newer = ("nonfinite", "step_device", "reserve_bytes", "skip_step_above")
    for options in (pickled["defaults"], *pickled["param_groups"]):
        for option in newer:
            del options[option]
    older = case.ours.__new__(case.ours)
    older.__setstate__(copy.deepcopy(pickled))
    assert_same_run(train(older, 1, first=2), train(whole, 1, first=2))


@pytest.mark.parametrize("option", ["maximize", "amsgrad", "decoupled_weight_decay"])
def test_flags_are_flags(option: str) -> None:
    """The text "False", as a configuration may have it, is no flag; 1 and 0 are, as in torch."""
    for value in ("False", None, 2, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{option}=.*; pass True or False"):
            fusedopt.Adam(groups(), **{option: value})
    runs = [train(fusedopt.Adam(groups(), weight_decay=0.5, **{option: value}), 2) for value in (1, True)]
    assert_same_run(*runs)


def test_released_gradients_are_not_stepped_in_evaluation() -> None:
    """What forbids a step forbids it in the backward pass, too."""
    params = make_params([(3,)], torch.float32)
    optimizer = fusedopt.AdamWScheduleFree(params)
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    optimizer.eval()
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"call the optimizer's train\(\) before step\(\)"):
        params[0].sum().backward()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("now", ["bfloat16", "8bit", {"exp_avg": "float16"}])
def test_a_format_for_states_that_there_are_says_how_to_convert_them(now: Any) -> None:
    edited, loaded = (train(fusedopt.AdamW(groups()), 2) for _ in range(2))
    edited.param_groups[1]["state_dtype"] = now
    with pytest.raises(ValueError, match=r"'exp_avg' in float32 already; call optimizer.load_state_dict\("):
        train(edited, 1)
    assert_same_run(edited, loaded)
    edited.load_state_dict(edited.state_dict())
    state_dict = copy.deepcopy(loaded.state_dict())
    state_dict["param_groups"][1]["state_dtype"] = now
    loaded.load_state_dict(state_dict)
    assert_same_run(train(edited, 2, first=2), train(loaded, 2, first=2))
    edited.param_groups[1]["min_quantized_numel"] = 2**20  # which asks for nothing else, but where there are 8 bits
    if now == "8bit":
        with pytest.raises(ValueError, match=r"min_quantized_numel=1048576 .* 'exp_avg' in 8bit already"):
            train(edited, 1)
    else:
        train(edited, 1)


@pytest.mark.parametrize("before", ["kahan", "split24", "split32", "float32", None])
@pytest.mark.parametrize("now", ["kahan", "split24", "split32", "float32", None])
def test_weights_that_are_kept_beside_parameters_are_not_lost(before: Any, now: Any) -> None:
    """They would begin anew with the rounded parameter, or with what they were when they were last asked for."""
    model = torch.nn.Linear(64, 66, dtype=torch.bfloat16)
    optimizer = train(fusedopt.AdamW(model.parameters(), master_weights=before), 2)
    weights = fusedopt.fp32_parameters(optimizer, model)
    optimizer.param_groups[0]["master_weights"] = now
    if before not in (now, None):
        with pytest.raises(ValueError, match="take the weights with fp32_parameters before setting it"):
            train(optimizer, 1)
    if before != now:
        fusedopt.load_fp32_parameters(optimizer, model, weights)
    if now in ("split32", "float32"):
        for name, weight in fusedopt.fp32_parameters(optimizer, model).items():
            assert torch.equal(weight, weights[name])
    twin = copy.deepcopy((model, optimizer))
    assert_same_run(train(optimizer, 2, first=2), train(twin[1], 2, first=2))
    assert {key for key in optimizer.state[model.weight] if "master" in key or key == "compensation"} == (
        set() if now is None else {masters.KEYS[now]}
    )
