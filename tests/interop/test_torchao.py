"""State dicts of torchao, both ways: what is converted, and that training goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits, make_params, params_of, peer, saved, train
from conversions import FORMATS, assert_same_step, assert_within, copies, dense, sharded
from torch import Tensor

import fusedopt
from fusedopt.interop.shared import imported

SHAPES = [(64, 96), (50, 90), (33,)]  # 24 blocks of 256; as many elements, but not in whole blocks; few


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its optimizers; what they compile in every first step is run as it is written."""
    module = peer("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_states_are_read_exactly_and_go_on(torchao: Any, name: str) -> None:
    kwargs = {"weight_decay": 0.1, "betas": (0.8, 0.99)}
    params = make_params(SHAPES, torch.float32)
    theirs = train(getattr(torchao, name)(params, lr=1e-2, **kwargs), 5)
    assert type(theirs.state[params[0]]["exp_avg"]) is not Tensor
    ours = (fusedopt.AdamW if "W" in name else fusedopt.Adam)(copies(theirs))
    result = fusedopt.from_torchao(ours, saved(theirs.state_dict()))
    ours.load_state_dict(result)
    for key, value in kwargs.items():
        assert ours.param_groups[0][key] == value
    assert type(ours.param_groups[0]["lr"]) is float
    for i, (param, twin) in enumerate(zip(params_of(ours), params)):
        assert ours.state[param].keys() == theirs.state[twin].keys()
        for key, value in theirs.state[twin].items():
            is_plain = type(value) is Tensor
            assert type(result["state"][i][key]) is Tensor
            assert_same_bits(ours.state[param][key], value if is_plain else value.dequantize(), key)
    assert_same_step(ours, theirs, first=5)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_torchao_reads_ours_and_goes_on(torchao: Any, amsgrad: bool) -> None:
    kwargs = {"weight_decay": 0.1, "betas": (0.8, 0.99), "amsgrad": amsgrad}
    ours = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=1e-2, **kwargs, **FORMATS["8bit"]), 5)
    state_dict = fusedopt.to_torchao(ours)
    theirs = torchao.AdamW8bit(copies(ours))
    theirs.load_state_dict(saved(state_dict))
    made = train(torchao.AdamW8bit(copies(ours)), 1)  # cannot step with amsgrad, whose maxima it cannot read
    for param, twin, third in zip(params_of(ours), params_of(theirs), params_of(made)):
        held = theirs.state[twin]
        assert held["step"] == 5
        assert held.keys() == {"step", *dense(ours, param)}
        for key, exact in dense(ours, param).items():
            assert type(held[key]) is type(made.state[third].get(key, exact))
            assert held[key].shape == param.shape
            if type(held[key]) is Tensor:
                assert_same_bits(held[key], exact)
                continue
            assert held[key].signed == made.state[third][key].signed == (key == "exp_avg")
            assert held[key].block_size == 256
            assert_within(held[key].dequantize(), exact, held[key].qmap)

    back = fusedopt.AdamW(copies(ours))
    back.load_state_dict(fusedopt.from_torchao(back, state_dict))
    assert_same_step(back, theirs, first=5)


def test_torchao_states_of_bfloat16_parameters(torchao: Any) -> None:
    """Plain states have the parameter's dtype there; both ways they are what they were."""
    theirs = train(torchao.AdamW8bit(make_params(SHAPES, torch.bfloat16)), 3)
    ours = fusedopt.AdamW(copies(theirs))
    ours.load_state_dict(fusedopt.from_torchao(ours, theirs.state_dict()))
    again = torchao.AdamW8bit(copies(theirs))
    again.load_state_dict(fusedopt.to_torchao(ours))
    for param, twin in zip(params_of(theirs), params_of(again)):
        for key, value in theirs.state[param].items():
            if type(value) is Tensor:
                assert_same_bits(again.state[twin][key], value, key)
            else:  # decoded and rounded to the nearest again, it is itself
                assert torch.equal(again.state[twin][key].codes, value.codes)


def test_one_that_is_made_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_for_another.py").write_text("raise AttributeError('torch has no such thing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"made_for_another, which does not load: torch has no such thing; install a"):
        imported("made_for_another", "made_for_another")


def test_torchao_shards(torchao: Any, mesh: Any) -> None:
    """A shard is quantized by itself, as torchao quantizes its own, and read again."""
    from torch.distributed.tensor import DTensor

    ours, param, theirs, _ = sharded(mesh)
    state_dict = fusedopt.to_torchao(ours)
    value = state_dict["state"][0]["exp_avg"]
    assert isinstance(value, DTensor)
    assert value.shape == param.shape
    exact = fusedopt.to_torch_state_dict(theirs)["state"][0]["exp_avg"][:64]
    assert_within(value.to_local().dequantize(), exact, value.to_local().qmap)
    read = fusedopt.from_torchao(ours, state_dict)["state"][0]["exp_avg"]
    assert isinstance(read, DTensor)
    assert_same_bits(read.to_local(), value.to_local().dequantize())
    ours.load_state_dict(fusedopt.from_torchao(ours, state_dict))
    torchao.AdamW8bit([param]).load_state_dict(state_dict)


def test_what_torchao_has_not_is_refused(torchao: Any) -> None:
    optimizer = train(fusedopt.SGD(make_params([(2, 3)], torch.float32), momentum=0.9), 1)
    with pytest.raises(ValueError, match="group 0 has the states momentum_buffer, and torchao's"):
        fusedopt.to_torchao(optimizer)
    optimizer = train(fusedopt.AdamW(make_params([(2, 3)], torch.float32), maximize=True), 1)
    with pytest.raises(ValueError, match="maximize=True"):
        fusedopt.to_torchao(optimizer)
    with pytest.raises(ValueError, match="parameter 0 has no tensor 'exp_avg'; it must be of shape"):
        fusedopt.from_torchao(optimizer, {"state": {0: {"step": 1.0}}, "param_groups": [{"params": [0]}]})
