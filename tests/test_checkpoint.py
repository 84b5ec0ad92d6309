"""State dicts: reload, torch's and back, formats kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, FORMATS, Case, assert_same_bits, assert_same_run, make_params, train

import fusedopt

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = [(65, 33), (300,), (), (1, 7)]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a user would, with the safe loader."""
    memory = io.BytesIO()
    torch.save(state_dict, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def mixed_params() -> list[dict[str, Any]]:
    """Groups of three dtypes, each with state of its own dtype, so that torch can hold it exactly."""
    return [
        {"params": make_params(SHAPES, torch.float32)},
        {"params": make_params(SHAPES, torch.bfloat16), "state_dtype": "bfloat16", "lr": 3e-3},
        {"params": make_params(SHAPES, torch.float16), "state_dtype": "float16", "weight_decay": 0.0, "eps": 1e-4},
        # bfloat16 state of a float32 parameter: torch widens it, which is exact
        {"params": make_params(SHAPES, torch.float32, seed=5), "state_dtype": torch.bfloat16, "seed": 11},
    ]


def copy_params(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    for group, other in zip(source.param_groups, target.param_groups):
        for param, twin in zip(group["params"], other["params"]):
            twin.data.copy_(param.data)


@rows
@pytest.mark.parametrize("amsgrad", [False, True])
def test_through_torch_and_back_equals_never_stopping(case: Case, amsgrad: bool) -> None:
    kwargs = {**case.kwargs, "amsgrad": amsgrad}
    never_stopped = train(case.ours(mixed_params(), **kwargs), 100)

    theirs = case.theirs([{"params": group["params"]} for group in mixed_params()], **kwargs)
    theirs.load_state_dict(saved(never_stopped.state_dict()))
    ours = case.ours([{"params": group["params"]} for group in mixed_params()])
    copy_params(never_stopped, ours)
    ours.load_state_dict(saved(theirs.state_dict()))

    assert_same_run(ours, never_stopped)
    train(never_stopped, 50, first=100)
    train(ours, 50, first=100)
    assert_same_run(ours, never_stopped)


@rows
@pytest.mark.parametrize("fused", [False, True])
def test_torchs_state_dict_is_continued(case: Case, fused: bool) -> None:
    """A run that torch began: torch's states and step counts are taken over exactly."""
    params = make_params(SHAPES, torch.float32)
    theirs = train(case.theirs(params, **case.kwargs, fused=fused), 5)
    ours = case.ours(make_params(SHAPES, torch.float32), state_dtype="float32", seed=9)
    ours.load_state_dict(saved(theirs.state_dict()))
    for param, twin in zip(ours.param_groups[0]["params"], params):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert_same_bits(ours.state[param][name], theirs.state[twin][name].reshape(ours.state[param][name].shape))
    assert ours.param_groups[0]["lr"] == case.kwargs["lr"]
    assert ours.param_groups[0]["seed"] == 9
    train(ours, 1, first=5)
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 6


@rows
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reload_continues_bit_for_bit(
    case: Case, dtype: torch.dtype, state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread count and instruction set, into an optimizer made with other settings."""
    optimizer = train(case.ours(make_params(SHAPES, dtype), **{**case.kwargs, **FORMATS[state_format]}), 7)
    resumed = case.ours(make_params(SHAPES, dtype))
    copy_params(optimizer, resumed)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert_same_run(resumed, optimizer)
    train(optimizer, 5, first=7)
    torch.set_num_threads(1)
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", fusedopt._core.available_isas()[0])
    train(resumed, 5, first=7)
    assert_same_run(resumed, optimizer)


def test_state_is_copied_on_load() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 1)
    state_dict = optimizer.state_dict()
    resumed = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    resumed.load_state_dict(state_dict)
    before = {name: value.clone() for name, value in state_dict["state"][0].items()}
    train(resumed, 1, first=1)
    for name, value in before.items():
        assert_same_bits(state_dict["state"][0][name], value)


def test_loading_its_own_state_dict_as_accelerate_does() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16)), 2)
    twin = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16)), 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32
    train(optimizer, 2, first=2)
    train(twin, 2, first=2)
    assert_same_run(optimizer, twin)


def test_state_is_converted_to_the_asked_format() -> None:
    """torch's state dict says nothing of formats, so the ones given here count."""
    theirs = train(torch.optim.AdamW(make_params(SHAPES, torch.float32)), 3)
    ours = fusedopt.AdamW(make_params(SHAPES, torch.float32), state_dtype={"exp_avg": "bfloat16"})
    ours.load_state_dict(theirs.state_dict())
    held = ours.state[ours.param_groups[0]["params"][0]]
    assert held["exp_avg"].dtype == torch.bfloat16
    assert held["exp_avg_sq"].dtype == torch.float32
    exact = theirs.state[theirs.param_groups[0]["params"][0]]["exp_avg"]
    assert_same_bits(held["exp_avg"], exact.bfloat16())
    train(ours, 1)


def test_strided_states_and_plain_step_counts_are_taken() -> None:
    """torch keeps the parameter's memory format, and older versions an int for a step."""
    param = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    theirs = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    theirs.step()
    state_dict = theirs.state_dict()
    assert not state_dict["state"][0]["exp_avg"].is_contiguous()
    state_dict["state"][0]["step"] = 1
    ours = fusedopt.AdamW([param])
    ours.load_state_dict(state_dict)
    held = ours.state[param]
    assert held["exp_avg"].is_contiguous()
    assert torch.equal(held["exp_avg"], theirs.state[param]["exp_avg"])
    assert held["step"].dtype == torch.float32
    ours.step()
    assert held["step"] == 2


def test_backend_stays_as_it_is_here() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="eager"), 1)
    resumed = fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["backend"] == "cpu"


def test_hooks_around_loading_see_ordinary_state_dicts() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 1)
    resumed = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    seen: list[Any] = []

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(type(state_dict["state"][0]["exp_avg"]))
        state_dict["param_groups"][0]["lr"] = 0.125
        return state_dict

    resumed.register_load_state_dict_pre_hook(before)
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(type(next(iter(o.state.values()))["exp_avg"])))
    resumed.load_state_dict(optimizer.state_dict())
    assert seen == [torch.Tensor, torch.Tensor]
    assert resumed.param_groups[0]["lr"] == 0.125
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 1


def _drop_group(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"] = []


def _other_shape(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg_sq"] = torch.zeros(299)


def _not_a_tensor(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg"] = 3.0


def _codes(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["exp_avg"] = torch.zeros(65, 33, dtype=torch.uint8)


def _bad_step(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["step"] = torch.zeros(2)


def _bad_betas(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["betas"] = (0.9, 1.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_group, r"param groups of \[\] parameters and the optimizer of \[4\]"),
        (_other_shape, r"parameter 1 has a state 'exp_avg_sq' of shape \(299,\).*\(300,\)"),
        (_not_a_tensor, r"parameter 1 has a state 'exp_avg' of type float"),
        (_codes, r"'exp_avg' of dtype torch.uint8"),
        (_bad_step, r"'step' of shape \(2,\)"),
        (_bad_betas, r"betas\[1\]=1.5"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil: Callable[[dict], None], message: str) -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.5), 2)
    twin = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.5), 2)
    state_dict = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=0.1), 1).state_dict()
    spoil(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same_run(optimizer, twin)
    train(optimizer, 1, first=2)
    train(twin, 1, first=2)
    assert_same_run(optimizer, twin)


def test_old_state_is_not_kept_alive_after_loading() -> None:
    import gc
    import weakref

    optimizer = train(fusedopt.AdamW([torch.nn.Parameter(torch.zeros(10))]), 2)
    old = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert old() is None
