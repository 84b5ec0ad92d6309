"""Norms of updates: the same bits on every path, and what float64 says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import ADAFACTOR, CASES, ISAS, Case, assert_same_run, make_params, params_of, set_grads, train

import fusedopt
from fusedopt.backends import eager
from fusedopt.engine.fp32 import full_precision
from fusedopt.engine.norms import NormsReport
from fusedopt.reference.norm import block_square_sums, chunk_sums, pairwise_sum
from fusedopt.storage.quantization import row_length

EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8bit": EIGHT_BIT,
    "bf16 + split24 + 8bit": {**EIGHT_BIT, "master_weights": "split24", "dtype": torch.bfloat16},
    "bf16 + kahan": {"master_weights": "kahan", "dtype": torch.bfloat16},
    "bf16 + fp32 master": {"master_weights": "float32", "dtype": torch.bfloat16},
    "bf16": {"rounding": "stochastic", "state_dtype": "bfloat16", "dtype": torch.bfloat16},
    "fp16": {"rounding": "stochastic", "dtype": torch.float16},
}
# Of rows of whole blocks, ragged ones, and more than two work items of either.
SHAPES = [(7,), (5, 128), (300, 100), (33, 4_500), (129, 1_088), (9_001,)]
PATHS = [*ISAS, "eager", "triton", "cuda"]
# For kernels on a device, run slowly on the CPU: whole tiles and ragged ones, rows of codes that blocks do not divide,
# nothing at all.
DEVICE_SHAPES = [(7,), (17, 64), (9, 100), (6, 0), (4, 30)]


def weights_of(optimizer: fusedopt.FusedOptimizer) -> list[torch.Tensor]:
    return [
        full_precision(optimizer, group, param).clone() for group in optimizer.param_groups for param in group["params"]
    ]


def measured(
    backend: str, name: str, case: Case = CASES[0], shapes: Any = SHAPES, **kwargs: Any
) -> tuple[fusedopt.FusedOptimizer, NormsReport, list[torch.Tensor]]:
    """The second of two steps: its optimizer, what it measured, and the weights before it."""
    kwargs = {**case.kwargs, **FORMATS[name], **kwargs}
    dtype = kwargs.pop("dtype", torch.float32)
    optimizer = train(case.ours(make_params(shapes, dtype), **kwargs, backend=backend), 1)
    before = weights_of(optimizer)
    optimizer.record_norms()
    train(optimizer, 1, first=1)
    return optimizer, optimizer.norms_report(), before


def sums_of(optimizer: fusedopt.FusedOptimizer, before: list[torch.Tensor]) -> list[tuple[float, float]]:
    """The definition: squares in float32, added in halves within blocks, the sums of those in double."""
    found = []
    for param, old, new in zip(params_of(optimizer), before, weights_of(optimizer)):
        has_codes = any(state.dtype == torch.uint8 for state in optimizer.state[param].values())
        row = row_length(param.shape) if has_codes else param.numel()
        sums = [block_square_sums(each, row) for each in (new - old, new)]
        found.append(tuple(float(pairwise_sum(chunk_sums(each.double()))) for each in sums))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [CASES[0], ADAFACTOR], ids=lambda case: case.name)
def test_every_path_has_the_same_bits(
    case: Case, name: str, path: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shapes = SHAPES
    if path in ISAS:
        monkeypatch.setenv("FUSEDOPT_CPU_ISA", path)
    elif path in ("cuda", "triton"):
        if case is ADAFACTOR and name != "bf16 + split24 + 8bit":
            pytest.skip("the kernel that sums knows no rules")
        request.getfixturevalue({"cuda": "emulated", "triton": "interpreted"}[path])
        shapes = DEVICE_SHAPES
        monkeypatch.setattr(eager, "update_sums", None)  # it is kernels that sum, not the reference
    optimizer, report, before = measured("cpu" if path in ISAS else path, name, case, shapes)
    expected = sums_of(optimizer, before)
    assert [(each.update, each.weight) for each in report.parameters] == [
        (math.sqrt(update), math.sqrt(weight)) for update, weight in expected
    ]
    # What float64 says. Differences, squares and six additions within a block are rounded to float32, so that a sum is
    # within (1 + 2^-24)^9, and a norm within half of that.
    for each, old, new in zip(report.parameters, before, weights_of(optimizer)):
        update = (new.double() - old.double()).norm().item()
        assert each.update == pytest.approx(update, rel=2.7e-7)
        assert each.weight == pytest.approx(new.double().norm().item(), rel=2.7e-7)
    assert report.total.update == pytest.approx(math.hypot(*(each.update for each in report.parameters)), rel=1e-12)


@pytest.mark.parametrize("shape", [(1_311, 101), (2, 65_537), (65_536 + 63,), (3, 65_536), (70_001, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_where_the_step_is_cut_up_changes_nothing(shape: tuple[int, ...], threads: int) -> None:
    """Rows that are no whole blocks are cut before multiples of a chunk."""
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        optimizer, report, before = measured("cpu", "8bit", shapes=[shape])
    finally:
        torch.set_num_threads(held)
    ((update, weight),) = sums_of(optimizer, before)
    assert (report.total.update, report.total.weight) == (math.sqrt(update), math.sqrt(weight))


@pytest.mark.parametrize("name", FORMATS)
def test_measuring_changes_no_bit_of_the_step(name: str) -> None:
    kwargs = dict(FORMATS[name])
    dtype = kwargs.pop("dtype", torch.float32)
    found, _, _ = measured("cpu", name)
    assert_same_run(found, train(CASES[0].ours(make_params(SHAPES, dtype), **CASES[0].kwargs, **kwargs), 2))
    found.record_health()  # together with what is counted
    train(found, 1, first=2)
    assert found.health_report().elements == sum(each.elements for each in found.norms_report().parameters)


def test_the_report() -> None:
    a, b, still = (torch.nn.Parameter(torch.full((4,), value)) for value in (2.0, 0.0, 1.0))
    a.grad, b.grad = torch.ones(4), torch.full((4,), 2.0)
    groups = [{"params": [("a", a)], "lr": 0.5}, {"params": [("b", b), ("still", still)], "lr": 0.25}]
    optimizer = fusedopt.SGD(groups)
    with pytest.raises(ValueError, match=r"no norms were taken; call record_norms\(\) before"):
        optimizer.norms_report()
    optimizer.record_norms()
    optimizer.step()
    report = optimizer.norms_report()
    assert [(each.where, each.update, each.weight) for each in report.parameters] == [("a", 1.0, 3.0), ("b", 1.0, 1.0)]
    assert [(each.where, each.update, each.elements) for each in report.groups] == [
        ("group 0", 1.0, 4),
        ("group 1", 1.0, 4),
    ]
    assert [each.where for each in report.worst(1)] == ["b"]
    assert report.total.ratio == math.sqrt(2) / math.sqrt(10)
    assert "group 1" in str(report)
    optimizer.record_norms(False)
    with pytest.raises(ValueError, match="no norms were taken"):
        optimizer.norms_report()


def test_a_step_that_is_left_out_has_no_norms() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.full((4,), 1e6)
    optimizer = fusedopt.SGD([param], lr=0.5, skip_step_above=1.0)
    optimizer.record_norms()
    optimizer.step()
    with pytest.raises(ValueError, match="no norms were taken"):
        optimizer.norms_report()


def test_gradients_that_are_released_are_measured_over_the_whole_step() -> None:
    reports = []
    for releases in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 8))
        optimizer = fusedopt.AdamW(model.named_parameters(), lr=1e-2)
        if releases:
            fusedopt.release_gradients(optimizer)
        for step in range(3):
            optimizer.record_norms(step > 0)
            model(torch.full((4, 8), float(step + 1))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        reports.append(optimizer.norms_report())
    assert reports[0] == reports[1]
    assert len(reports[0].parameters) == 4


@pytest.mark.parametrize("name", ["fp32", "bf16 + split24 + 8bit"])
def test_a_compiled_step_is_measured(name: str) -> None:
    torch.compiler.reset()
    kwargs = {**CASES[0].kwargs, **FORMATS[name]}
    dtype = kwargs.pop("dtype", torch.float32)
    reports = []
    for is_compiled in (False, True):
        # The first has no gradient, so positions among those that are stepped are not those in the group.
        params = [torch.nn.Parameter(torch.ones(3)), *make_params(SHAPES[:3], dtype)]
        optimizer = CASES[0].ours(params, **kwargs)
        step = torch.compile(optimizer.step, backend="aot_eager") if is_compiled else optimizer.step
        for number in range(2):
            set_grads(params[1:], number)
            optimizer.record_norms()
            optimizer.record_health()
            step()
        reports.append((optimizer.norms_report(), optimizer.health_report()))
    assert reports[0] == reports[1]
    assert [each.where for each in reports[1][0].parameters] == [f"parameter {i} of group 0" for i in (1, 2, 3)]
