"""Parameters that lie in another order than row-major: channels_last, and any other that fills its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_bits, assert_same_run, make_params, saved, set_grads

import fusedopt
from fusedopt.engine.gather import Gathered

SHAPES = [(64, 32, 3, 3), (5, 7, 2, 9), (6, 4, 2, 3, 5), (70, 11), (1, 8, 1, 3)]


def permuted(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same numbers, the second dimension last in memory."""
    return [torch.nn.Parameter(param.detach().movedim(1, -1).contiguous().movedim(-1, 1)) for param in params]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each step has copied back."""
    counts: list[int] = []
    write_back = Gathered.write_back

    def counted(gathered: Gathered) -> None:
        counts.append(len(gathered._copies))
        write_back(gathered)

    monkeypatch.setattr(Gathered, "write_back", counted)
    return counts


def steps(
    case: Case,
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    is_permuted: bool,
    same_order: bool = True,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> torch.optim.Optimizer:
    params = make_params(list(shapes), dtype)
    if is_permuted:
        params = permuted(params)
    optimizer = case.ours(params, **{**case.kwargs, **options})
    for step in range(3):
        set_grads(params, step)
        for param in params:
            assert param.grad is not None
            grad = torch.empty_like(param).copy_(param.grad) if same_order else param.grad.contiguous()
            param.grad = grad
        optimizer.step()
    return optimizer


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.1},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "8bit", "min_quantized_numel": 1},
    {"master_weights": "kahan"},
    {"master_weights": "float32", "rounding": "stochastic"},
]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[-1]], ids=lambda case: case.name)
def test_bits_are_those_of_row_major_order(
    case: Case, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    options = {**options, "backend": backend}
    expected = steps(case, dtype, options, is_permuted=False)
    for same_order in (True, False):
        assert_same_run(steps(case, dtype, options, is_permuted=True, same_order=same_order), expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_other_backends_are_given_the_same_runs(backend: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue({"cuda": "emulated", "triton": "interpreted"}[backend])
    runs = [
        steps(CASES[0], torch.float32, {"backend": name}, is_permuted=True, shapes=[(8, 5, 3, 3)])
        for name in (backend, "cpu")
    ]
    assert_same_run(*runs)


@pytest.mark.parametrize("case", [case for case in CASES if not case.ours.takes_sums], ids=lambda case: case.name)
def test_nothing_is_copied_where_order_does_not_matter(case: Case, copies: list[int]) -> None:
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"master_weights": "kahan"})):
        optimizer = steps(case, dtype, options, is_permuted=True)
        if options.get("master_weights") is None:
            assert set(copies) == {0}
        for param, held in optimizer.state.items():
            assert all(
                value.stride() == param.stride()
                for value in held.values()
                if value.shape == param.shape and value.dtype == torch.float32
            )
    steps(case, torch.float32, {"max_grad_norm": 1.0}, is_permuted=True)
    assert copies[-1] > 0  # a sum is taken in row-major order


def test_a_compiled_step_is_the_same() -> None:
    runs = []
    for compiled in (False, True):
        params = permuted(make_params(SHAPES, torch.float32))
        optimizer = fusedopt.AdamW(params)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for i in range(3):
            set_grads(params, i)
            step()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_checkpoints_keep_numbers_and_take_the_parameters_order() -> None:
    ordered = steps(CASES[0], torch.float32, {}, is_permuted=False)
    for state_dict in (ordered.state_dict(), steps(CASES[0], torch.float32, {}, is_permuted=True).state_dict()):
        for is_permuted in (False, True):
            params = make_params(SHAPES, torch.float32)
            optimizer = fusedopt.AdamW(permuted(params) if is_permuted else params, **CASES[0].kwargs)
            optimizer.load_state_dict(saved(copy.deepcopy(state_dict)))
            for (param, held), other in zip(optimizer.state.items(), ordered.state.values()):
                for name, value in held.items():
                    assert_same_bits(value, other[name])
                    assert value.dim() == 0 or value.stride() == param.stride()


@pytest.mark.parametrize(
    "make",
    [
        lambda params: fusedopt.Adafactor(params, lr=1e-2, scale_parameter=False, relative_step=False),
        fusedopt.StableAdamW,
    ],
    ids=["adafactor", "stable_adamw"],
)
def test_rules_that_take_sums_are_not_flattened(make: Callable[..., Any], copies: list[int]) -> None:
    runs = []
    for is_permuted in (False, True):
        params = make_params(SHAPES, torch.float32)
        params = permuted(params) if is_permuted else params
        optimizer = make(params)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        runs.append(optimizer)
    assert copies[-1] > 0
    assert_same_run(*runs)
