"""What rules that normalize find out before a step, in interpreted Triton kernels: the bits of the CPU backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    FORMATS,
    MASTERS,
    assert_same_bits,
    assert_same_run,
    make_params,
    set_grads,
    train,
)
from interpreted import offset_params
from matrices import EVERY_PASS, factored_dtypes
from matrices import FACTORED_VARIANTS as VARIANTS
from scaling import Unread, assert_scaling_is_read_by_kernels

from fusedopt import Adafactor, _core
from fusedopt.reference import adafactor as reference
from fusedopt.reference import factored
from fusedopt.reference.norm import pairwise_sum

pytestmark = pytest.mark.usefixtures("interpreted")

# Whole tiles, of which each block is of one row, and not; several matrices; one column; no elements; what is no matrix.
# Interpreted, a program takes milliseconds, hence so few.
SHAPES = [(17, 64), (33, 40), (3, 4, 10), (5, 1), (6, 0), (0,), (), (70,)]


def assert_kernels_agree(
    kwargs: dict[str, Any], params: Callable[[], Any], steps: int = 2, grads: Callable[..., None] = set_grads
) -> Any:
    runs = [train(Adafactor(params(), **kwargs, backend=b), steps, grads=grads) for b in ("triton", "cpu")]
    assert len(runs[0]._sessions()["triton"]._tables) == 1
    assert_same_run(*runs)
    if kwargs.get("max_grad_norm"):
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)
    return runs[0]


def cut(*shape: int) -> tuple[Any, Any]:
    """How a tensor of this shape is cut up: its row of the table, and what is needed. Nothing reads its memory."""
    from fusedopt.triton_kernels import launch

    rule = "adafactor_matrix" if len(shape) > 1 else "adafactor_vector"
    shapes = [shape[:-1], shape[:-2] + shape[-1:]] if len(shape) > 1 else [shape]
    table = _core.TensorTable()
    table.add_group(
        rule=rule,
        config=dict.fromkeys(launch.RULES[rule].config, 0.0),
        seed=0,
        roundings=[0] * len(shapes),
        rounding=0,
        master=0,
        master_key="",
    )
    assert table.add(
        group=0,
        position=0,
        param=torch.empty(shape),
        grad=torch.empty(shape),
        states=tuple((torch.empty(held),) for held in shapes),
        master=None,
        step=torch.zeros(()),
        first_index=0,
    )
    plan = launch.Plan(table.rows(), table.cuts(), [rule])
    return plan.cuts[0], plan.launches[0].cuts


@factored_dtypes
def test_variants(variant: str, dtype: str) -> None:
    # How tensors are cut up does not hang on the variant: some variants take all shapes, the others one of a kind.
    shapes = SHAPES if dtype == "fp32" and variant in EVERY_PASS else [(17, 64), (3, 4, 10), (70,)]
    (group,) = assert_kernels_agree(VARIANTS[variant], lambda: offset_params(DTYPES[dtype], shapes)).param_groups
    assert all(param.isfinite().all() for param in group["params"])


@pytest.mark.parametrize("state_format", FORMATS)
def test_first_moments(state_format: str) -> None:
    kwargs = {**VARIANTS["momentum"], **FORMATS[state_format]}
    assert_kernels_agree(kwargs, lambda: make_params([(17, 64), (3, 130), (33,)], torch.bfloat16))


@pytest.mark.parametrize(("dtype", "rounding", "master"), MASTERS)
def test_masters_and_rounded_parameters(dtype: str, rounding: str, master: str | None) -> None:
    """The RMS is that of weights in full precision. Somebody else writes a parameter between the steps, too."""
    runs = []
    for backend in ("triton", "cpu"):
        params = make_params([(17, 64), (33,)], DTYPES[dtype])
        kwargs = {**VARIANTS["momentum"], "rounding": rounding, "master_weights": master}
        optimizer = train(Adafactor(params, **kwargs, backend=backend), 1)
        with torch.no_grad():
            params[0][0, :3] += 1
        runs.append(train(optimizer, 1, first=1))
    assert_same_run(*runs)


@pytest.mark.parametrize(
    ("variant", "shapes"),
    [
        ("relative", [(643, 3), (2, 1, 4097)]),
        pytest.param("relative", [(2, 1, 8193)], marks=pytest.mark.thorough),
        ("torch", [(2, 4097), (4099,)]),
        ("compat", [(4101, 1)]),  # means over more than a chunk of rows
    ],
)
def test_slabs_and_panels(variant: str, shapes: list[Any]) -> None:
    assert_kernels_agree(VARIANTS[variant], lambda: make_params(shapes, torch.float32), steps=1)


@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_as_many_slabs_as_there_may_be(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer rows than they have; the last is shorter."""
    from fusedopt.triton_kernels import passes, table

    fill = passes.Cuts.fill

    def of_three_rows(cuts: Any, *others: Any) -> Any:
        cuts[:, [table.HEIGHT.value, table.SLABS.value]] = 3, 64
        return fill(cuts, *others)

    runs = []
    monkeypatch.setattr(factored, "_MIN_ROWS", 2)
    monkeypatch.setattr(passes.Cuts, "fill", of_three_rows)
    for backend in ("triton", "eager"):
        runs.append(train(Adafactor(make_params([(190, 6)], torch.float32), **VARIANTS[variant], backend=backend), 1))
    assert_same_run(*runs)


@pytest.mark.parametrize("rows", [1, 319, 320, 639, 640, 641, 20_479, 20_480, 20_481, 1_000_003])
def test_slabs_are_those_of_the_reference(rows: int) -> None:
    from fusedopt.triton_kernels import table

    cuts, _ = cut(rows, 1)
    slabs = factored._slabs(torch.empty(rows, 1)).shape
    assert cuts[table.SLABS.value] == slabs[0]
    assert cuts[table.HEIGHT.value] == slabs[1]


@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_sums_before_they_are_rounded(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of additions hardly ever shows in float32: here the doubles are compared, as the kernels leave them."""
    from fusedopt.triton_kernels import passes, prepare

    expected = []
    rms = reference._rms

    def recorded(square_sum: torch.Tensor, x: torch.Tensor) -> float:
        expected.append(square_sum.item())
        return rms(square_sum, x)

    found = []
    paired = prepare.paired

    def recorded_pairs(*args: Any) -> Any:
        sums = paired(*args)
        found.append(sums.handle.data.tolist())
        return sums

    shapes = [(641, 3), (3, 40, 50), (2, 4400), (9000,)]
    kwargs = {**VARIANTS[variant], "max_grad_norm": None}
    monkeypatch.setattr(reference, "_rms", recorded)
    train(Adafactor(make_params(shapes, torch.float32), **kwargs, backend="eager"), 1)
    monkeypatch.setattr(prepare, "paired", recorded_pairs)
    workspace = passes.workspace  # which is not to be read before it is written
    monkeypatch.setattr(passes, "workspace", lambda *args: tuple(x.fill_(torch.nan) for x in workspace(*args)))
    train(Adafactor(make_params(shapes, torch.float32), **kwargs, backend="triton"), 1)
    assert len(expected) == 2 * len(shapes)
    assert sorted(expected) == sorted(number for numbers in found for number in numbers)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000, 2305])
def test_pairs_of_any_number(count: int) -> None:
    """By one program; beside it another sum, of other numbers."""
    import triton
    from fusedopt.triton_kernels import reduce

    numbers = torch.rand(count + 700, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    sums = torch.empty(2, dtype=torch.float64)
    triton.jit(_pairs)[(1,)](numbers, sums, count, reduce.paired)
    assert sums[0].item() == pairwise_sum(numbers[:count].clone()).item()
    assert sums[1].item() == pairwise_sum(numbers[count : count + 700].clone()).item()


def _pairs(numbers, sums, count, PAIRED):  # type: ignore[no-untyped-def]  # noqa: N803
    import triton.language as tl

    both = tl.arange(0, 2)
    tl.store(sums + both, PAIRED(numbers, both.to(tl.int64) * count, tl.where(both == 0, count, 700), 2, 256, 8))


def test_many_groups_in_one_list() -> None:
    """In an order that is not that of the launches, with more tensors than a program of `prepare` has."""

    def groups() -> list[dict[str, Any]]:
        shapes = [(n % 7 + 1, n % 5 + 1) for n in range(6)] + [(n % 9 + 1,) for n in range(66)]
        params = make_params(shapes, torch.float32)
        return [{"params": params[i::5], "weight_decay": 10.0 ** -(i % 3)} for i in range(5)]

    assert_kernels_agree({"max_grad_norm": 0.5}, groups, steps=1)


def test_launches_are_as_many_for_more_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.triton_kernels import step

    kind = type(step.step_kernel)
    launched = []

    def counted(self: Any, grid: Any) -> Any:
        launched.append(self.fn.__name__)
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    monkeypatch.setattr(kind, "__getitem__", counted)
    counts = []
    for copies in (1, 4):
        launched.clear()
        train(Adafactor(make_params([(4, 6), (2, 3, 5), (9,)] * copies, torch.float32), backend="triton"), 1)
        counts.append(sorted(launched))
    assert counts[0] == counts[1]
    assert len(counts[0]) == 11 + 4


@pytest.mark.parametrize("variant", ["momentum", "torch"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scale_and_what_is_not_finite(found: float, variant: str) -> None:
    """A step that is skipped changes nothing: neither averages nor second moments.

    It comes after two others: in the first, averages forget what they were, so that doing it twice would not show.
    """
    kwargs = {**VARIANTS[variant], "max_grad_norm": 1.0}
    assert_scaling_is_read_by_kernels(
        "triton",
        found,
        2,
        lambda backend: Adafactor(make_params([(7, 65), (2, 70), (30,)], torch.float16), **kwargs, backend=backend),
    )


@pytest.mark.parametrize("variant", ["external", "torch"])
def test_a_learning_rate_on_the_device_is_read_there(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, should the class leave it to them."""
    monkeypatch.setattr(Adafactor, "derives_on_device", True)
    runs = []
    for backend in ("triton", "cpu"):
        rate = torch.tensor(1e-2, dtype=torch.float64)
        optimizer = Adafactor(make_params([(4, 6), (30,)], torch.float32), **VARIANTS[variant], backend=backend)
        optimizer.param_groups[0]["lr"] = Unread(rate) if backend == "triton" else rate
        train(optimizer, 2)
        rate /= 2
        runs.append(train(optimizer, 1, first=2))
    assert_same_run(*runs)


@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_a_gradient_that_is_not_finite_reaches_what_its_means_reach(variant: str) -> None:
    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step)
        params[0].grad[3, 4] = float("inf")
        params[1].grad[5] = float("nan")
        params[2].grad[0, 68] = float("-inf")

    assert_kernels_agree(VARIANTS[variant], lambda: make_params([(9, 30), (50,), (2, 70)], torch.float32), grads=grads)


def test_zeros_keep_their_sign() -> None:
    def zeros() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.full(shape, -0.0)) for shape in ((4, 6), (9,))]

    def no_grads(params: list[torch.nn.Parameter], step: int) -> None:
        for param in params:
            param.grad = torch.zeros_like(param)

    optimizer = assert_kernels_agree(VARIANTS["relative"], zeros, steps=1, grads=no_grads)
    assert all(param.signbit().all() for param in optimizer.param_groups[0]["params"])


def test_steps_counted_for_health() -> None:
    reports = []
    for backend in ("triton", "cpu"):
        params = make_params([(20, 64), (50,), (7, 70)], torch.bfloat16)
        optimizer = train(Adafactor(params, beta1=0.9, state_dtype="8bit", backend=backend), 1)
        optimizer.record_health()
        set_grads(params, 1)
        params[1].grad[5] = float("nan")
        optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1]


def test_checkpoints_go_from_backend_to_backend() -> None:
    runs = []
    for names in (("triton", "cpu"), ("cpu", "triton")):
        params = make_params([(20,), (3, 70)], torch.float32)
        optimizer = train(Adafactor(params, beta1=0.9, backend=names[0]), 1)
        resumed = Adafactor(params, beta1=0.9, backend=names[1])
        resumed.load_state_dict(optimizer.state_dict())
        runs.append(train(resumed, 1, first=1))
    assert_same_run(*runs)


@pytest.mark.parametrize(
    ("shape", "bytes_each"),
    [
        # Two sums of 8 bytes for each column of a slab of at least 320 rows and a factor for each column; for each
        # row two sums and a factor.
        ((3200, 4096), 16 / 320 + 4 / 3200 + 20 / 4096),
        ((50_257, 768), 16 * 64 / 50_257 + 4 / 50_257 + 20 / 768),
        ((7, 3, 3), 16 / 3 + 4 / 3 + 20 / 3),
        ((1 << 24,), 16 / 4096),
    ],
)
def test_memory_for_what_is_found_out(shape: tuple[int, ...], bytes_each: float) -> None:
    _, cuts = cut(*shape)
    assert 0 < 8 * cuts.doubles + 4 * cuts.floats <= bytes_each * math.prod(shape) + 2048


@pytest.mark.parametrize("columns", [1, 40, 1024, 3_000_000_000])
@pytest.mark.parametrize("rows", [1, 3, 1_000_000_007])
def test_where_elements_of_whole_tiles_are(rows: int, columns: int) -> None:
    """Also where numbers of 32 bits do not reach; no tensor is there."""
    import triton
    from fusedopt.triton_kernels import normalize

    found = torch.empty(2, 1024, dtype=torch.int64)
    places = triton.jit(_places)
    for begin in (0, rows * columns - 64, rows * columns * 2 - 320, columns * 7):
        begin = max(begin - begin % 64, 0)
        places[(1,)](torch.tensor([begin, rows, columns]), found, normalize._places_of)
        for k in range(0, 1024, 31):
            row, column = divmod(begin + k, columns)
            assert found[:, k].tolist() == [row, row // rows * columns + column], (begin, k)


def _places(numbers, found, PLACES):  # type: ignore[no-untyped-def]  # noqa: N803
    import triton.language as tl

    offsets = tl.arange(0, 1024)
    begin, rows, columns = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    line, column = PLACES(begin, offsets, (rows, columns))
    tl.store(found + offsets, line)
    tl.store(found + 1024 + offsets, column)
