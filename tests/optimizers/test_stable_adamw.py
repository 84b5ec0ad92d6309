"""StableAdamW: its paper's equation, optimi's class, and what its sum over a tensor asks of the engine."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from cases import assert_paths_agree, assert_same_bits, make_params, params_of, peer, saved, set_grads, train

import fusedopt

SHAPES = [(64, 65), (9000,), (3, 100), ()]


def by_the_paper(
    param: torch.Tensor, grads: list[torch.Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float
) -> tuple[torch.Tensor, list[float]]:
    """The steps of arXiv:2304.13013, algorithm 2, in float64; and what each divides the learning rate by.

    With Adam's own moments and corrections, which are the debiased ones by another name. `decay` times the divided
    learning rate.
    """
    w, (b1, b2) = param.double(), betas
    v, u, divisors = torch.zeros_like(w), torch.zeros_like(w), []
    for t, grad in enumerate(grads, 1):
        g = grad.double()
        v = b1 * v + (1 - b1) * g
        u = b2 * u + (1 - b2) * g * g
        mean, second = v / (1 - b1**t), u / (1 - b2**t)
        rms = (g * g / second.clamp(min=eps * eps)).mean().sqrt().item()
        divisors.append(max(1.0, rms))
        w = w - lr / divisors[-1] * (decay * w + mean / (second.sqrt() + eps))
    return w, divisors


@pytest.mark.parametrize("decouple_lr", [False, True])
def test_it_is_the_papers_equation(decouple_lr: bool) -> None:
    """Gradients that grow: the learning rate is divided by more than 1 in most steps, and by the tensor's own."""
    (param,) = make_params([(40, 30)], torch.float64)
    start = param.detach().clone()
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(40, 30, generator=generator, dtype=torch.float64) * 1.5**step for step in range(8)]
    decay, max_lr = (1e-3, 0.02) if decouple_lr else (0.1, None)
    optimizer = fusedopt.StableAdamW([param], lr=0.01, weight_decay=decay, decouple_lr=decouple_lr, max_lr=max_lr)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    expected, divisors = by_the_paper(start, grads, 0.01, (0.9, 0.99), 1e-6, decay / (max_lr or 1.0))
    assert sum(divisor > 1.2 for divisor in divisors) >= 6
    # The order of operations differs, by a few ulps in each of eight steps.
    torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-13)


def test_each_tensor_has_its_own_learning_rate() -> None:
    """A gradient a thousand times the usual one moves its own tensor little, and no other differently."""
    updates = []
    for factor in (1.0, 1000.0):
        params = make_params([(50, 40), (30,)], torch.float32)
        optimizer = train(fusedopt.StableAdamW(params, lr=0.01, weight_decay=0.0), 20)
        before = [param.detach().clone() for param in params]
        set_grads(params, 20)
        params[0].grad.mul_(factor)
        optimizer.step()
        updates.append([param.detach() - old for param, old in zip(params, before)])
    (usual, other), (grown, same) = updates
    assert_same_bits(same, other)
    assert grown.square().mean().sqrt() < 1.5 * usual.square().mean().sqrt()


def _foreign(name: str) -> Any:
    """Makes another package's optimizer, by plain torch: Triton's interpreter is on here, and has no bfloat16."""
    cls = peer(name).StableAdamW
    return functools.partial(cls, triton=False, foreach=False) if name == "optimi" else cls


@pytest.mark.parametrize(
    "kwargs", [{}, {"decouple_lr": True, "weight_decay": 1e-4, "max_lr": 0.05}, {"betas": (0.8, 0.95), "eps": 1e-3}]
)
@pytest.mark.filterwarnings("ignore:You are using weight_decay")
def test_steps_are_optimis(kwargs: dict[str, Any]) -> None:
    theirs = make_params(SHAPES, torch.float32)
    ours = make_params(SHAPES, torch.float32)
    train(_foreign("optimi")(theirs, lr=0.01, **kwargs), 20)
    train(fusedopt.StableAdamW(ours, lr=0.01, **kwargs), 20)
    for param, other in zip(ours, theirs):
        # optimi's mean is in float32, and its moments are lerped: measured at most 5e-7 of weights of about 1.
        torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-6)


def test_compensated_bfloat16_is_optimis() -> None:
    """Of optimi's own error against float32, from the same bfloat16 gradients, ours is no more than 1.1 times."""
    runs = {}
    for name, dtype in (("theirs", torch.bfloat16), ("ours", torch.bfloat16), ("exact", torch.float32)):
        params = make_params([(200, 64)], torch.bfloat16)
        params = [torch.nn.Parameter(param.detach().to(dtype)) for param in params]
        if name == "theirs":
            optimizer = _foreign("optimi")(params, lr=1e-3)
        else:
            optimizer = fusedopt.StableAdamW(params, lr=1e-3, kahan_sum=None if name == "exact" else True)
        train(optimizer, 50, grads=_bfloat16_grads)
        rest = {"theirs": "kahan_comp", "ours": "compensation"}.get(name)
        weights = params[0].detach().double()
        runs[name] = weights if rest is None else weights + optimizer.state[params[0]][rest].double()
    errors = {name: (runs[name] - runs["exact"]).square().mean().sqrt().item() for name in ("ours", "theirs")}
    assert errors["ours"] <= 1.1 * errors["theirs"]


def _bfloat16_grads(params: list[torch.nn.Parameter], step: int) -> None:
    twins = [torch.nn.Parameter(param.detach().bfloat16()) for param in params]
    set_grads(twins, step)
    for param, twin in zip(params, twins):
        param.grad = twin.grad.to(param.dtype)


def test_kahan_sum_is_the_compensation_of_master_weights() -> None:
    params = make_params([(30,)], torch.bfloat16)
    assert fusedopt.StableAdamW(params, kahan_sum=True).defaults["master_weights"] == "kahan"
    assert fusedopt.StableAdamW(params, kahan_sum=False).defaults["master_weights"] is None
    assert fusedopt.StableAdamW(params, master_weights="split24").defaults["master_weights"] == "split24"
    named = fusedopt.create_optimizer("stable_adamw", params)
    assert (named.defaults["betas"], named.defaults["eps"]) == ((0.9, 0.999), 1e-8)  # Trainer's
    assert named.defaults["master_weights"] == "kahan"
    assert fusedopt.create_optimizer("stable_adamw", params, kahan_sum=False).defaults["master_weights"] is None
    assert fusedopt.create_optimizer("stable_adamw", params, master_weights=None).defaults["master_weights"] is None


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_lr": 0.1}, ValueError, r"max_lr=0.1 without decouple_lr=True, which alone looks at it; pass"),
        ({"lr": 0.0, "decouple_lr": True}, ValueError, r"max_lr=0.0 with decouple_lr=True, which divides by it; pass"),
        ({"decouple_lr": True, "max_lr": -1.0}, ValueError, r"max_lr=-1.0 is negative"),
        ({"decouple_lr": 1}, TypeError, r"decouple_lr=1 is a int; pass True or False"),
        ({"kahan_sum": "yes"}, TypeError, r"kahan_sum='yes' is a str; pass True or False"),
        ({"kahan_sum": True, "master_weights": "split24"}, ValueError, r"kahan_sum=True and master_weights='split24'"),
        ({"kahan_sum": False, "master_weights": "kahan"}, ValueError, r"kahan_sum=False and master_weights='kahan'"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas"),
        ({"triton": True}, TypeError, r"triton"),
    ],
)
def test_what_makes_no_sense(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.StableAdamW(make_params([(3,)], torch.float32), **kwargs)


def test_max_lr_is_the_lr_that_it_is_made_with() -> None:
    optimizer = fusedopt.StableAdamW(make_params([(3,)], torch.float32), lr=0.05, decouple_lr=True, weight_decay=1e-4)
    assert optimizer.param_groups[0]["max_lr"] == 0.05
    optimizer.param_groups[0]["lr"] = 0.01
    assert optimizer.hyper(optimizer.param_groups[0])["max_lr"] == 0.05


@pytest.mark.parametrize("state", ["float32", "8bit"])
def test_waves_and_items_change_no_bit(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of several waves among small ones, and rows in which chunks of sums cut blocks."""

    def run(backend: str) -> torch.optim.Optimizer:
        params = make_params([(1100, 1001), (5, 5), (300, 70), (33,)], torch.float32)
        kwargs: dict[str, Any] = {"state_dtype": state, "min_quantized_numel": 1, "max_grad_norm": 1.0}
        return train(fusedopt.StableAdamW(params, lr=0.01, **kwargs, backend=backend), 2)

    assert_paths_agree(run, monkeypatch)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_skip_block_leaves_all_of_a_tensor_whose_sum_is_spoilt(backend: str, value: float) -> None:
    params = make_params([(5, 128), (30,)], torch.float32)
    kwargs: dict[str, Any] = {"state_dtype": "8bit", "min_quantized_numel": 1, "nonfinite": "skip_block"}
    optimizer = train(fusedopt.StableAdamW(params, **kwargs, backend=backend), 1)
    before = [x.clone() for x in (*params, *optimizer.state[params[0]].values())]
    set_grads(params, 1)
    params[0].grad[2, 3] = value
    optimizer.step()
    after = [x.detach() for x in (*params, *optimizer.state[params[0]].values())]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    for key, old, new in zip(optimizer.state[params[0]], before[2:], after[2:]):
        assert torch.equal(old, new) is (key != "step"), key


@pytest.mark.parametrize("name", ["optimi", "pytorch_optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_of_others_are_read(name: str, dtype: torch.dtype) -> None:
    kwargs: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    theirs = train(_foreign(name)(make_params(SHAPES, dtype), **kwargs), 3)
    params = [torch.nn.Parameter(param.detach().clone()) for param in params_of(theirs)]
    ours = fusedopt.StableAdamW(params, lr=1.0, master_weights="kahan")
    ours.load_state_dict(saved(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.01, (0.8, 0.95), 1e-6)
    for param, other in zip(params, params_of(theirs)):
        held, others = ours.state[param], theirs.state[other]
        assert held["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[key], others[key])
        if dtype == torch.bfloat16:
            assert torch.equal(held["compensation"], others["kahan_comp"])
    train(ours, 1, first=3)
    train(theirs, 1, first=3)
    for param, other in zip(params, params_of(theirs)):
        # As above; bfloat16 may round to the next number: theirs also rounds gradients' squares.
        close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
        torch.testing.assert_close(param, other, **close)


def test_a_decay_within_the_gradient_is_not_loaded() -> None:
    theirs = train(_foreign("pytorch_optimizer")(make_params([(3,)], torch.float32), weight_decouple=False), 1)
    with pytest.raises(ValueError, match=r"weight_decouple=False adds the weight decay to the gradient"):
        fusedopt.StableAdamW(make_params([(3,)], torch.float32)).load_state_dict(theirs.state_dict())
