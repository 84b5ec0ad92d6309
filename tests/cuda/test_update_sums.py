"""The sums of squares that step kernels take on the way, run on the CPU: those of the reference, to the last bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import emulated as kernels
import pytest
import torch
from cases import ADAFACTOR, CASES, Case, assert_same_run, make_params, params_of, set_grads, train
from gpu import params_on
from matrices import each_rule
from scaling import Unread

import fusedopt
from fusedopt.engine import gather
from fusedopt.engine.fp32 import full_precision
from fusedopt.engine.norms import NormsRecord
from fusedopt.reference.norm import block_square_sums, chunk_sums, pairwise_sum
from fusedopt.storage.quantization import row_length

pytestmark = pytest.mark.usefixtures("emulated")

EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}
# The two ways in which a lane's elements lie in a tile: half a tile apart, and side by side.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"state_dtype": "bfloat16", "rounding": "stochastic"}),
    "8bit": (torch.float32, EIGHT_BIT),
    "bf16 + split24 + 8bit": (torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24"}),
}
# Rows of whole blocks and of parts, of more than a tile, of less than a block; no elements; one.
SHAPES = [(21, 100), (17, 30), (2, 3, 64), (2, 1_100), (0,), (1_000,), (3, 0), (1, 1)]

Sums = dict[tuple[int, int], tuple[float, float]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Sums]:
    """The sums of every step whose norms are recorded, as they are before roots are taken of them."""
    found: list[Sums] = []
    end = NormsRecord.end

    def keeping(self: NormsRecord) -> None:
        found.append(dict(self.sums))
        end(self)

    monkeypatch.setattr(NormsRecord, "end", keeping)
    return found


def second_step(optimizer: Any, grads: Callable[..., None] = set_grads) -> Any:
    """Takes two steps and records the norms of the second."""
    train(optimizer, 1, grads=grads).record_norms()
    return train(optimizer, 1, first=1, grads=grads)


def assert_sums_agree(make: Callable[[str], Any], taken: list[Sums], grads: Callable[..., None] = set_grads) -> None:
    runs = [second_step(make(backend), grads) for backend in ("cuda", "eager")]
    found, expected = taken
    assert found == expected
    assert len(found) == len([param for param in params_of(runs[0]) if param.grad is not None])
    assert_same_run(*runs)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [CASES[0], ADAFACTOR], ids=lambda case: case.name)
def test_rows_of_any_length_at_any_address(case: Case, name: str, taken: list[Sums]) -> None:
    dtype, how = FORMATS[name]
    assert_sums_agree(
        lambda backend: case.ours(params_on("cpu", SHAPES, dtype), **{**case.kwargs, **how}, backend=backend), taken
    )


@pytest.mark.parametrize(("case", "kwargs"), each_rule())
def test_every_rule(case: Case, kwargs: dict[str, Any], taken: list[Sums]) -> None:
    how = {"state_dtype": "bfloat16", "master_weights": "kahan"}
    assert_sums_agree(
        lambda backend: case.ours(make_params([(5, 100), (300,)], torch.bfloat16), **kwargs, **how, backend=backend),
        taken,
    )


def test_blocks_of_several_chunks(taken: list[Sums]) -> None:
    """More than 4,096 blocks, in rows of one block each and in one row; chunks follow each other in list order."""
    shapes = [(4_200, 30), (300_001,), (7,), (4_096, 64)]
    assert_sums_agree(
        lambda backend: fusedopt.Lion(make_params(shapes, torch.bfloat16), **EIGHT_BIT, backend=backend), taken
    )


def test_longer_lists_than_a_launch_takes(taken: list[Sums]) -> None:
    def make(backend: str) -> Any:
        params = make_params([(n % 37 + 1,) for n in range(520)], torch.float32)
        return CASES[0].ours([{"params": params[i::3], "lr": 10.0**-i} for i in range(3)], backend=backend)

    assert_sums_agree(make, taken)


def test_groups_and_rules_in_one_step(taken: list[Sums]) -> None:
    """Rules are stepped one after the other; sums are in the order of the list. One parameter has no gradient."""

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step)
        params[1].grad = None

    def make(backend: str) -> Any:
        params = make_params([(40, 9), (64,), (3, 70), (5,), (100, 3), (8, 8)], torch.float32)
        groups = [
            {"params": params[:2], "amsgrad": True},
            {"params": params[2:4]},
            {"params": params[4:], "amsgrad": True, "lr": 0.5},
        ]
        return CASES[0].ours(groups, **CASES[0].kwargs, backend=backend)

    assert_sums_agree(make, taken, grads)
    taken.clear()
    shapes = [(40, 9), (64,), (3, 70), (5,), (2, 3, 50)]  # matrices are of another rule than vectors
    assert_sums_agree(
        lambda backend: ADAFACTOR.ours(
            make_params(shapes, torch.float32), **ADAFACTOR.kwargs, max_grad_norm=0.1, backend=backend
        ),
        taken,
    )


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_that_are_skipped_do_not_move(name: str, taken: list[Sums]) -> None:
    """A lane may leave single elements alone, and others of its warp none."""

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step)
        for param in params:
            param.grad.view(-1)[[5, 70, -1]] = torch.tensor([float("nan"), float("inf"), float("nan")]).to(param.dtype)

    dtype, how = FORMATS[name]
    assert_sums_agree(
        lambda backend: CASES[0].ours(
            make_params([(5, 128), (3, 100), (600,)], dtype),
            **{**CASES[0].kwargs, **how},
            nonfinite="skip_block",
            backend=backend,
        ),
        taken,
        grads,
    )


def weight_sums(optimizer: fusedopt.FusedOptimizer) -> list[float]:
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            held = full_precision(optimizer, group, param)
            has_codes = any(state.dtype == torch.uint8 for state in optimizer.state[param].values())
            blocks = block_square_sums(held, row_length(param.shape) if has_codes else param.numel())
            found.append(float(pairwise_sum(chunk_sums(blocks.double()))))
    return found


@pytest.mark.parametrize("how", ["found_inf", "skip_step_above"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [CASES[0], ADAFACTOR], ids=lambda case: case.name)
def test_a_step_that_a_device_leaves_out(
    case: Case, name: str, how: str, taken: list[Sums], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are 0, and weights are those there are; by which the host then knows, and forgets them."""
    monkeypatch.setattr(gather, "_was_left_out", lambda *_: False)
    dtype, kwargs = FORMATS[name]
    if how == "skip_step_above":
        kwargs = {**kwargs, "skip_step_above": 1e6}
    params = params_on("cpu", [(21, 100), (300,), (0,), (1, 1)], dtype)
    optimizer = train(case.ours(params, **{**case.kwargs, **kwargs}, backend="cuda"), 1)
    optimizer.record_norms()
    if "split" not in name:  # whose parts such a number would have to be written to
        params[-1].data.fill_(float("inf"))  # less itself, it is NaN
    before = weight_sums(optimizer)
    if how == "found_inf":
        optimizer.grad_scale = torch.tensor([64.0])
        optimizer.found_inf = Unread(torch.tensor([1.0]))
    else:
        params[0].grad[0, 0] = float("inf")
    optimizer.step()
    assert [sums for _, sums in sorted(taken[0].items())] == [(0.0, weight) for weight in before]
    assert weight_sums(optimizer) == before
    assert optimizer.state[params[0]]["step"] == 1


def test_a_loss_scale_is_divided_out(taken: list[Sums]) -> None:
    runs = []
    for backend in ("cuda", "eager"):
        params = make_params([(21, 100), (300,)], torch.float16)
        optimizer = train(CASES[0].ours(params, **CASES[0].kwargs, max_grad_norm=1.0, backend=backend), 1)
        optimizer.record_norms()
        set_grads(params, 1, scale=8.0)
        found_inf = torch.zeros(1)
        optimizer.grad_scale = torch.tensor([64.0])
        optimizer.found_inf = Unread(found_inf) if backend == "cuda" else found_inf
        optimizer.step()
        runs.append(optimizer)
    assert taken[0] == taken[1]
    assert_same_run(*runs)


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_blocks_and_threads_changes_nothing(order: int, taken: list[Sums]) -> None:
    dtype, how = FORMATS["bf16 + split24 + 8bit"]
    for each in (0, order):
        kernels.module().set_order(each)
        try:
            second_step(CASES[0].ours(make_params([(9_000,), (40, 100)], dtype), **how, backend="cuda"))
        finally:
            kernels.module().set_order(0)
    assert taken[0] == taken[1]


def launched_by(step: Callable[[], Any]) -> Counter[int]:
    """How often a step launches which kernels, by address."""
    before = Counter(kernels.module().runtime.launches())
    step()
    return Counter(kernels.module().runtime.launches()) - before


def test_steps_that_sum_go_by_the_kernel_for_any_formats() -> None:
    """Others go by the kernels of their formats."""
    usual = train(CASES[0].ours(make_params([(300,)], torch.float32), backend="cuda"), 1)
    unusual = train(CASES[0].ours(make_params([(300,)], torch.float16), backend="cuda"), 1)
    plain, general = launched_by(usual.step), launched_by(unusual.step)
    assert plain.total() == general.total() == 2  # what is derived, and the step
    assert (plain & general).total() == 1
    usual.record_norms()
    unusual.record_norms()
    summing = launched_by(usual.step)
    assert summing.total() == 3  # and the sums of blocks
    assert summing & plain == plain & general
    assert summing & general == general
    assert launched_by(unusual.step) == summing
    usual.record_norms(False)
    assert launched_by(usual.step) == plain
    apart = train(CASES[0].ours(make_params([(300,)], torch.float32), backend="cuda"), 1)
    for _ in range(3):
        apart.step()
    assert_same_run(usual, apart)
