"""State dicts of bitsandbytes, both ways: what is converted, and that training goes on from it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cases import assert_same_bits, make_params, params_of, saved, train
from conversions import FORMATS, assert_same_step, assert_within, copies, dense, named, sharded
from torch import Tensor

import fusedopt

# Their name, our arguments, theirs. The last block of 256 is short.
BITSANDBYTES = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Lion", {"lr": 1e-3, "weight_decay": 0.1}),
    ("AdEMAMix", {"lr": 1e-3, "alpha": 2.0}),
    ("RMSprop", {"lr": 1e-2, "alpha": 0.95}),
    ("Adagrad", {"lr": 1e-1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.1}),
]
SHAPES = [(70, 100), (33,), (2, 9)]


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def test_shards_are_refused_where_blocks_are_the_wholes(bnb: Any, mesh: Any) -> None:
    ours, *_ = sharded(mesh)
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(127, 128\), is a DTensor"):
        fusedopt.to_bitsandbytes(ours)


def bnb_optimizer(bnb: Any, name: str, params: list[torch.nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    if name == "SGD":
        kwargs = {"lr": 1e-2, "momentum": 0.5, **kwargs}
    return getattr(bnb.optim, name + "8bit")(params, **kwargs)


def bnb_states(bnb: Any, held: dict[str, Any]) -> list[Tensor]:
    """Their states decoded by them, those that they stack one by one."""
    values = []
    for number in ("1", "2"):
        codes, absmax = held.get(f"state{number}"), held.get(f"absmax{number}")
        if codes is None:
            continue
        stacked = absmax.dim() == 2 if absmax is not None else "state2" in held and codes.dim() > held["state2"].dim()
        for i in range(len(codes)) if stacked else (...,):
            if absmax is None:
                values.append(codes[i])
            else:
                parts = codes[i].contiguous(), absmax[i].contiguous()
                code = held[f"qmap{number}"]
                values.append(bnb.functional.dequantize_blockwise(parts[0], absmax=parts[1], code=code, blocksize=256))
    return values


@pytest.mark.parametrize(("name", "kwargs"), named(BITSANDBYTES))
def test_bitsandbytes_states_are_read_exactly_and_go_on(bnb: Any, name: str, kwargs: dict[str, Any]) -> None:
    theirs = train(bnb_optimizer(bnb, name, make_params(SHAPES, torch.float32), **kwargs), 5)
    assert theirs.state[params_of(theirs)[0]]["state1"].dtype == torch.uint8
    assert theirs.state[params_of(theirs)[1]]["state1"].dtype == torch.float32
    ours = getattr(fusedopt, name)(copies(theirs), lr=0.5)
    ours.load_state_dict(fusedopt.from_bitsandbytes(ours, saved(theirs.state_dict())))
    for key, value in kwargs.items():
        assert ours.param_groups[0][key] == value
    for param, twin in zip(params_of(ours), params_of(theirs)):
        expected = bnb_states(bnb, theirs.state[twin])
        assert ours.state[param]["step"] == 5
        for spec, value in zip(ours.states(ours.param_groups[0]), expected, strict=True):
            assert_same_bits(ours.state[param][spec.name], value, spec.name)
    assert_same_step(ours, theirs, first=5)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("RMSprop", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "dampening": 0.5})]
)
def test_what_bitsandbytes_does_not_apply_is_not_taken_over(bnb: Any, name: str, kwargs: dict[str, Any]) -> None:
    """They accept it, store it as the second of betas, and step without."""
    theirs = train(bnb_optimizer(bnb, name, make_params(SHAPES, torch.float32), lr=1e-2, **kwargs), 3)
    assert theirs.param_groups[0]["betas"][1] == list(kwargs.values())[-1]
    ours = getattr(fusedopt, name)(copies(theirs))
    ours.load_state_dict(fusedopt.from_bitsandbytes(ours, theirs.state_dict()))
    assert_same_step(ours, theirs, first=3)


@pytest.mark.parametrize(("name", "kwargs"), named(BITSANDBYTES))
def test_bitsandbytes_reads_ours_and_goes_on(bnb: Any, name: str, kwargs: dict[str, Any]) -> None:
    cls = getattr(fusedopt, name)
    ours = train(cls(make_params(SHAPES, torch.float32), **kwargs, **FORMATS["8bit"]), 5)
    state_dict = fusedopt.to_bitsandbytes(ours)
    theirs = bnb_optimizer(bnb, name, copies(ours))
    made = bnb_optimizer(bnb, name, copies(ours), **kwargs)
    theirs.load_state_dict(saved(state_dict))
    train(made, 1)
    group = made.param_groups[0]
    for key in group:
        if key != "params":  # what is missing counts as 0 there
            assert (state_dict["param_groups"][0].get(key) or 0) == (group[key] or 0), key
    for param, twin, third in zip(params_of(ours), params_of(theirs), params_of(made)):
        held = theirs.state[twin]
        assert held["step"] == 5
        for key, value in made.state[third].items():  # as they make it
            if isinstance(value, Tensor):
                assert (held[key].shape, held[key].dtype) == (value.shape, value.dtype), key
                if key.startswith("qmap"):
                    assert_same_bits(held[key], value, key)
        assert held.keys() == made.state[third].keys()
        exact = dense(ours, param)
        for spec, value in zip(ours.states(ours.param_groups[0]), bnb_states(bnb, held), strict=True):
            if "absmax1" not in held:
                assert_same_bits(value, exact[spec.name])
            else:
                number = "1" if spec.is_signed or len(exact) == 1 else "2"
                assert_within(value, exact[spec.name], held[f"qmap{number}"])

    back = cls(copies(ours))
    back.load_state_dict(fusedopt.from_bitsandbytes(back, state_dict))
    assert_same_step(back, theirs, first=5)


@pytest.mark.parametrize(("name", "kwargs"), named(BITSANDBYTES))
def test_without_codes_bitsandbytes_loses_nothing(bnb: Any, name: str, kwargs: dict[str, Any]) -> None:
    ours = train(getattr(fusedopt, name)(make_params(SHAPES, torch.float32), **kwargs), 3)
    state_dict = fusedopt.to_bitsandbytes(ours, min_8bit_size=10**6)
    theirs = bnb_optimizer(bnb, name, copies(ours))
    theirs.load_state_dict(state_dict)
    back = fusedopt.from_bitsandbytes(ours, theirs.state_dict())
    for i, param in enumerate(params_of(ours)):
        for key, value in ours.state[param].items():
            assert_same_bits(back["state"][i][key], value)
    assert_same_step(ours, theirs, first=3)


def old_layout(count: int = 2) -> dict[str, Any]:
    """As releases before 0.44 saved 3000 elements: in blocks of 2048, the tensors beside the step."""
    generator = torch.Generator().manual_seed(0)
    held: dict[str, Any] = {"step": 7}
    for number in "12"[:count]:
        held[f"state{number}"] = torch.randint(256, (30, 100), generator=generator, dtype=torch.uint8)
        held[f"absmax{number}"] = torch.tensor([2.0, 3.0])
        held[f"qmap{number}"] = torch.linspace(float(number) - 2, 1, 256)
    group = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.0, "alpha": 0.0, "initial_lr": 0.5}
    return {"state": {0: held}, "param_groups": [{**group, "params": [0]}]}


def test_older_layouts_are_read() -> None:
    state_dict = old_layout()
    optimizer = fusedopt.AdamW(make_params([(30, 100)], torch.float32))
    result = fusedopt.from_bitsandbytes(optimizer, state_dict)
    scale = torch.tensor([2.0, 3.0]).repeat_interleave(2048)[:3000].reshape(30, 100)
    for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        held = state_dict["state"][0]
        expected = held[f"qmap{number}"][held[f"state{number}"].int()] * scale
        assert_same_bits(result["state"][0][name], expected)
    group = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.0, "initial_lr": 0.5, "params": [0]}
    assert result["param_groups"] == [group]
    optimizer.load_state_dict(result)
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 7


def spoiled(**changes: Any) -> dict[str, Any]:
    state_dict = old_layout()
    state_dict["state"][0].update(changes)
    return state_dict


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ([], "state_dict is a list; pass what"),
        ({"state": {}}, "has no 'param_groups' of an optimizer .what is there: 'state'.; pass what"),
        ({"state": {}, "param_groups": []}, r"groups of \[\] parameters and the optimizer of \[1\]; build"),
        (spoiled(state1=torch.zeros(3)), r"parameter 0 has 'state1' of shape \(3,\); it must be of shape \(30, 100\)"),
        (spoiled(state2=None), "parameter 0 has no tensor 'state2'"),
        (spoiled(qmap2=None), "parameter 0 has no tensor 'qmap2'"),
        (spoiled(absmax1=None), "'absmax1' is missing; only blockwise"),
        (spoiled(absmax2=torch.ones(5)), r"'absmax2' is of shape \(5,\); only blockwise codes, in blocks of 256"),
    ],
)
def test_what_does_not_fit_is_named(state_dict: Any, message: str) -> None:
    optimizer = fusedopt.AdamW(make_params([(30, 100)], torch.float32))
    with pytest.raises(TypeError if isinstance(state_dict, list) else ValueError, match=message):
        fusedopt.from_bitsandbytes(optimizer, state_dict)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_missing_step_and_bad_settings_are_named() -> None:
    optimizer = fusedopt.AdamW(make_params([(30, 100)], torch.float32))
    state_dict = old_layout()
    del state_dict["state"][0]["step"]
    with pytest.raises(ValueError, match="parameter 0 has no 'step'"):
        fusedopt.from_bitsandbytes(optimizer, state_dict)
    state_dict = old_layout()
    state_dict["param_groups"][0]["betas"] = (0.9, 0.999, 0.9999)
    with pytest.raises(ValueError, match="must be a pair"):
        fusedopt.from_bitsandbytes(optimizer, state_dict)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("AdamW", {"amsgrad": True}, "group 0 has the states exp_avg, exp_avg_sq, max_exp_avg_sq here"),
        ("RMSprop", {"momentum": 0.9}, "has the states momentum_buffer, square_avg here; bitsandbytes keeps one"),
        ("RMSprop", {"centered": True}, "has the states square_avg, grad_avg here"),
        ("SGD", {}, "has the states none here"),
        ("SGD", {"momentum": 0.9, "nesterov": True}, "has nesterov=True, which bitsandbytes has not"),
        ("SGD", {"momentum": 0.9, "dampening": 0.5, "maximize": True}, "has maximize=True, dampening=0.5, which"),
        ("Adam", {"weight_decay": 0.1}, "has an L2 penalty"),
        ("Adagrad", {"lr_decay": 0.1}, "lr_decay=0.1"),
    ],
)
def test_what_bitsandbytes_has_not_is_refused(bnb: Any, name: str, kwargs: dict[str, Any], message: str) -> None:
    optimizer = train(getattr(fusedopt, name)(make_params(SHAPES, torch.float32), **kwargs), 1)
    with pytest.raises(ValueError, match=message):
        fusedopt.to_bitsandbytes(optimizer)
    if "has the states" in message and name != "SGD":
        with pytest.raises(ValueError, match="parameter 0 has the states"):
            fusedopt.from_bitsandbytes(optimizer, {**old_layout(), "param_groups": [{"params": [0, 1, 2]}]})


def test_parameters_that_others_do_not_step_are_refused(bnb: Any) -> None:
    optimizer = train(fusedopt.AdamW(make_params([(30, 100)], torch.float64)), 1)
    with pytest.raises(ValueError, match=r"is torch\.float64, and bitsandbytes steps in float32"):
        fusedopt.to_bitsandbytes(optimizer)
    optimizer = train(fusedopt.SGD(make_params([(30, 100)], torch.float32)), 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="has no state momentum_buffer yet; take a step"):
        fusedopt.to_bitsandbytes(optimizer)
    assert fusedopt.to_bitsandbytes(fusedopt.AdamW(make_params([(30, 100)], torch.float32)))["state"] == {}


@pytest.mark.parametrize(
    ("package", "module"), [("bitsandbytes", "bitsandbytes.functional"), ("torchao", "torchao.optim.subclass_8bit")]
)
def test_what_to_install_is_said(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write = getattr(fusedopt, "to_" + package)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        write(fusedopt.AdamW(make_params([(2, 3)], torch.float32)))


@pytest.mark.parametrize("convert", [fusedopt.from_bitsandbytes, fusedopt.from_torchao])
def test_an_optimizer_of_others_is_refused(convert: Any) -> None:
    theirs = torch.optim.AdamW(make_params([(3,)], torch.float32))
    with pytest.raises(TypeError, match="optimizer is a AdamW; pass an optimizer of fusedopt"):
        convert(theirs, theirs.state_dict())
