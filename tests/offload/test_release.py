"""Gradient release: the bits of the usual step, with a bucket of gradients at a time."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import (
    ADAFACTOR,
    DTYPES,
    FORMATS,
    Case,
    assert_same_bits,
    assert_same_run,
    format_kwargs,
    make_params,
    params_of,
    saved,
    set_grads,
)
from matrices import each_rule, masters, product
from released import BUCKET, SHAPES, backward, train, twins

import fusedopt

# Some of them, asked for 8 bits, have none that can be.
pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")
RULES = [*each_rule(), pytest.param(ADAFACTOR, ADAFACTOR.kwargs, id="adafactor")]


@pytest.mark.parametrize(("case", "kwargs", "dtype", "state_format"), product(RULES, DTYPES, FORMATS))
def test_every_rule_and_format(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    if case is ADAFACTOR and state_format == "mixed":
        pytest.skip("its states have other shapes")
    options = format_kwargs(case, kwargs, state_format)

    def make() -> Any:
        optimizer = case.ours(make_params(SHAPES, DTYPES[dtype]), **kwargs, **options)
        optimizer.record_health()
        return optimizer

    released, usual = twins(make)
    assert released.health_report() == usual.health_report()


@masters
def test_masters(dtype: str, rounding: str, master: str | None, state_format: str) -> None:
    options = {"rounding": rounding, "master_weights": master, **FORMATS[state_format]}
    twins(lambda: fusedopt.AdamW(make_params(SHAPES, DTYPES[dtype]), lr=1e-2, **options))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_parameters_of_all_kinds(backend: str) -> None:
    def make() -> Any:
        first, second = make_params([(20, 70), (40, 65)], torch.float32)
        transposed = torch.nn.Parameter(second.detach().clone().t())
        groups = [{"params": [first]}, {"params": [transposed, *make_params([(9, 9)], torch.float32)], "lr": 1e-3}]
        return fusedopt.AdamW(groups, lr=1e-2, backend=backend, max_grad_norm=0.1)

    twins(make, clip="exact")
    if backend == "eager":
        twins(lambda: fusedopt.AdamW(make_params([(9, 9), (7,)], torch.float64)))


def test_gradients_are_freed() -> None:
    """While the backward pass is at the first parameter, those of the last ones are gone."""
    params = make_params([(1000,)] * 10, torch.float32)
    left: list[int] = []
    optimizer = fusedopt.AdamW(params)
    with fusedopt.release_gradients(optimizer, bucket_numel=2000):
        x = torch.ones(1000)
        for param in params:  # a chain: the last is first in the backward pass
            x = x * param
        params[0].register_post_accumulate_grad_hook(lambda p: left.append(sum(q.grad is not None for q in params)))
        x.sum().backward()
    assert left == [0]
    assert all(param.grad is None for param in params)


# ---- accumulation, and parameters without gradients ------------------------------------------------------


@pytest.mark.parametrize("clip", [None, "exact"])
def test_accumulation(clip: str | None) -> None:
    """Some parameters have gradients in the first micro-batch only, some in the last only, some in both."""

    def run(releases: bool) -> Any:
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=None if clip is None else 0.3)
        params = params_of(optimizer)
        handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET, clip=clip) if releases else None
        for step in range(4):
            for batch, chosen in enumerate((params[:2], params[1:4], params[3:-1])):
                with handle.accumulate() if releases and batch < 2 else nullcontext():
                    backward(chosen, 10 * step + batch, handle)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    released, usual = run(True), run(False)
    assert_same_run(released, usual)
    if clip is not None:
        assert torch.equal(released.last_grad_norm, usual.last_grad_norm)
    assert not released.state[params_of(released)[-1]]  # it never had a gradient


def test_only_accumulated() -> None:
    """Without a pass that steps, the step does everything."""
    runs = []
    for releases in (True, False):
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=0.3)
        handle = fusedopt.release_gradients(optimizer, clip="exact") if releases else None
        with handle.accumulate() if releases else nullcontext():
            backward(params_of(optimizer), 0)
        optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)
    assert torch.equal(*(optimizer.last_grad_norm for optimizer in runs))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_exact_clipping(dtype: str, loss_scale: float) -> None:
    def make(**options: Any) -> Any:
        return fusedopt.AdamW(make_params(SHAPES, DTYPES[dtype]), lr=1e-2, max_grad_norm=0.7, **options)

    released, usual = make(), make()
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="exact", loss_scale=loss_scale)
    for step in range(4):
        train(released, 1, step, handle, scale=loss_scale * 10.0**-step)
        usual.grad_scale = torch.tensor(loss_scale)
        train(usual, 1, step, scale=loss_scale * 10.0**-step)
        assert torch.equal(released.last_grad_norm, usual.last_grad_norm)
    assert_same_run(released, usual)


def test_clipping_by_the_norm_before() -> None:
    """Where all gradients change alike, the norm is foreseen; the first step stays within the limit."""
    released, usual = (fusedopt.SGD(make_params(SHAPES, torch.float32), lr=0.5, max_grad_norm=0.7) for _ in range(2))
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="previous")
    before = [param.detach().clone() for param in params_of(released)]
    train(released, 1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, params_of(released))]).norm() / 0.5
    assert 0.2 < moved < 0.7 * 1.00001  # float32's
    for param, twin in zip(params_of(usual), params_of(released)):
        param.data.copy_(twin)
    usual.load_state_dict(released.state_dict())
    for step, scale in enumerate((1.0, 100.0, 1e-3, 10.0)):
        if step == 2:  # as after a resume
            kept = saved(handle.state_dict())
            handle.remove()
            handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="previous")
            handle.load_state_dict(kept)
        train(released, 1, 0, handle, scale=scale)
        train(usual, 1, 0, scale=scale)
        # The norm is foreseen by a root and a quotient, and float32 sums of parameters are double sums rounded.
        torch.testing.assert_close(released.last_grad_norm, usual.last_grad_norm, rtol=1e-6, atol=0)
    for param, twin in zip(params_of(usual), params_of(released)):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)


def test_clipping_by_the_norm_before_goes_by_what_is_there() -> None:
    """The gradient that comes first is judged by itself, the second by both."""
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0)
    handle = fusedopt.release_gradients(optimizer, bucket_numel=1, clip="previous")
    handle.load_state_dict({"previous_norm": 2.0, "previous_sums": [[0, 0, 2.0], [0, 1, 2.0]]})
    for param, size in ((params[1], 3.0), (params[0], 1.0)):
        (param * size).sum().backward()
    first, second = 2.0 * math.sqrt(36 / 2), 2.0 * math.sqrt(40 / 4)
    torch.testing.assert_close(params[1].detach(), torch.full((4,), -3.0 / first), rtol=1e-5, atol=0)
    torch.testing.assert_close(params[0].detach(), torch.full((4,), -1.0 / second), rtol=1e-5, atol=0)
    optimizer.step()
    torch.testing.assert_close(float(optimizer.last_grad_norm), math.sqrt(40.0), rtol=1e-6, atol=0)


def test_clipping_each_parameter() -> None:
    released = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=0.1)
    single = [fusedopt.AdamW([param], max_grad_norm=0.1) for param in make_params(SHAPES, torch.float32)]
    with fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="parameter"):
        train(released, 3)
    for step in range(3):
        set_grads([params_of(one)[0] for one in single], step)
        for one in single:
            one.step()
    for param, one in zip(params_of(released), single):
        assert_same_bits(param, params_of(one)[0])
    norms = torch.stack([one.last_grad_norm for one in single if one.last_grad_norm is not None])
    torch.testing.assert_close(released.last_grad_norm, norms.norm(), rtol=1e-6, atol=0)  # summed in another order


def test_listed_twice() -> None:
    def make() -> Any:
        params = make_params(SHAPES[:3], torch.float32)
        with pytest.warns(UserWarning, match="duplicate"):
            return fusedopt.SGD([params[0], params[1], params[0], params[2]], lr=0.1, momentum=0.9)

    runs = []
    for releases in (True, False):
        optimizer = make()
        handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET) if releases else None
        params = list(dict.fromkeys(params_of(optimizer)))
        for step in range(3):
            with handle.accumulate() if releases else nullcontext():  # so that a bucket is not all that has gradients
                backward(params, step, handle)
            backward(params, step, handle)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_hooks_of_steps_and_new_groups() -> None:
    runs = []
    for releases in (True, False):
        params = make_params(SHAPES, torch.float32)
        params[1].requires_grad_(False)
        optimizer = fusedopt.AdamW(params[:3])
        if releases:
            fusedopt.release_gradients(optimizer, bucket_numel=BUCKET)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))  # noqa: B023
        for step in range(4):
            if step == 1:
                optimizer.add_param_group({"params": params[3:], "lr": 1e-2})
            if step == 2:
                params[1].requires_grad_(True)
            backward([param for param in params_of(optimizer) if param.requires_grad], step)
            if releases and step == 3:
                assert all(param.grad is None for param in params[:2])
            optimizer.step()
            optimizer.zero_grad()
        assert calls == ["before", "after"] * 4
        runs.append(optimizer)
    assert_same_run(*runs)


def test_a_closure() -> None:
    runs = []
    for releases in (True, False):
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
        if releases:
            fusedopt.release_gradients(optimizer)

        def closure(optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            backward(params_of(optimizer), 0)
            return 3.0

        assert optimizer.step(closure) == 3.0
        runs.append(optimizer)
    assert_same_run(*runs)


def test_the_report_counts_a_bucket() -> None:
    optimizer = fusedopt.AdamW(make_params([(100, 100)] * 8, torch.float32))
    assert optimizer.memory_report().ours["gradients"] == 4 * 80_000
    with fusedopt.release_gradients(optimizer, bucket_numel=15_000):
        assert optimizer.memory_report().ours["gradients"] == 4 * (14_999 + 10_000)
    assert optimizer.memory_report().ours["gradients"] == 4 * 80_000
