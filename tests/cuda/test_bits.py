"""The CUDA kernels, run on the CPU, have the bits of the CPU backend: rules, formats, sizes, alignment, lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FORMATS,
    ODD_SIZES,
    Case,
    assert_same_bits,
    assert_same_run,
    format_kwargs,
    make_params,
    set_grads,
    train,
)
from gpu import params_on
from matrices import masters_of_all, rules_and_formats
from scaling import assert_scaling_is_read_by_kernels

from fusedopt.reference.norm import square_sums

pytestmark = pytest.mark.usefixtures("emulated")

# Rows of whole blocks, ragged ones, of a multiple of a lane's elements that blocks do not divide; one block of threads
# has 8 rows of 1,024, or a part of 70,000.
SHAPES_2D = [(70, 100), (4, 64), (7, 257), (3, 4, 400), (2, 9000), (90, 63), (1, 65), (6, 0)]
SIZES = [n for n in ODD_SIZES if n < 2000] + [8192, 8193]


def assert_kernels_agree(case: Case, kwargs: dict[str, Any], dtype: torch.dtype, shapes: list[Any], steps: int) -> None:
    runs = [train(case.ours(params_on("cpu", shapes, dtype), **kwargs, backend=b), steps) for b in ("cuda", "cpu")]
    assert len(runs[0]._sessions()["cuda"]._tables) == 1
    assert_same_run(*runs)


@rules_and_formats
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    shapes = SHAPES_2D if has_codes else [(n,) for n in SIZES]
    assert_kernels_agree(case, kwargs, DTYPES[dtype], shapes, 3)


@masters_of_all
def test_masters_and_rounded_parameters(
    case: Case, kwargs: dict, dtype: str, rounding: str, master: str | None, state_format: str
) -> None:
    kwargs = {**kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
    shapes = [(n,) for n in SIZES[:-2]] + [(7, 257), (4, 64), (2, 4000)]
    assert_kernels_agree(case, kwargs, DTYPES[dtype], shapes, 2)


def test_longer_lists_than_a_launch_takes() -> None:
    shapes = [(n % 37 + 1, 64) for n in range(1100)]
    for how in ({}, {"state_dtype": "8bit", "min_quantized_numel": 1}):
        runs = []
        for backend in ("cuda", "cpu"):
            params = make_params(shapes, torch.float32)
            groups = [{"params": params[i::50], "lr": 10.0 ** -(i % 5)} for i in range(50)]
            runs.append(train(CASES[0].ours(groups, **how, max_grad_norm=0.5, backend=backend), 2))
        assert_same_run(*runs)
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)


@pytest.mark.parametrize("sizes", [[5], [0, 3], [4096], [4097, 1, 20_000], [9_000_000, 17]])
def test_norm(sizes: list[int]) -> None:
    """Of up to more chunks than one block adds."""
    found = []
    for backend in ("cuda", "cpu"):
        params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in sizes]
        for i, param in enumerate(params):
            param.grad = torch.randn(sizes[i], generator=torch.Generator().manual_seed(i)).bfloat16()
        optimizer = CASES[0].ours(params, backend=backend, max_grad_norm=1.0)
        optimizer.step()
        found.append(optimizer)
    assert_same_bits(found[0].last_grad_norm, found[1].last_grad_norm)
    assert_same_run(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_sums_of_the_norm(dtype: torch.dtype, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk in double, where the order of additions shows; the norm hides it, which is rounded to float32.

    A gradient that begins beside a multiple of 16 bytes is loaded number by number.
    """
    sizes = [4096, 5, 20_000, 4097]
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
    for i, param in enumerate(params):
        generator = torch.Generator().manual_seed(i)
        numbers = torch.randn(sizes[i] + offset, generator=generator)
        if dtype != torch.float32:  # of any size, or sums in double would be exact
            numbers *= 2 ** torch.randint(-12, 12, numbers.shape, generator=generator)
        param.grad = numbers.to(dtype)[offset:]
    optimizer = CASES[0].ours(params, backend="cuda", max_grad_norm=1.0)
    optimizer.step()
    session = type(optimizer._sessions()["cuda"])
    step_scaled, found = session.step_scaled, []

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.square_sums())
        return step_scaled(self, *args, **kwargs)

    monkeypatch.setattr(session, "step_scaled", recording)
    optimizer.step()
    assert_same_bits(*found, torch.cat([square_sums(param.grad) for param in params]))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scale_and_what_is_not_finite(found: float) -> None:
    """A step that is skipped changes nothing, nor does it count."""
    assert_scaling_is_read_by_kernels(
        "cuda",
        found,
        1,
        lambda backend: CASES[0].ours(
            make_params([(300,), (7, 65)], torch.float16), backend=backend, max_grad_norm=1.0
        ),
    )


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_blocks_and_threads_changes_nothing(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import emulated

    expected = train(CASES[0].ours(make_params([(9000,), (40, 100)], torch.bfloat16), max_grad_norm=1.0), 2)
    emulated.module().set_order(order)
    try:
        params = make_params([(9000,), (40, 100)], torch.bfloat16)
        found = train(CASES[0].ours(params, max_grad_norm=1.0, backend="cuda"), 2)
    finally:
        emulated.module().set_order(0)
    assert_same_run(found, expected)


def test_steps_counted_for_health() -> None:
    reports = []
    for backend in ("cuda", "cpu"):
        params = make_params([(80, 64), (50,)], torch.bfloat16)
        optimizer = train(CASES[0].ours(params, state_dtype="8bit", backend=backend), 2)
        optimizer.record_health()
        set_grads(params, 2)
        params[1].grad[5] = float("nan")
        optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1]
