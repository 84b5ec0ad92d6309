"""State dicts: reload, torch's and back, formats kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    FORMATS,
    Case,
    assert_same_bits,
    assert_same_run,
    each_variant,
    format_kwargs,
    make_params,
    train,
)

import fusedopt
from fusedopt.storage import quantization

rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = [(65, 99), (300,), (), (1, 7)]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a user would, with the safe loader."""
    memory = io.BytesIO()
    torch.save(state_dict, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def mixed_params(case: Case) -> list[dict[str, Any]]:
    """Groups of three dtypes, each with state of its own dtype, so that torch can hold it exactly."""
    tame = {"eps": 1e-4} if "eps" in case.ours([torch.zeros(1)]).defaults else {}  # for float16
    return [
        {"params": make_params(SHAPES, torch.float32)},
        {"params": make_params(SHAPES, torch.bfloat16), "state_dtype": "bfloat16", "lr": 3e-3},
        {"params": make_params(SHAPES, torch.float16), "state_dtype": "float16", "weight_decay": 0.0, **tame},
        # bfloat16 state of a float32 parameter: torch widens it, which is exact
        {"params": make_params(SHAPES, torch.float32, seed=5), "state_dtype": torch.bfloat16, "seed": 11},
    ]


def copy_params(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    for group, other in zip(source.param_groups, target.param_groups):
        for param, twin in zip(group["params"], other["params"]):
            twin.data.copy_(param.data)


torchs = pytest.mark.parametrize(("case", "kwargs"), [row for row in each_variant() if row.values[0].is_torchs])


@torchs
def test_through_torch_and_back_equals_never_stopping(case: Case, kwargs: dict) -> None:
    never_stopped = train(case.ours(mixed_params(case), **kwargs), 100)

    theirs = case.theirs([{"params": group["params"]} for group in mixed_params(case)], **kwargs)
    theirs.load_state_dict(saved(never_stopped.state_dict()))
    ours = case.ours([{"params": group["params"]} for group in mixed_params(case)])
    copy_params(never_stopped, ours)
    ours.load_state_dict(saved(theirs.state_dict()))

    assert_same_run(ours, never_stopped)
    train(never_stopped, 50, first=100)
    train(ours, 50, first=100)
    assert_same_run(ours, never_stopped)


@torchs
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_torchs_state_dict_is_continued(case: Case, kwargs: dict, state_dtype: str) -> None:
    """A run that torch began: torch's states and step counts are taken over, exactly where they are kept so."""
    params = make_params(SHAPES, torch.float32)
    theirs = train(case.theirs(params, **kwargs), 5)
    ours = case.ours(make_params(SHAPES, torch.float32), state_dtype=state_dtype, min_quantized_numel=1, seed=9)
    ours.load_state_dict(saved(theirs.state_dict()))
    (group,) = ours.param_groups
    copy_params(theirs, ours)
    for param, twin in zip(group["params"], params):
        for spec in ours.states(group):
            exact = theirs.state[twin][spec.name]
            if spec.name in ours.state[param]:
                assert_same_bits(ours.state[param][spec.name], exact)
            else:
                codes, scales = quantization.encode(exact, is_signed=spec.is_signed)
                assert torch.equal(ours.state[param][spec.codes], codes)
                assert torch.equal(ours.state[param][spec.scales], scales)
    assert group["lr"] == case.kwargs["lr"]
    assert group["seed"] == 9
    train(ours, 1, first=5)
    if ours.states(group):
        # torch's SGD does not count its steps, so its state says no more than that there was one
        assert ours.state[group["params"][0]]["step"] == (6 if "step" in theirs.state[params[0]] else 2)
    if state_dtype == "float32":
        train(theirs, 1, first=5)
        for param, twin in zip(group["params"], params):
            # one step in another order of operations: some ulps of the parameter and of its update
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@rows
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reload_continues_bit_for_bit(
    case: Case, dtype: torch.dtype, state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread count and instruction set, into an optimizer made with other settings."""
    kwargs = {**case.kwargs, **case.variants[-1], "rounding": "stochastic"}
    kwargs.update(format_kwargs(case, kwargs, state_format))
    optimizer = train(case.ours(make_params(SHAPES, dtype), **kwargs), 7)
    resumed = case.ours(make_params(SHAPES, dtype))
    copy_params(optimizer, resumed)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert_same_run(resumed, optimizer)
    train(optimizer, 5, first=7)
    torch.set_num_threads(1)
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", fusedopt._core.available_isas()[0])
    train(resumed, 5, first=7)
    assert_same_run(resumed, optimizer)


@rows
@pytest.mark.parametrize("master", ["kahan", "split24", "split32", "float32"])
def test_masters_continue_bit_for_bit(case: Case, master: str) -> None:
    kwargs = {**case.kwargs, **case.variants[-1], "master_weights": master, "state_dtype": "8bit"}
    optimizer = train(case.ours(make_params(SHAPES, torch.bfloat16), **kwargs, min_quantized_numel=1), 7)
    resumed = case.ours(make_params(SHAPES, torch.bfloat16))
    copy_params(optimizer, resumed)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert_same_run(resumed, optimizer)
    train(optimizer, 5, first=7)
    train(resumed, 5, first=7)
    assert_same_run(resumed, optimizer)


def test_formats_are_converted_both_ways() -> None:
    """8 bits of a state dict load into float32 state exactly, and back into 8 bits."""
    eight = {"state_dtype": "8bit", "min_quantized_numel": 1}
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), **eight), 3)
    state_dict = saved(optimizer.state_dict())
    state_dict["param_groups"][0]["state_dtype"] = "float32"
    dense = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    dense.load_state_dict(state_dict)
    held = dense.state[dense.param_groups[0]["params"][0]]
    source = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert held.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
        exact = quantization.decode(source[f"{name}_codes"], source[f"{name}_scales"], is_signed=is_signed)
        assert_same_bits(held[name], exact)
    again = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    state_dict = saved(dense.state_dict())
    state_dict["param_groups"][0].update(eight)
    again.load_state_dict(state_dict)
    found = again.state[again.param_groups[0]["params"][0]]
    assert found.keys() == source.keys()
    # Codes come back where the scale does. It may be finer where a block's largest element had been rounded down:
    # in one block of 130 here.
    for name in ("exp_avg", "exp_avg_sq"):
        same = found[f"{name}_scales"] == source[f"{name}_scales"]
        assert same.float().mean() > 0.99
        elements = same.repeat_interleave(64, dim=1)[:, :99]
        assert torch.equal(found[f"{name}_codes"][elements], source[f"{name}_codes"][elements])


def test_masters_that_have_no_place_are_dropped_with_a_warning() -> None:
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), master_weights="split32"), 2)
    other = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    with pytest.warns(UserWarning, match=r"'master_low(16)?' for a parameter that is torch.float32.*fp32_parameters"):
        other.load_state_dict(optimizer.state_dict())
    assert "master_low16" not in other.state[other.param_groups[0]["params"][0]]
    train(other, 1)


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


@pytest.mark.parametrize("source", [torch.optim.AdamW, fusedopt.AdamW], ids=["torchs", "ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_states_of_a_run_in_double_precision(source: Callable[..., Any], dtype: torch.dtype) -> None:
    """They are cast, as torch casts them."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    theirs = train(source(make_params(SHAPES, double)), 2)
    for kwargs in [{}] if dtype.is_complex else [{}, {"state_dtype": "8bit"}]:
        ours = fusedopt.AdamW(make_params(SHAPES, dtype), **kwargs)
        ours.load_state_dict(theirs.state_dict())
        held = fusedopt.to_torch_state_dict(ours)["state"]
        for number, state in theirs.state_dict()["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                kept, expected = held[number][key], state[key].to(dtype if dtype.is_complex else torch.float32)
                if kwargs and state[key].dim() == 2 and state[key].numel() > 4096:  # as 8 bits hold it
                    parts = quantization.encode(expected, is_signed=key == "exp_avg")
                    expected = quantization.decode(*parts, is_signed=key == "exp_avg")
                assert_same_bits(kept, expected, key)
        train(ours, 1, first=2)


def test_a_model_that_leaves_double_precision_casts_its_states_by_loading_them() -> None:
    model = torch.nn.Linear(9, 5).double()
    optimizer = train(fusedopt.AdamW(model.parameters()), 2)
    model.float()
    with pytest.raises(ValueError, match=r"dtype torch.float64.*load_state_dict\(optimizer\.state_dict\(\)\) casts it"):
        train(optimizer, 1, first=2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, 1, first=2)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32


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
    assert held["exp_avg"].stride() == param.stride()  # it is stepped as it lies
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


def test_old_state_is_not_kept_alive_after_loading() -> None:
    import gc
    import weakref

    optimizer = train(fusedopt.AdamW([torch.nn.Parameter(torch.zeros(10))]), 2)
    old = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert old() is None
