"""Bad input: an error that names the argument and the value, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, set_grads, train

import fusedopt

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAN = float("nan")
INF = float("inf")


@rows
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr=-0.1 is negative"),
        ({"lr": NAN}, ValueError, "lr=nan is not finite"),
        ({"lr": INF}, ValueError, "lr=inf is not finite"),
        ({"lr": "0.1"}, TypeError, "lr='0.1' is a str"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"lr is a tensor of shape \(2,\)"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr=-1.0 is negative"),
        ({"weight_decay": -1}, ValueError, "weight_decay=-1.0 is negative"),
        ({"lrr": 0.1}, TypeError, "unknown argument lrr=0.1; did you mean 'lr'"),
        ({"use_triton": True}, TypeError, "unknown argument use_triton=True; it takes params, lr"),
        ({"state_dtype": "int8"}, ValueError, "state_dtype='int8' is not known; pass one of 'float32', 'bfloat16'"),
        ({"state_dtype": torch.float64}, ValueError, "state_dtype='float64' is not known"),
        ({"state_dtype": 8}, ValueError, "state_dtype=8 is not known"),
        ({"state_dtype": {"exp_avgs": "bfloat16"}}, ValueError, "names the state 'exp_avgs'; the states are "),
        ({"min_quantized_numel": -1}, ValueError, "min_quantized_numel=-1 is negative"),
        ({"min_quantized_numel": 1e3}, TypeError, "min_quantized_numel=1000.0 is a float"),
        ({"rounding": "up"}, ValueError, "rounding='up' is not known; pass one of 'nearest', 'stochastic'"),
        (
            {"master_weights": "split16"},
            ValueError,
            "master_weights='split16' is not known; pass one of 'kahan', 'split24'",
        ),
        ({"state_rounding": "up"}, ValueError, "state_rounding='up' is not known; pass one of 'nearest', 'stochastic'"),
        ({"state_rounding": {"v": "nearest"}}, ValueError, "names the state 'v'"),
        ({"seed": -1}, ValueError, r"seed=-1 is outside \[0, 2\*\*32\)"),
        ({"seed": 2**32}, ValueError, "seed=4294967296 is outside"),
        ({"seed": 0.5}, TypeError, "seed=0.5 is a float"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0 would make every gradient zero"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0 is negative"),
        ({"max_grad_norm": INF}, ValueError, "max_grad_norm=inf is not finite"),
        (
            {"backend": "gpu"},
            ValueError,
            "backend='gpu' is not known; pass one of 'auto', 'cpu', 'cuda', 'triton', 'eager'",
        ),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
    ],
)
def test_constructor(case: Case, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        case.ours(make_params([(3,)], torch.float32), **kwargs)
    if error is ValueError:  # the same value in a group
        optimizer = case.ours(make_params([(3,)], torch.float32))
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": make_params([(4,)], torch.float32), **kwargs})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (fusedopt.AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 is outside \[0, 1\)"),
        (fusedopt.Adam, {"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 is outside"),
        (fusedopt.Lion, {"betas": (0.9, NAN)}, r"betas\[1\]=nan is not finite"),
        (fusedopt.AdamW, {"betas": 0.9}, "betas=0.9 must be a pair"),
        (fusedopt.AdEMAMix, {"betas": (0.9, 0.999)}, r"betas=\(0.9, 0.999\) must be three numbers"),
        (fusedopt.AdEMAMix, {"t_alpha": 0}, "t_alpha=0 is no length of a schedule"),
        (fusedopt.AdEMAMix, {"t_beta3": -5}, "t_beta3=-5.0 is negative"),
        (fusedopt.AdEMAMix, {"alpha": -1}, "alpha=-1.0 is negative"),
        (fusedopt.RMSprop, {"alpha": 1}, r"alpha=1.0 is outside \[0, 1\)"),
        (fusedopt.RMSprop, {"momentum": -1}, "momentum=-1.0 is negative"),
        (fusedopt.RMSprop, {"centered": True, "state_dtype": {"square_avg": "8bit"}}, "two states that nearly cancel"),
        (fusedopt.RMSprop, {"state_dtype": {"grad_avg": "8bit"}}, "two states that nearly cancel"),
        (fusedopt.Adagrad, {"lr_decay": -1}, "lr_decay=-1.0 is negative"),
        (fusedopt.Adagrad, {"initial_accumulator_value": -1}, "initial_accumulator_value=-1.0 is negative"),
        (fusedopt.SGD, {"dampening": NAN}, "dampening=nan is not finite"),
        (fusedopt.SGD, {"nesterov": True}, "nesterov=True needs a momentum and no dampening, and here momentum=0"),
        (fusedopt.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1; pass for example"),
        (fusedopt.AdamW, {"eps": -1e-8}, "eps=-1e-08 is negative"),
        (fusedopt.AdamW, {"state_dtype": {"exp_avg": "int4"}}, r"state_dtype\['exp_avg'\]='int4' is not known"),
        (fusedopt.AdamW, {"state_dtype": {"max_exp_avg_sq": "8bit"}}, "a running maximum keeps every lucky draw"),
        (fusedopt.AnyPrecisionAdamW, {"momentum_dtype": "int4"}, "momentum_dtype='int4' is not known"),
        (fusedopt.AnyPrecisionAdamW, {"compensation_buffer_dtype": "8bit"}, "compensation_buffer_dtype='8bit' is not"),
    ],
)
def test_arguments_of_one_optimizer(cls: type, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(make_params([(3,)], torch.float32), **kwargs)


def test_float16_parameters_take_float32_masters_only() -> None:
    for master in ("kahan", "split24", "split32"):
        params = make_params([(3,), (4,)], torch.float16)
        set_grads(params, 0)
        before = [param.detach().clone() for param in params]
        optimizer = fusedopt.SGD(params, master_weights=master)
        with pytest.raises(
            ValueError, match=rf"master_weights='{master}' needs bfloat16.*use master_weights='float32'"
        ):
            optimizer.step()
        assert not optimizer.state
        assert all(torch.equal(param, value) for param, value in zip(params, before))


def test_params() -> None:
    (param,) = make_params([(3,)], torch.float32)
    for params, error in ((param, TypeError), ([], ValueError), ([3], TypeError), ({param}, None)):
        if error is None:
            fusedopt.AdamW(params)
        else:
            with pytest.raises(error):
                fusedopt.AdamW(params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        fusedopt.AdamW([{"params": [param]}, {"params": [param]}])


def test_a_misspelt_group_key_is_pointed_out() -> None:
    params = make_params([(3,)], torch.float32)
    with pytest.warns(UserWarning, match="'weight_deacy' is not used; did you mean 'weight_decay'"):
        fusedopt.AdamW([{"params": params, "weight_deacy": 0.0}])


def _meta(params: list[torch.nn.Parameter]) -> None:
    params[1] = torch.nn.Parameter(torch.empty(5, device="meta"))
    params[1].grad = torch.empty(5, device="meta")


def _sparse(params: list[torch.nn.Parameter]) -> None:
    params[1].grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (5,))


def _grad_shape(params: list[torch.nn.Parameter]) -> None:
    params[1].data = torch.ones(4)


def _shorter_view(params: list[torch.nn.Parameter]) -> None:
    params[1].data = params[1].data[:4]  # at the same address


def _integer(params: list[torch.nn.Parameter]) -> None:
    params[1].grad = None
    params[1].requires_grad_(False)
    params[1].data = torch.ones(5, dtype=torch.int32)
    params[1].grad = torch.ones(5, dtype=torch.int32)


def _state_shape(params: list[torch.nn.Parameter]) -> None:
    params[1].data = torch.ones(6)
    params[1].grad = torch.ones(6)


def _sparse_param(params: list[torch.nn.Parameter]) -> None:
    params[1] = torch.nn.Parameter(torch.ones(5).to_sparse())
    params[1].grad = torch.ones(5).to_sparse()


def _freed(params: list[torch.nn.Parameter]) -> None:
    params[1] = torch.nn.Parameter(torch.ones(5))
    params[1].grad = torch.ones(5)
    params[1].untyped_storage().resize_(0)


def _freed_gradient(params: list[torch.nn.Parameter]) -> None:
    params[1].grad.untyped_storage().resize_(0)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_meta, r"parameter 1 of group 0, of shape \(5,\), is on the meta device"),
        (_sparse, r"parameter 1 of group 0.* gradient of layout torch.sparse_coo"),
        (_grad_shape, r"parameter 1 of group 0, of shape \(4,\), has a gradient of shape \(5,\)"),
        (_shorter_view, r"parameter 1 of group 0, of shape \(4,\), has a gradient of shape \(5,\)"),
        (_integer, r"parameter 1 of group 0.*cannot be stepped by backend='.*torch.int32"),
        (_sparse_param, r"parameter 1 of group 0.*is of layout torch.sparse_coo.*to_dense\(\)"),
        (_freed, r"parameter 1 of group 0.*cannot be stepped: its memory has been freed"),
        (_freed_gradient, r"parameter 1 of group 0.*has a gradient whose memory has been freed"),
        (_state_shape, r"has a state 'exp_avg' of shape \(5,\); it must be.*\(6,\)"),
    ],
)
def test_step(spoil: Callable[[list], None], message: str, backend: str, warm: bool) -> None:
    """In the middle of other parameters, on a first step and on a later one: nothing has changed."""
    if spoil is _state_shape and not warm:
        pytest.skip("there is no state yet")
    params = make_params([(3,), (5,), (7,)], torch.float32)
    optimizer = fusedopt.AdamW(params, backend=backend, max_grad_norm=1.0)
    if warm:
        train(optimizer, 2)
    set_grads(params, 2)
    spoil(params)
    optimizer.param_groups[0]["params"] = params  # as FSDP2 swaps them
    others = [params[0], params[2]]
    before = [param.detach().clone() for param in others]
    states = {p: {k: v.clone() for k, v in held.items()} for p, held in optimizer.state.items()}
    norm = optimizer.last_grad_norm
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(others, before))
    assert optimizer.state.keys() == states.keys()
    for param, held in states.items():
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in held.items())
    assert optimizer.last_grad_norm is norm


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_gradients_of_zeros_that_have_no_memory(kwargs: dict, backend: str) -> None:
    """autograd's tensors of zeros, as forward mode makes them, hold no numbers."""
    optimizer, twin = (fusedopt.AdamW(make_params([(3, 5), (4,)], torch.float32), **kwargs) for _ in range(2))
    for steps in range(2):
        for each, zeros in ((optimizer, torch._efficientzerotensor), (twin, torch.zeros)):
            params = each.param_groups[0]["params"]
            set_grads(params, steps)
            params[0].grad = zeros((3, 5))
            each.step()
        assert_same_run(optimizer, twin)


@pytest.mark.parametrize("value", [NAN, INF, torch.tensor(NAN)])
def test_lr_that_became_nan_stops_the_step(value: object) -> None:
    optimizer = train(fusedopt.AdamW(make_params([(3,)], torch.float32)), 1)
    twin = train(fusedopt.AdamW(make_params([(3,)], torch.float32)), 1)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(ValueError, match=r"lr=.* is not finite"):
        train(optimizer, 1, first=1)
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_backend_that_cannot_serve_a_tensor(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.AdamW([param], backend="cpu")
    with pytest.raises(ValueError, match=rf"backend='cpu' \(cpu: its dtype is {dtype}\); use backend='auto'"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert not optimizer.state


def test_16_bit_state_of_a_float64_parameter() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.AdamW([param], state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"state_dtype='bfloat16'.*torch.float64"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("of", ["parameter", "state"])
def test_elements_that_are_one_number_are_refused_before_anything_moves(of: str) -> None:
    """What others hold in one place, in front of it and after it in the list, stays as it is."""
    params = [*make_params([(3, 4)] * 2, torch.float32), torch.nn.Parameter(torch.ones(6, 4)[::2])]
    optimizer = fusedopt.AdamW(params)
    train(optimizer, 1)
    if of == "parameter":
        params[1].data = torch.zeros(1, 4).expand(3, 4)
    else:
        optimizer.state[params[1]]["exp_avg"] = torch.zeros(3, 1).expand(3, 4)
    held = [tensor for param in params for tensor in (param, *optimizer.state[param].values())]
    before = [tensor.detach().clone() for tensor in held]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0, of shape \(3, 4\),.*elements are the same place"):
        train(optimizer, 1)
    assert all(torch.equal(tensor, old) for tensor, old in zip(held, before))
    params[1].data = torch.zeros(1, 4).expand(3, 4).contiguous()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3, 4)
    train(optimizer, 1)


def test_core_names_what_is_missing() -> None:
    table = fusedopt._core.TensorTable()
    add_group = partial(table.add_group, seed=0, rounding=0, master=0, master_key="")
    with pytest.raises(ValueError, match="no rule 'adamx'"):
        add_group(rule="adamx", config={}, roundings=[])
    with pytest.raises(TypeError, match="needs the hyperparameter 'lr'"):
        add_group(rule="adamw", config={}, roundings=[0, 0])
    config = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.0}
    with pytest.raises(TypeError, match="hyperparameter that it does not have"):
        add_group(rule="adamw", config={**config, "momentum": 1.0}, roundings=[0, 0])
    with pytest.raises(ValueError, match="has 2 states"):
        add_group(rule="adamw", config=config, roundings=[0])
