"""Adafactor's equation against transformers', torch's, and the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import copied, make_params, peer, set_grads, train
from matrices import ADAFACTOR_SHAPES as SHAPES
from matrices import EXTERNAL

from fusedopt import Adafactor
from fusedopt.reference import factored
from fusedopt.reference.norm import pairwise_sum, square_sums


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def as_matrices(shape: tuple[int, ...], fold: bool) -> tuple[int, ...]:
    return (shape[0], math.prod(shape[1:])) if fold and len(shape) > 2 else shape


def formula(shape: tuple[int, ...], kwargs: dict[str, Any], momentum_has_lr: bool = False) -> Iterator[Callable]:
    """The paper's algorithms 4 and 5 in float64, with transformers' defaults: a generator of steps."""
    k = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None, "weight_decay": 0.0}
    k = {**k, "scale_parameter": True, "relative_step": True, "warmup_init": False, "lr": None, **kwargs}
    row = col = v = m = 0.0
    shape = as_matrices(shape, k.get("fold_conv", False))
    t = 0
    while True:
        t += 1

        def step(p: torch.Tensor, g: torch.Tensor, t: int = t) -> torch.Tensor:
            nonlocal row, col, v, m
            q, g = p.reshape(shape), g.reshape(shape)
            alpha = min(1e-6 * t if k["warmup_init"] else 1e-2, t**-0.5) if k["relative_step"] else k["lr"]
            if k["scale_parameter"]:
                alpha *= max(k["eps"][1], rms(q))
            beta2 = 1 - t ** k["decay_rate"]
            square = g * g + k["eps"][0]
            if g.dim() > 1:
                row = beta2 * row + (1 - beta2) * square.mean(-1, keepdim=True)
                col = beta2 * col + (1 - beta2) * square.mean(-2, keepdim=True)
                estimate = row * col / row.mean(-2, keepdim=True)
            else:
                estimate = v = beta2 * v + (1 - beta2) * square
            u = g / estimate.sqrt()
            u = u / max(1.0, rms(u) / k["clip_threshold"])
            q = q * (1 - alpha * k["weight_decay"])
            if k["beta1"] is None:
                return (q - alpha * u).reshape(p.shape)
            m = k["beta1"] * m + (1 - k["beta1"]) * (alpha * u if momentum_has_lr else u)
            return (q - (m if momentum_has_lr else alpha * m)).reshape(p.shape)

        yield step


def torchs_formula(shape: tuple[int, ...], kwargs: dict[str, Any]) -> Iterator[Callable]:
    """The same as torch's documentation has it."""
    k = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0, **kwargs}
    eps = torch.finfo(torch.float32).eps if k["eps"][0] is None else k["eps"][0]
    row = col = v = 0.0
    t = 0
    while True:
        t += 1

        def step(p: torch.Tensor, g: torch.Tensor, t: int = t) -> torch.Tensor:
            nonlocal row, col, v
            alpha = max(k["eps"][1], rms(p)) * min(k["lr"], t**-0.5)
            beta2 = 1 - t ** k["beta2_decay"]
            p = p * (1 - k["lr"] * k["weight_decay"])
            if g.dim() > 1:
                row = beta2 * row + (1 - beta2) * (g * g).mean(-1, keepdim=True)
                col = beta2 * col + (1 - beta2) * (g * g).mean(-2, keepdim=True)
                estimate = row * col / row.mean(-2, keepdim=True).clamp(min=eps)
            else:
                estimate = v = beta2 * v + (1 - beta2) * g * g
            u = g / estimate.sqrt().clamp(min=eps)
            return p - alpha / max(1.0, rms(u) / k["d"]) * u

        yield step


def errors(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, formulas: list[Iterator[Callable]], steps: int
) -> tuple[float, float]:
    """The rms error of each run over all elements, against the formula."""
    params, twins = (o.param_groups[0]["params"] for o in (ours, theirs))
    exact = [param.detach().double() for param in params]
    for step in range(steps):
        set_grads(params, step)
        for param, twin in zip(params, twins):
            twin.grad = param.grad.clone()
        exact = [next(f)(p, param.grad.double()) for f, p, param in zip(formulas, exact, params)]
        ours.step()
        theirs.step()
    judge = torch.cat([p.flatten() for p in exact])
    return tuple(rms(torch.cat([p.detach().flatten() for p in run]) - judge) for run in (params, twins))


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"warmup_init": True, "clip_threshold": 0.5},
        {**EXTERNAL, "weight_decay": 0.1, "decay_rate": -0.5},
    ],
    ids=["relative", "warmup", "external"],
)
def test_error_is_that_of_transformers(how: dict, scale_parameter: bool, beta1: float | None) -> None:
    kwargs = {**how, "scale_parameter": scale_parameter, "beta1": beta1}
    params = make_params(SHAPES, torch.float32)
    theirs = peer("transformers.optimization").Adafactor(copied(params), **kwargs)
    formulas = [formula(shape, kwargs, momentum_has_lr=True) for shape in SHAPES]
    ours, others = errors(Adafactor(params, **kwargs, compat=True), theirs, formulas, 50)
    assert 0 < ours <= 1.1 * others


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"lr": 1e-3, "weight_decay": 0.1, "beta2_decay": -0.5, "d": 2.0}, {"lr": 0.5, "eps": (1e-2, 2.0)}],
    ids=["default", "knobs", "eps"],
)
def test_error_is_that_of_torchs(kwargs: dict) -> None:
    params = make_params(SHAPES, torch.float32)
    theirs = torch.optim.Adafactor(copied(params), **kwargs, foreach=False)
    formulas = [torchs_formula(shape, kwargs) for shape in SHAPES]
    ours, others = errors(Adafactor(params, variant="torch", **kwargs), theirs, formulas, 50)
    assert 0 < ours <= 1.1 * others


@pytest.mark.parametrize("kwargs", [{"beta1": 0.9}, {"fold_conv": True}], ids=["momentum", "fold"])
def test_what_others_do_not_have_follows_the_formula(kwargs: dict) -> None:
    """The corrected momentum and folded convolutions, in float64 and, to some ulps, in float32."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        params = make_params(SHAPES, dtype)
        exact = [param.detach().double() for param in params]
        formulas = [formula(shape, kwargs) for shape in SHAPES]
        optimizer = Adafactor(params, **kwargs)
        for step in range(20):
            set_grads(params, step)
            exact = [next(f)(p, param.grad.double()) for f, p, param in zip(formulas, exact, params)]
            optimizer.step()
        for param, value in zip(params, exact):
            torch.testing.assert_close(param.detach().double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_16_bit_parameters_follow_the_others(variant: str) -> None:
    """Torch's epsilon is that of the parameter's dtype: of a bfloat16, 2**-7, which some gradients are below."""
    params = make_params([(40, 30), (50,)], torch.bfloat16)
    cls = peer("transformers.optimization").Adafactor if variant == "transformers" else torch.optim.Adafactor
    # torch computes in the parameter's dtype, so its judge is itself in float32, with that epsilon
    kwargs = {} if variant == "transformers" else {"eps": (2.0**-7, 1e-3)}
    twins = [torch.nn.Parameter(p.detach().float()) for p in params] if kwargs else copied(params)
    ours, theirs = (
        Adafactor(params, variant=variant, master_weights="float32" if kwargs else None),
        cls(twins, **kwargs),
    )
    for step in range(3):
        set_grads(params, step, scale=1e-2)
        for param, twin in zip(params, twins):
            twin.grad = param.grad.to(twin.dtype)
        ours.step()
        theirs.step()
    for param, twin in zip(params, twins):
        value = ours.state[param]["master"] if kwargs else param
        torch.testing.assert_close(value, twin.detach(), rtol=1e-2 if not kwargs else 1e-6, atol=1e-6)


def test_parameters_stop_when_the_learning_rate_is_0() -> None:
    for compat in (False, True):
        optimizer = train(Adafactor(make_params(SHAPES, torch.float32), **EXTERNAL, beta1=0.9, compat=compat), 3)
        params = optimizer.param_groups[0]["params"]
        before = [param.detach().clone() for param in params]
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, 2, first=3)
        assert all(torch.equal(p, value) for p, value in zip(params, before)) == (not compat)


@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_empty_parameters_count_steps_only(variant: str) -> None:
    params = make_params([(0,), (3, 0), (0, 3), (2, 0, 3), (5, 4)], torch.float32)
    optimizer = train(Adafactor(params, variant=variant), 2)
    assert all(optimizer.state[param]["step"] == 2 for param in params)
    assert params[-1].isfinite().all()
    assert all(value.isfinite().all() for held in optimizer.state.values() for value in held.values())


def test_closures_run_with_gradients() -> None:
    params = make_params([(4, 3)], torch.float32)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    optimizer = Adafactor(params)
    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


def pairs(values: list[float]) -> float:
    while len(values) > 1:
        values = [sum(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def lanes(row: list[float]) -> float:
    totals = [0.0] * 16
    for i, value in enumerate(row):
        totals[i % 16] += value
    return pairs(totals)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 4096), (5, 9000), (161, 33), (641, 17), (22000, 3)])
def test_sums_have_their_order(shape: tuple[int, int]) -> None:
    """As written once more in plain loops, which is what the core does."""
    rows, columns = shape
    values = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = []
    for matrix, row_sums, column_sums in zip(values, factored.row_sums(values), factored.column_sums(values)):
        table = matrix.tolist()
        slabs = max(1, min(64, rows // 320))
        height = math.ceil(rows / slabs)
        parts = [table[i : i + height] for i in range(0, rows, height)]
        assert row_sums.tolist() == [pairs([lanes(r[i : i + 4096]) for i in range(0, columns, 4096)]) for r in table]
        assert column_sums.tolist() == [pairs([sum((r[c] for r in p), 0.0) for p in parts]) for c in range(columns)]
        units += [sum((lanes(r[i : i + 4096]) for r in p), 0.0) for p in parts for i in range(0, columns, 4096)]
    assert factored.unit_sums(values).tolist() == units
    flat = values.flatten().sqrt()
    chunks = [lanes((c * c).tolist()) for c in flat.split(4096)]
    assert square_sums(flat).tolist() == chunks
    assert pairwise_sum(square_sums(flat)).item() == pairs(chunks)
