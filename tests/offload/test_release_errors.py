"""Gradient release: what goes wrong, and what is refused."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from cases import assert_same_run, make_params, params_of
from released import BUCKET, SHAPES, Fails, backward, train, twins

import fusedopt


@pytest.mark.parametrize("bucket", [1, 2000, 2**20])
def test_two_backward_passes_without_a_step(bucket: int) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=1e-2)
    fusedopt.release_gradients(optimizer, bucket_numel=bucket)
    backward(params_of(optimizer), 0)
    with pytest.raises(ValueError, match=r"a second gradient came for parameter \d of group 0 before optimizer.step"):
        backward(params_of(optimizer), 1)
    with pytest.raises(ValueError, match="a second gradient came"):
        optimizer.step()
    optimizer.zero_grad()
    train(optimizer, 1)
    optimizer.step()


def test_a_backward_pass_that_raises() -> None:
    """What it has stepped stays so; the next pass steps everything."""
    optimizer = fusedopt.SGD(make_params([(500,)] * 4, torch.float32), lr=1.0)
    params = params_of(optimizer)
    fusedopt.release_gradients(optimizer, bucket_numel=1000)
    before = [param.detach().clone() for param in params]
    x = torch.ones(500)
    for i, param in enumerate(params):
        x = (Fails.apply(x) if i == 1 else x) * 1.0 + param
    with pytest.raises(RuntimeError, match="a failure in the backward pass"):
        x.sum().backward()
    steps = [(a - b).mean().item() for a, b in zip(before, params)]
    assert steps[0] == 0
    assert sum(steps) == pytest.approx(2.0, rel=1e-5)  # a bucket of two of the other three; rounding of float32
    optimizer.zero_grad()
    before = [param.detach().clone() for param in params]
    sum(param.sum() for param in params).backward()
    optimizer.step()
    assert all(torch.equal(param, old - 1) for param, old in zip(params, before))


@pytest.mark.parametrize("wants", ["accumulate", "exact"])
def test_an_exception_within_its_contexts(wants: str) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET, clip="exact")
    loss = Fails.apply(params_of(optimizer)[0]).sum() + params_of(optimizer)[1].sum()
    with (
        pytest.raises(RuntimeError, match="a failure"),
        handle.accumulate() if wants == "accumulate" else nullcontext(),
    ):
        handle.backward(loss)
    optimizer.zero_grad()
    train(optimizer, 2, handle=handle)
    train(usual, 2)
    assert_same_run(optimizer, usual)


def test_exact_clipping_needs_its_own_backward() -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    fusedopt.release_gradients(optimizer, clip="exact")
    with pytest.raises(ValueError, match=r"call handle.backward\(loss\) instead"):
        backward(params_of(optimizer), 0)


def test_settings_that_change_between_backward_and_step() -> None:
    lr = torch.tensor(1e-2)
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=lr)
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    backward(params_of(optimizer), 0)
    lr.fill_(1e-3)
    with pytest.raises(ValueError, match=r"lr of group 0 has changed since the backward pass.*before the backward"):
        optimizer.step()
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    backward(params_of(optimizer), 0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(ValueError, match="weight_decay of group 0 has changed"):
        optimizer.step()


@pytest.mark.parametrize("clips", [True, False])
def test_dynamic_loss_scaling(clips: bool) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0 if clips else None)
    fusedopt.release_gradients(optimizer, clip="previous" if clips else None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(param.sum() for param in params_of(optimizer))).backward()
    with pytest.raises(ValueError, match=r"GradScaler finds out whether a gradient is inf only.*constant loss_scale"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"bucket_numel": 0}, ValueError, "bucket_numel=0"),
        ({}, {"bucket_numel": 1.5}, TypeError, "bucket_numel"),
        ({}, {"clip": "exact"}, ValueError, "no norm to clip to; make the optimizer with max_grad_norm"),
        ({}, {"loss_scale": 0.0}, ValueError, "loss_scale=0"),
        ({"max_grad_norm": 1.0}, {}, ValueError, "pass clip='exact'"),
        ({"max_grad_norm": 1.0}, {"clip": "exakt"}, ValueError, "clip='exakt'.*'exact'"),
    ],
)
def test_arguments(options: dict, arguments: dict, error: type[Exception], message: str) -> None:
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32), **options)
    with pytest.raises(error, match=message):
        fusedopt.release_gradients(optimizer, **arguments)
    assert params_of(optimizer)[0]._post_accumulate_grad_hooks is None


def test_another_optimizer_and_a_second_handle() -> None:
    with pytest.raises(TypeError, match="is a SGD; pass an optimizer of fusedopt"):
        fusedopt.release_gradients(torch.optim.SGD(make_params([(3,)], torch.float32)))
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32))
    with fusedopt.release_gradients(optimizer), pytest.raises(ValueError, match="releases gradients already"):
        fusedopt.release_gradients(optimizer)
    fusedopt.release_gradients(optimizer).remove()
    twins(lambda: optimizer, 0)


def test_a_parameter_is_stepped_where_it_is_listed_now() -> None:
    """Of groups with other learning rates, whose parameters change places after the hooks are there."""
    released, usual = (
        fusedopt.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=1e-3)
        for params in (make_params(SHAPES, torch.float32) for _ in range(2))
    )
    fusedopt.release_gradients(released, bucket_numel=1)
    for optimizer in (released, usual):
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"][:1], [*second["params"][1:], first["params"][0]]
        backward(params_of(optimizer), 0)
        optimizer.step()
    assert_same_run(released, usual)


def test_a_removed_handle_leaves_gradients_to_the_usual_step() -> None:
    optimizer = fusedopt.SGD(make_params([(3,)], torch.float32), lr=1e-2, max_grad_norm=1.0)
    handle = fusedopt.release_gradients(optimizer, clip="exact")
    handle.remove()
    (param,) = params_of(optimizer)
    handle.backward(lambda: param.sum())
    assert torch.equal(param.grad, torch.ones(3))


# ---- who steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, "previous"])
@pytest.mark.parametrize("keeps_handle", [False, True])
def test_an_optimizer_that_is_gone_steps_no_more(keeps_handle: bool, clip: str | None) -> None:
    """As in a cell of a notebook that is run again: at once, and without waiting for Python's collector."""
    params = make_params(SHAPES, torch.float32)
    options = {} if clip is None else {"max_grad_norm": 1.0}
    kept = []
    gc.disable()
    try:
        for lr in (0.5, 1e-3):
            optimizer = fusedopt.SGD(params, lr=lr, **options)
            handle = fusedopt.release_gradients(optimizer, bucket_numel=1, clip=clip)
            kept += [handle] if keeps_handle else []
            del handle
            before = [param.detach().clone() for param in params]
            backward(params, 0)
            assert all(param.grad is None for param in params)
            optimizer.step()
            assert len(optimizer.state) == len(params)
        twins = [torch.nn.Parameter(param) for param in before]
        usual = fusedopt.SGD(twins, lr=1e-3, **options)
        backward(twins, 0)
        if clip is None:
            usual.step()
            assert_same_run(optimizer, usual)
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    assert not any(param._post_accumulate_grad_hooks for param in params)
    if keeps_handle:
        kept[0].remove()
        with pytest.raises(ValueError, match="the optimizer whose gradients this handle releases is gone"):
            kept[0].backward(params[0].sum())


def test_the_handle_lives_with_the_optimizer() -> None:
    optimizer = fusedopt.SGD(make_params(SHAPES, torch.float32), lr=0.1)
    fusedopt.release_gradients(optimizer)
    gc.collect()
    train(optimizer, 1)
    assert optimizer.release_handle is not None
    assert len(optimizer.state) == len(SHAPES)


def test_two_optimizers_do_not_take_the_same_gradient() -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer, other = fusedopt.SGD(params), fusedopt.SGD(params[1:])
    handle = fusedopt.release_gradients(optimizer)
    with pytest.raises(ValueError, match="the gradient of parameter 0 of group 0 is stepped and freed by another opt"):
        fusedopt.release_gradients(other)
    assert other.release_handle is None
    handle.remove()
    fusedopt.release_gradients(other)
    with pytest.raises(ValueError, match="parameter 1 of group 0 is stepped and freed"):
        fusedopt.release_gradients(optimizer)
    assert params[0]._post_accumulate_grad_hooks in (None, {})


def test_norms_are_of_the_steps_that_came_to_their_end() -> None:
    optimizer = fusedopt.SGD(make_params([(500,)] * 3, torch.float32), lr=0.1)
    first, *_, last = params_of(optimizer)
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    optimizer.record_norms()
    with pytest.raises(RuntimeError, match="a failure in the backward pass"):
        (Fails.apply(first * 1.0) * last).sum().backward()
    optimizer.zero_grad()
    first.sum().backward()
    optimizer.step()
    assert [each.where for each in optimizer.norms_report().parameters] == ["parameter 0 of group 0"]
