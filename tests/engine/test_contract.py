"""What users of torch.optim take for granted: closures, hooks, schedulers, scalers, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from cases import CASES, Case, assert_same_bits, assert_same_run, make_params, set_grads, train

import fusedopt

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = [(64, 8), (64,), (3,)]


def new(case: Case = CASES[0], **kwargs: object) -> torch.optim.Optimizer:
    return case.ours(make_params(SHAPES, torch.float32), **{**case.kwargs, **kwargs})


@rows
def test_is_a_torch_optimizer(case: Case) -> None:
    optimizer = new(case)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, fusedopt.FusedOptimizer)
    assert type(optimizer).__name__ in repr(optimizer)
    if case.is_torchs:
        assert set(case.theirs(make_params(SHAPES, torch.float32)).defaults) <= set(optimizer.defaults)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_zero_grad_frees_the_gradients(backend: str) -> None:
    """Nothing of a step holds on to them, be it taken or refused."""
    optimizer = train(new(backend=backend), 2)
    params = optimizer.param_groups[0]["params"]
    for is_refused in (False, True):
        set_grads(params, 2)
        grads = [weakref.ref(param.grad) for param in params]
        if is_refused:
            optimizer.param_groups[0]["lr"] = float("nan")
            with pytest.raises(ValueError, match="lr"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert all(grad() is None for grad in grads)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_closures_run_with_gradients_and_before_the_step(by_keyword: bool) -> None:
    optimizer = new()
    params = optimizer.param_groups[0]["params"]
    expected = train(new(), 1)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        set_grads(params, 0)
        return torch.tensor(42.0)

    with torch.no_grad():
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss == 42.0
    assert_same_run(optimizer, expected)
    assert new().step() is None


def test_hooks_run_around_a_step() -> None:
    optimizer = new()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    train(optimizer, 1)
    assert seen == ["before", "after"]


def test_zero_grad() -> None:
    optimizer = train(new(), 1)
    params = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


@rows
def test_param_groups_have_their_own_settings(case: Case) -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = case.ours([{"params": params[:1], "lr": 0.5}, {"params": []}], **case.kwargs)
    optimizer.add_param_group({"params": params[1:], "weight_decay": 0.25, "state_dtype": torch.bfloat16})
    train(optimizer, 2)
    for i, settings in enumerate([{"lr": 0.5}, {"weight_decay": 0.25, "state_dtype": "bfloat16"}]):
        alone_params = make_params(SHAPES, torch.float32)
        alone = case.ours(alone_params[:1] if i == 0 else alone_params[1:], **{**case.kwargs, **settings})
        for step in range(2):
            set_grads(alone_params, step)
            alone.step()
        for ours, theirs in zip(optimizer.param_groups[2 * i]["params"], alone.param_groups[0]["params"]):
            assert_same_bits(ours, theirs)


def test_named_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, 1)


def test_amp_scaling_is_fused() -> None:
    """GradScaler hands over scale and found_inf: same bits as unscaled gradients, nothing changes on inf."""
    scale = 1024.0
    expected = new(fused=True)
    optimizer = new(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    for step in range(3):
        set_grads(expected.param_groups[0]["params"], step)
        expected.step()
        set_grads(optimizer.param_groups[0]["params"], step, scale=scale)
        scaler.scale(torch.tensor(1.0))
        scaler.step(optimizer)
        scaler.update()
    assert not hasattr(optimizer, "grad_scale")
    assert_same_run(optimizer, expected)

    before = copy.deepcopy(optimizer)
    set_grads(optimizer.param_groups[0]["params"], 3, scale=scale)
    optimizer.param_groups[0]["params"][1].grad[5] = float("inf")
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    scaler.update()
    assert_same_run(optimizer, before)
    assert scaler.get_scale() == scale / 2


def test_amp_scaling_with_inf_in_the_first_step_makes_no_state() -> None:
    optimizer = new(fused=True)
    scaler = torch.amp.GradScaler("cpu")
    set_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    assert not optimizer.state


def test_amp_scaling_after_unscale_and_with_clipping() -> None:
    scale = 256.0
    runs = []
    for unscale in (True, False):
        optimizer = new(max_grad_norm=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        set_grads(optimizer.param_groups[0]["params"], 0, scale=scale)
        scaler.scale(torch.tensor(1.0))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        runs.append(optimizer)
    assert_same_run(*runs)
    assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)
    plain = new(max_grad_norm=0.5)
    train(plain, 1)
    assert_same_bits(plain.last_grad_norm, runs[0].last_grad_norm)


@pytest.mark.parametrize("scheduler", ["lambda", "cosine", "onecycle", "plateau"])
def test_schedulers_drive_it_as_they_drive_torch(scheduler: str) -> None:
    make = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    }[scheduler]
    optimizers = [new(), torch.optim.AdamW(make_params(SHAPES, torch.float32), **CASES[0].kwargs)]
    schedulers = [make(optimizer) for optimizer in optimizers]
    for step in range(6):
        for optimizer, schedule in zip(optimizers, schedulers):
            train(optimizer, 1, first=step)
            schedule.step(1.0) if scheduler == "plateau" else schedule.step()
    ours, theirs = optimizers
    for key in ("lr", "betas"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)  # torch's own bits differ


def test_scheduler_does_not_warn_about_a_replaced_step() -> None:
    optimizer = new()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 1)
        schedule.step()


def test_tensor_lr() -> None:
    lr = torch.tensor(0.01)
    optimizer = new(lr=lr)
    expected = new(lr=0.01)
    expected.param_groups[0]["lr"] = lr.item()
    train(optimizer, 1)
    train(expected, 1)
    lr.mul_(0.5)
    expected.param_groups[0]["lr"] = lr.item()
    train(optimizer, 1, first=1)
    train(expected, 1, first=1)
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_run(optimizer, expected)


@rows
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(case: Case, how: str) -> None:
    optimizer = train(new(case, state_dtype="bfloat16", seed=3, max_grad_norm=1.0), 3)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is type(optimizer)
    train(optimizer, 3, first=3)
    train(twin, 3, first=3)
    assert_same_run(optimizer, twin)
    ours, theirs = (o.param_groups[0]["params"][0] for o in (optimizer, twin))
    assert ours.data_ptr() != theirs.data_ptr()
    assert optimizer.state[ours]["step"].data_ptr() != twin.state[theirs]["step"].data_ptr()


def test_groups_of_an_older_pickle_are_filled() -> None:
    optimizer = train(new(), 1)
    for key in ("seed", "state_rounding", "max_grad_norm", "backend"):
        del optimizer.param_groups[0][key]
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.param_groups[0]["seed"] == 0
    train(twin, 1)


def test_flags_of_torch_are_accepted() -> None:
    for flags in ({"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False, "fused": False}):
        assert_same_run(train(new(**flags), 2), train(new(), 2))


def test_zero_lr_and_zero_gradients_change_nothing() -> None:
    """What torch.distributed.checkpoint does to make state before loading it."""
    optimizer = new(lr=0.0)
    params = optimizer.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, value in zip(params, before):
        assert_same_bits(param, value)


def test_state_holds_parameters_tensors_and_numbers_only() -> None:
    optimizer = train(new(), 1)
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
    for held in optimizer.state.values():
        assert list(held) == ["step", "exp_avg", "exp_avg_sq"]
        assert all(isinstance(value, torch.Tensor) for value in held.values())
    memory = io.BytesIO()
    torch.save(optimizer.state_dict(), memory)
    memory.seek(0)
    torch.load(memory, weights_only=True)


def test_user_subclasses_work() -> None:
    class Mine(fusedopt.AdamW):
        def __init__(self, params: object, factor: float) -> None:
            super().__init__(params, lr=0.01 * factor)

    optimizer = Mine(make_params(SHAPES, torch.float32), factor=2.0)
    assert_same_run(train(optimizer, 2), train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.02), 2))


def test_training_mode_of_the_step_does_not_leak() -> None:
    optimizer = new()
    assert torch.is_grad_enabled()
    train(optimizer, 1)
    assert torch.is_grad_enabled()
    assert all(param.requires_grad and param.is_leaf for param in optimizer.param_groups[0]["params"])
