"""A step under torch.compile: the bits of an uncompiled one, without recompiling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import CASES, Case, assert_same_run, make_params, set_grads, train

import fusedopt

SHAPES = [(16, 8), (16,), (3, 300)]


def new(case: Case, **kwargs: object) -> torch.optim.Optimizer:
    groups = [
        {"params": make_params(SHAPES, torch.float32)},
        {"params": make_params([(7,), (2, 100)], torch.bfloat16), "seed": 11},
    ]
    return case.ours(groups, **{**case.kwargs, **case.variants[-1], **kwargs})


HOW: dict[str, dict[str, Any]] = {
    "default": {},
    "clip": {"max_grad_norm": 0.01},
    "bf16": {"state_dtype": "bfloat16", "seed": 4, "rounding": "stochastic"},
    "8bit": {"state_dtype": "8bit", "min_quantized_numel": 1, "master_weights": "split24", "maximize": True},
}


# The operator is given a rule and formats, and looks at neither: `make test` takes each of both.
@pytest.mark.parametrize(
    ("case", "kwargs"),
    [
        pytest.param(
            case, kwargs, id=f"{case.name}-{name}", marks=() if i == 0 or k % len(HOW) == 0 else pytest.mark.thorough
        )
        for i, case in enumerate(CASES)
        for k, (name, kwargs) in enumerate(HOW.items(), start=i)
    ],
)
def test_compiled_steps_have_the_same_bits(case: Case, kwargs: dict) -> None:
    """With a Tensor lr that a schedule changes: one graph for all steps, none broken; none if steps are left out."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    runs = []
    for is_compiled in (False, True):
        optimizer = new(case, lr=torch.tensor(0.01), **kwargs)
        params = [param for group in optimizer.param_groups for param in group["params"]]

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        is_traced = not case.ours.changes_groups
        take = torch.compile(step, backend=counter, fullgraph=is_traced) if is_compiled else step
        for i in range(5):
            set_grads(params, i)
            take()
            optimizer.param_groups[0]["lr"].mul_(0.9)
        runs.append(optimizer)
    assert_same_run(*runs)
    assert counter.frame_count == is_traced
    if "max_grad_norm" in kwargs:
        assert torch.equal(runs[0].last_grad_norm, runs[1].last_grad_norm)


def test_inductor_keeps_the_operator() -> None:
    torch.compiler.reset()
    optimizer = new(CASES[0])
    train_step = torch.compile(lambda: optimizer.step(), fullgraph=True)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i in range(2):
        set_grads(params, i)
        train_step()
    assert_same_run(optimizer, train(new(CASES[0]), 2))


def test_states_begin_with_their_storages() -> None:
    """Inductor copies what lies before a state in its storage as well, and in torch 2.6 from the wrong place."""
    optimizer = train(new(CASES[0], state_dtype="8bit", min_quantized_numel=1), 1)
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(tensors) > 10
    assert not any(tensor.storage_offset() for tensor in tensors)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        assert tensor.data_ptr() % 64 == 0


def test_operator_declares_what_it_mutates() -> None:
    params = [param.detach() for param in make_params([(5,), (3, 2)], torch.float32)]
    states = [torch.zeros_like(param) for param in params for _ in range(2)]
    torch.library.opcheck(
        torch.ops.fusedopt.step_.default,
        (
            "of no optimizer",
            params,
            [torch.ones_like(param) for param in params],
            states,
            [torch.zeros(()) for _ in params],
            [torch.tensor(0.1)],
            torch.zeros(()),
        ),
        {
            "sizes": [2],
            "param_group": [0],
            "layout": [""],
            "rule": ["adamw"],
            "hyper_names": ["beta1,beta2,eps,weight_decay"],
            "hyper_values": [0.9, 0.99, 1e-8, 0.1],
            "states": ["exp_avg-,exp_avg_sq+"],
            "state_keys": [":exp_avg,exp_avg_sq:0:;:exp_avg,exp_avg_sq:1:"],
            "roundings": ["nearest,nearest"],
            "seed": [0],
            "maximize": [False],
            "skips_blocks": [False],
            "rounding": ["nearest"],
            "master": [""],
            "backends": ["auto"],
            "derives_on_device": True,
            "max_grad_norm": 1.0,
            "skip_step_above": None,
        },
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_errors_reach_the_user_of_a_compiled_step() -> None:
    torch.compiler.reset()
    (param,) = make_params([(3,)], torch.float32)
    optimizer = fusedopt.AdamW([param], backend="cpu")
    param.data = param.data.double()
    param.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(Exception, match="cannot be stepped by backend='cpu'"):
        torch.compile(lambda: optimizer.step(), backend="aot_eager")()


def test_what_compiled_steps_keep_lives_with_their_optimizer() -> None:
    """What a captured graph reads is kept by sessions; a step that is alone in a graph has none of its own."""
    torch.compiler.reset()
    optimizers = [fusedopt.AdamW(make_params(SHAPES, torch.float32)) for _ in range(2)]
    copied = copy.deepcopy(optimizers[0])
    assert len({optimizer.key for optimizer in (*optimizers, copied)}) == 3
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        step = torch.compile(optimizer.step, backend="aot_eager")
        for i in range(2):
            set_grads(params, i)
            step()
            sessions = optimizer.__dict__.get("_session_cache")
            assert sessions is not None
            assert len(sessions["cpu"]) == 0  # it holds no gradient
        assert optimizer.__dict__["_session_cache"] is sessions
    assert_same_run(*optimizers)


def test_the_operator_takes_all_of_a_groups_settings() -> None:
    from dataclasses import fields

    from fusedopt.backends import GroupStep
    from fusedopt.engine.compiled import _COLUMNS

    assert {field.name for field in fields(GroupStep)} == {*_COLUMNS, "hyper", "lr"}
