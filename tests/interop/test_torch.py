"""State dicts for torch's optimizers: what is converted, and that training goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same_bits, make_params, params_of, saved, train
from conversions import FORMATS, assert_same_step, copies, dense, named, sharded

import fusedopt
from fusedopt.engine.options import Options, TorchFlags

# Two that 8 bits take (4550 elements, the last of their rows' blocks short) and some that they do not.
SHAPES = [(65, 70), (3, 30, 64), (300,), (), (1, 7)]
TORCH = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-2, "amsgrad": True}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("SGD", {"lr": 1e-2}),
    ("RMSprop", {"lr": 1e-2}),
    ("RMSprop", {"lr": 1e-2, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 1e-1, "initial_accumulator_value": 0.1}),
]


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize(("name", "kwargs"), named(TORCH))
def test_torch_reads_what_was_stored_and_goes_on(name: str, kwargs: dict[str, Any], state_format: str) -> None:
    if "centered" in kwargs and state_format in ("bf16", "fp16"):
        pytest.skip("torch takes the root of a variance that rounding made negative")
    ours = train(getattr(fusedopt, name)(make_params(SHAPES, torch.float32), **kwargs, **FORMATS[state_format]), 4)
    state_dict = saved(fusedopt.to_torch_state_dict(ours))
    theirs = getattr(torch.optim, name)(copies(ours), lr=0.5, momentum=0.5) if name == "SGD" else None
    theirs = theirs or getattr(torch.optim, name)(copies(ours))
    theirs.load_state_dict(state_dict)
    for param, twin in zip(params_of(ours), params_of(theirs)):
        expected = {"step": ours.state[param]["step"], **dense(ours, param)}
        assert theirs.state[twin].keys() == expected.keys()
        for key, value in expected.items():
            assert_same_bits(theirs.state[twin][key], value, key)
    assert theirs.param_groups[0]["lr"] == kwargs["lr"]

    back = getattr(fusedopt, name)(copies(ours))
    back.load_state_dict(state_dict)
    for param, twin in zip(params_of(ours), params_of(back)):
        assert "step" in back.state[twin]
        for key, value in dense(ours, param).items():
            assert_same_bits(back.state[twin][key], value, key)
    assert_same_step(back, theirs, first=4)


@pytest.mark.parametrize(("name", "kwargs"), named(TORCH))
def test_loading_it_stores_it_again(name: str, kwargs: dict[str, Any]) -> None:
    """In 16 bits exactly; in 8 bits exactly but in the few blocks whose scale was chosen before rounding."""
    cls = getattr(fusedopt, name)
    for state_format in ("bf16", "8bit"):
        ours = train(cls(make_params(SHAPES, torch.float32), **kwargs, **FORMATS[state_format]), 4)
        back = cls(copies(ours), **FORMATS[state_format])
        back.load_state_dict(fusedopt.to_torch_state_dict(ours))
        for param, twin in zip(params_of(ours), params_of(back)):
            assert ours.state[param].keys() == back.state[twin].keys()
            exact, again = dense(ours, param), dense(back, twin)
            for key, value in exact.items():
                if state_format == "bf16":
                    assert_same_bits(again[key], value, key)
                    continue
                # The largest of a block has a code of 127 / sqrt(2) at least, and codes are squares of steps, so
                # that half a step is below 1/90 of it.
                assert ((again[key] - value).abs() <= value.abs().max() / 90).all(), key
                assert (again[key] != value).float().mean() < 0.05, key


def test_only_settings_of_this_package_are_left_out() -> None:
    optimizer = fusedopt.AnyPrecisionAdamW([("weight", make_params([(2, 3)], torch.float32)[0])])
    optimizer.param_groups[0]["initial_lr"] = 0.25
    lost = {*Options.__annotations__, "compensation_buffer_dtype"} - {*TorchFlags.__annotations__}
    group = fusedopt.to_torch_state_dict(optimizer)["param_groups"][0]
    assert optimizer.param_groups[0].keys() - group.keys() == {*lost, "params"} - group.keys()
    assert group["initial_lr"] == 0.25
    assert group["param_names"] == ["weight"]


@pytest.mark.parametrize("master_weights", ["kahan", "split24", "split32", "float32"])
def test_masters_are_left_out(master_weights: str) -> None:
    params = make_params([(65, 70)], torch.bfloat16)
    optimizer = train(fusedopt.AdamW(params, master_weights=master_weights), 2)
    assert len(optimizer.state[params[0]]) == 4
    assert set(fusedopt.to_torch_state_dict(optimizer)["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_what_is_converted_are_copies_and_others_entries_stay() -> None:
    params = make_params([(65, 70)], torch.float32)
    lr = torch.tensor(0.125)
    optimizer = train(fusedopt.AdamW(params, lr=lr), 1)
    optimizer.state[params[0]]["mine"] = torch.ones(3)
    result = fusedopt.to_torch_state_dict(optimizer)
    for key, value in optimizer.state[params[0]].items():
        assert_same_bits(result["state"][0][key], value)
        assert result["state"][0][key].data_ptr() != value.data_ptr()
    assert result["param_groups"][0]["lr"] is not lr


def test_double_and_unstepped_parameters() -> None:
    params = make_params([(4, 5)], torch.float64) + make_params([(4, 5)], torch.float32)
    optimizer = fusedopt.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    result = fusedopt.to_torch_state_dict(optimizer)
    assert list(result["state"]) == [0]
    assert_same_bits(result["state"][0]["exp_avg"], optimizer.state[params[0]]["exp_avg"])
    assert result["state"][0]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_shards_are_decoded_where_they_are(mesh: Any, state_dtype: str) -> None:
    from torch.distributed.tensor import DTensor, Shard

    ours, param, theirs, _ = sharded(mesh, state_dtype=state_dtype)
    result, expected = fusedopt.to_torch_state_dict(ours), fusedopt.to_torch_state_dict(theirs)
    for key in ("exp_avg", "exp_avg_sq"):
        value = result["state"][0][key]
        assert isinstance(value, DTensor)
        assert value.shape == param.shape
        assert value.placements == (Shard(0),)
        assert_same_bits(value.to_local(), expected["state"][0][key][:64])
    fusedopt.AdamW([param]).load_state_dict(result)
