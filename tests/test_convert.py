"""State dicts of torch, bitsandbytes and torchao: what is converted, and that training goes on from it."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits, make_params, train
from torch import Tensor

import fusedopt
from fusedopt.engine.options import Options, TorchFlags
from fusedopt.storage.quantization import decode

# Two that 8 bits take (4550 elements, the last of their rows' blocks short) and some that they do not.
SHAPES = [(65, 70), (3, 30, 64), (300,), (), (1, 7)]
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {"state_dtype": "float32"},
    "bf16": {"state_dtype": "bfloat16"},
    "fp16": {"state_dtype": "float16"},
    "8bit": {"state_dtype": "8bit", "min_quantized_numel": 64},
}
TORCH = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-2, "amsgrad": True}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("SGD", {"lr": 1e-2}),
    ("RMSprop", {"lr": 1e-2}),
    ("RMSprop", {"lr": 1e-2, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 1e-1, "initial_accumulator_value": 0.1}),
]
# Their name, our arguments, theirs. The last block of 256 is short.
BITSANDBYTES = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Lion", {"lr": 1e-3, "weight_decay": 0.1}),
    ("AdEMAMix", {"lr": 1e-3, "alpha": 2.0}),
    ("RMSprop", {"lr": 1e-2, "alpha": 0.95}),
    ("Adagrad", {"lr": 1e-1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.8, "weight_decay": 0.1}),
]
BNB_SHAPES = [(70, 100), (33,), (2, 9)]
AO_SHAPES = [(64, 96), (50, 90), (33,)]  # 24 blocks of 256; as many elements, but not in whole blocks; few


def named(rows: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [pytest.param(*row, id="-".join((row[0], *map(str, list(row[1])[1:])))) for row in rows]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    memory = io.BytesIO()
    torch.save(state_dict, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def copies(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]


def dense(optimizer: fusedopt.FusedOptimizer, param: Tensor) -> dict[str, Tensor]:
    """What the states of a parameter stand for."""
    held = optimizer.state[param]
    values = {}
    for spec in optimizer.STATES:
        keys = spec.keys_in(held)
        if len(keys) == 2:
            values[spec.name] = decode(*(held[key] for key in keys), is_signed=spec.is_signed)
        elif keys:
            values[spec.name] = held[spec.name].float()
    return values


def assert_same_step(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, first: int) -> None:
    """One step of both, from the same weights and states.

    Both compute in float32, in another order: some ten roundings of an update that is below 1, and one of the
    weight, 2^-24 of it each.
    """
    before = copies(ours)
    train(ours, 1, first=first)
    train(theirs, 1, first=first)
    assert max((param - old).abs().max().item() for param, old in zip(params_of(ours), before)) > 5e-4
    for param, twin in zip(params_of(ours), params_of(theirs)):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def assert_within(values: Tensor, exact: Tensor, qmap: Tensor) -> None:
    """Codes in blocks of 256: off by at most half the widest gap of the map, in units of the block's largest.

    The largest itself, where negative, has a code that is as far away. A millionth is for the division by it.
    """
    error, sizes = (values - exact).abs().flatten(), exact.abs().flatten()
    missing = -len(sizes) % 256
    largest = torch.nn.functional.pad(sizes, (0, missing)).view(-1, 256).amax(1).repeat_interleave(256)[: len(sizes)]
    assert (error <= (qmap.diff().max() / 2 + 1e-6) * largest).all()


# ---- torch -------------------------------------------------------------------------------------------


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
    assert optimizer.state_dict()["param_groups"][0].keys() - group.keys() == lost
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


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One rank of two, whose collectives do nothing."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def sharded(mesh: Any, **kwargs: Any) -> tuple[fusedopt.AdamW, torch.nn.Parameter, fusedopt.AdamW, torch.nn.Parameter]:
    """The first 64 of 127 rows of a parameter, and the same rows whole, both stepped."""
    from torch.distributed.tensor import DTensor, Shard

    whole = torch.randn(127, 128, generator=torch.Generator().manual_seed(0))

    def shard(tensor: Tensor) -> Tensor:
        return DTensor.from_local(
            tensor[:64].clone(), mesh, [Shard(0)], run_check=False, shape=(127, 128), stride=(128, 1)
        )

    param, twin = torch.nn.Parameter(shard(whole)), torch.nn.Parameter(whole.clone())
    ours, theirs = fusedopt.AdamW([param], **kwargs), fusedopt.AdamW([twin], **kwargs)
    param.grad, twin.grad = shard(whole.sin()), whole.sin()
    ours.step()
    theirs.step()
    return ours, param, theirs, twin


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


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def test_shards_are_refused_where_blocks_are_the_wholes(bnb: Any, mesh: Any) -> None:
    ours, *_ = sharded(mesh)
    with pytest.raises(ValueError, match=r"parameter 0, of shape \(127, 128\), is a DTensor"):
        fusedopt.to_bitsandbytes(ours)


# ---- bitsandbytes ------------------------------------------------------------------------------------


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
    theirs = train(bnb_optimizer(bnb, name, make_params(BNB_SHAPES, torch.float32), **kwargs), 5)
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
    theirs = train(bnb_optimizer(bnb, name, make_params(BNB_SHAPES, torch.float32), lr=1e-2, **kwargs), 3)
    assert theirs.param_groups[0]["betas"][1] == list(kwargs.values())[-1]
    ours = getattr(fusedopt, name)(copies(theirs))
    ours.load_state_dict(fusedopt.from_bitsandbytes(ours, theirs.state_dict()))
    assert_same_step(ours, theirs, first=3)


@pytest.mark.parametrize(("name", "kwargs"), named(BITSANDBYTES))
def test_bitsandbytes_reads_ours_and_goes_on(bnb: Any, name: str, kwargs: dict[str, Any]) -> None:
    cls = getattr(fusedopt, name)
    ours = train(cls(make_params(BNB_SHAPES, torch.float32), **kwargs, **FORMATS["8bit"]), 5)
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
    ours = train(getattr(fusedopt, name)(make_params(BNB_SHAPES, torch.float32), **kwargs), 3)
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
        ([], "has no dict 'state'; pass what"),
        ({"state": {}}, "has no list 'param_groups'"),
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
    with pytest.raises(ValueError, match=message):
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
    optimizer = train(getattr(fusedopt, name)(make_params(BNB_SHAPES, torch.float32), **kwargs), 1)
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


# ---- torchao -----------------------------------------------------------------------------------------


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its optimizers; what they compile in every first step is run as it is written."""
    module = pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_states_are_read_exactly_and_go_on(torchao: Any, name: str) -> None:
    kwargs = {"weight_decay": 0.1, "betas": (0.8, 0.99)}
    params = make_params(AO_SHAPES, torch.float32)
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
    ours = train(fusedopt.AdamW(make_params(AO_SHAPES, torch.float32), lr=1e-2, **kwargs, **FORMATS["8bit"]), 5)
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
    theirs = train(torchao.AdamW8bit(make_params(AO_SHAPES, torch.bfloat16)), 3)
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
