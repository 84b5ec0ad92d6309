"""State that is made before the first step, and groups in state dicts that lack what was never set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ADAFACTOR, CASES, Case, assert_same_bits, assert_same_run, make_params, params_of, saved, train

import fusedopt
from fusedopt.engine.options import OWN_DEFAULTS

SHAPES = [(65, 99), (300,), ()]


def kwargs_of(case: Case) -> dict[str, Any]:
    return {**case.kwargs, "state_dtype": "8bit", "min_quantized_numel": 1, "master_weights": "split24"}


@pytest.mark.parametrize("case", [*CASES, ADAFACTOR], ids=lambda case: case.name)
def test_init_state_makes_what_the_first_step_would(case: Case) -> None:
    optimizer, twin = (case.ours(make_params(SHAPES, torch.bfloat16), **kwargs_of(case)) for _ in range(2))
    before = [param.detach().clone() for param in params_of(optimizer)]
    optimizer.init_state()
    assert all(torch.equal(param, held) for param, held in zip(params_of(optimizer), before))
    assert all(float(held["step"]) == 0 for held in optimizer.state.values())
    train(twin, 1)
    for param, other in zip(params_of(optimizer), params_of(twin)):
        assert optimizer.state[param].keys() == twin.state[other].keys()
        for key, value in twin.state[other].items():
            assert (optimizer.state[param][key].shape, optimizer.state[param][key].dtype) == (value.shape, value.dtype)
    held = optimizer.state[params_of(optimizer)[0]]["step"]
    optimizer.init_state()
    assert optimizer.state[params_of(optimizer)[0]]["step"] is held
    train(optimizer, 1)
    assert_same_run(optimizer, twin)


def test_init_state_is_for_what_trains_and_checks_all_first() -> None:
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.AdamW([frozen, trained])
    optimizer.init_state()
    assert list(optimizer.state) == [trained]
    bad = fusedopt.AdamW([trained, torch.nn.Parameter(torch.ones(3, device="meta"))])
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*is on the meta device"):
        bad.init_state()
    assert not bad.state


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_step_that_only_wants_state_does_not_count(lr: Any) -> None:
    """torch.distributed.checkpoint takes one with an lr and gradients of 0, to have state to load into."""
    optimizer = fusedopt.SGD(make_params(SHAPES, torch.float32), lr=lr, momentum=0.9, weight_decay=0.1)
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for held in optimizer.state.values():
        assert float(held["step"]) == 0
        assert not held["momentum_buffer"].any(), "the weights went into it"
    # With state, or a gradient, or an lr, it is a step as any other.
    optimizer.step()
    assert all(float(held["step"]) == 1 for held in optimizer.state.values())
    for lr, value in ((0.0, 1.0), (0.1, 0.0)):
        other = fusedopt.SGD(make_params(SHAPES, torch.float32), lr=lr, momentum=0.9)
        for param in params_of(other):
            param.grad = torch.full_like(param, value)
        other.step()
        assert all(float(held["step"]) == 1 for held in other.state.values())


def test_groups_in_state_dicts_lack_what_was_never_set() -> None:
    first, second = make_params([(65, 99), (65, 99)], torch.float32)
    optimizer = fusedopt.AdamW([{"params": [first]}, {"params": [second], "state_dtype": "8bit"}], seed=3)
    groups = optimizer.state_dict()["param_groups"]
    assert OWN_DEFAULTS.keys() & groups[0].keys() == {"seed"}
    assert OWN_DEFAULTS.keys() & groups[1].keys() == {"seed", "state_dtype"}
    # What was set back to its default is told.
    optimizer.param_groups[0]["seed"] = 0
    assert optimizer.state_dict()["param_groups"][0]["seed"] == 0
    assert {*torch.optim.AdamW([first]).param_groups[0]} <= {*groups[0], "decoupled_weight_decay", "params"}


def test_loading_fills_in_what_state_dicts_lack() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 2)
    other = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    other.load_state_dict(saved(optimizer.state_dict()))
    assert {key: other.param_groups[0][key] for key in OWN_DEFAULTS} == OWN_DEFAULTS
    # As with torch's, what it was made with stays.
    other = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=2.0, state_dtype="bfloat16")
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["max_grad_norm"] == 2.0
    assert other.state[params_of(other)[0]]["exp_avg"].dtype == torch.bfloat16


def test_what_split32_kept_as_int16_is_loaded() -> None:
    """Its name was that of split24's, and its dtype one that no collective sends."""
    kwargs = {"master_weights": "split32", "lr": 1e-2}
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), **kwargs), 2)
    state_dict = saved(optimizer.state_dict())
    for held in state_dict["state"].values():
        held["master_low"] = held.pop("master_low16").view(torch.int16)
    other = fusedopt.AdamW([param.detach().clone().requires_grad_() for param in params_of(optimizer)], **kwargs)
    other.load_state_dict(state_dict)
    for param, twin in zip(params_of(other), params_of(optimizer)):
        assert_same_bits(other.state[param]["master_low16"], optimizer.state[twin]["master_low16"])
        assert "master_low" not in other.state[param]
    train(other, 1, first=2)
    train(optimizer, 1, first=2)
    assert_same_run(other, optimizer)
