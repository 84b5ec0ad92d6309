"""nonfinite="skip_block": what a step would spoil stays as it was, on every path and in every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, set_grads, train

import fusedopt
from fusedopt import _core

EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8bit": EIGHT_BIT,
    "bf16 + split24 + 8bit": {**EIGHT_BIT, "master_weights": "split24", "dtype": torch.bfloat16},
    "bf16 + kahan + bf16": {"state_dtype": "bfloat16", "master_weights": "kahan", "dtype": torch.bfloat16},
    "bf16 + fp32 master": {"master_weights": "float32", "rounding": "stochastic", "dtype": torch.bfloat16},
    "fp16 + fp16": {"state_dtype": "float16", "rounding": "stochastic", "dtype": torch.float16},
}
# Rows of whole blocks and ragged ones, which are stepped in other ways.
SHAPES = [(5, 128), (3, 100)]
RULES = [case for case in CASES if case.ours.why_no_block_is_skipped is None]
SPOILT = ((0, 70), (2, 99))  # places in each parameter
KERNELS_OF_DEVICES = {"triton": "interpreted", "cuda": "emulated"}  # and the fixtures that make them usable here
PATHS = ["eager", *_core.available_isas(), "triton", "cuda"]


def spoil(params: list[torch.nn.Parameter], *values: float) -> None:
    """Puts numbers in the places, the last one in all that are left."""
    for param in params:
        for place, value in zip(SPOILT, (*values, values[-1])):
            param.grad[place] = value


def stepped(case: Case, backend: str, dtype: torch.dtype, **kwargs: Any) -> fusedopt.FusedOptimizer:
    """Three steps, of which the second has gradients that are not finite, or whose squares are not."""
    params = make_params(SHAPES, dtype)
    optimizer = case.ours(params, **{**case.kwargs, **kwargs}, nonfinite="skip_block", backend=backend)
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            # The square of the second number is inf, but a weight that is divided by its root is not.
            spoil(params, float("nan"), float("inf") if dtype == torch.float16 else 1e30)
        optimizer.step()
    return optimizer


# Formats do not know rules: `make test` takes every format of one rule, and every rule in 8 bits with a master.
COMBINATIONS = [
    pytest.param(
        case,
        name,
        id=f"{case.name}-{name}",
        marks=[] if case is RULES[0] or name == "bf16 + split24 + 8bit" else pytest.mark.thorough,
    )
    for case in RULES
    for name in FORMATS
]


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize(("case", "name"), COMBINATIONS)
def test_every_path_skips_the_same(
    case: Case, name: str, path: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    kwargs = {**case.variants[-1], **FORMATS[name]}
    dtype = kwargs.pop("dtype", torch.float32)
    expected = stepped(case, "eager", dtype, **kwargs)
    backend = "cpu" if path in _core.available_isas() else path
    if backend == "cpu":
        monkeypatch.setenv("FUSEDOPT_CPU_ISA", path)
    else:
        request.getfixturevalue(KERNELS_OF_DEVICES[path])
    assert_same_run(stepped(case, backend, dtype, **kwargs), expected)


def tensors_of(optimizer: fusedopt.FusedOptimizer) -> list[torch.Tensor]:
    """Everything that a step writes but the count, as copies."""
    written = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            held = optimizer.state[param]
            written += [param.detach().clone(), *(x.clone() for key, x in held.items() if key != "step")]
    return written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)  # the square of the last is inf
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_spoilt_stays_and_the_rest_is_stepped(name: str, backend: str, value: float) -> None:
    kwargs = dict(FORMATS[name])
    dtype = kwargs.pop("dtype", torch.float32)
    if dtype == torch.float16 and value == 1e30:
        pytest.skip("float16 has no such number")
    runs = []
    for spoils in (False, True):
        params = make_params([(5, 128)], dtype)
        optimizer = fusedopt.AdamW(params, lr=0.1, **kwargs, nonfinite="skip_block", backend=backend)
        train(optimizer, 1)
        before = tensors_of(optimizer)
        set_grads(params, 1)
        if spoils:
            spoil(params, value)
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 2
        runs.append(tensors_of(optimizer))
    is_skipped = torch.zeros(5, 128, dtype=torch.bool)
    width = 64 if "8bit" in name else 1
    for row, column in SPOILT:
        is_skipped[row, column // width * width : column // width * width + width] = True
    for held, (plain, spoilt) in zip(before, zip(*runs)):
        where = is_skipped if held.shape == (5, 128) else is_skipped.reshape(5, 2, 64).any(-1)
        assert torch.equal(spoilt[where], held[where])
        assert torch.equal(spoilt[~where], plain[~where])
        assert not torch.equal(plain[where], held[where]) or held.shape != (5, 128)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton", "cuda"])
@pytest.mark.parametrize(("kwargs", "each"), [({}, 1), (EIGHT_BIT, 64)], ids=["fp32", "8bit"])
def test_health_counts_them(kwargs: dict, each: int, backend: str, request: pytest.FixtureRequest) -> None:
    if backend in KERNELS_OF_DEVICES:
        request.getfixturevalue(KERNELS_OF_DEVICES[backend])
    params = make_params([(5, 128)], torch.float32)
    optimizer = fusedopt.AdamW(params, **kwargs, nonfinite="skip_block", backend=backend)
    optimizer.record_health()
    for step in range(3):
        set_grads(params, step)
        if step == 1:
            spoil(params, float("nan"))
        optimizer.step()
    assert optimizer.health_report().totals["skipped"] == 2 * each


def test_it_is_kept_in_groups_and_checkpoints() -> None:
    params = make_params([(5, 128)], torch.float32)
    optimizer = train(fusedopt.AdamW(params, nonfinite="skip_block"), 1)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["nonfinite"] == "skip_block"
    loaded = fusedopt.AdamW(make_params([(5, 128)], torch.float32))
    assert loaded.param_groups[0]["nonfinite"] == "propagate"
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["nonfinite"] == "skip_block"
    del saved["param_groups"][0]["nonfinite"]  # of a version before
    loaded = fusedopt.AdamW(make_params([(5, 128)], torch.float32))
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["nonfinite"] == "propagate"


def test_refusals_are_sentences() -> None:
    params = make_params([(5, 128)], torch.float32)
    with pytest.raises(ValueError, match="nonfinite='skip' "):
        fusedopt.AdamW(params, nonfinite="skip")
    with pytest.raises(ValueError, match="nonfinite='skip_block' is not possible in Adafactor: one such number"):
        fusedopt.Adafactor(params, nonfinite="skip_block")
