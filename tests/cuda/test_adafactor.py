"""What rules that normalize find out before a step, in CUDA kernels run on the CPU: the bits of the CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated as kernels
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
from gpu import params_on
from matrices import FACTORED_VARIANTS as VARIANTS
from matrices import factored_dtypes
from scaling import Unread, assert_scaling_is_read_by_kernels

from fusedopt import Adafactor
from fusedopt.reference import adafactor as reference

pytestmark = pytest.mark.usefixtures("emulated")

# Several slabs, of which the last is shorter; one row, one column, one element; a panel and one column more, and less;
# several matrices, with one and more panels; no elements; vectors of a chunk, of more, of one element.
SHAPES = [(700, 40), (7, 257), (3, 4, 400), (1, 65), (33, 1), (1, 1), (2, 4097), (2, 4095), (2, 3, 4100), (6, 0)]
SHAPES += [(6, 4, 3, 3), (4096,), (4099,), (1,), (0,), ()]

# Slabs of at least 2^14 elements, more than 128 of them, so that they are taken whole: of 24 rows, the most that are
# added at once, and not; columns for one, two and three of each thread; beside them matrices that are not.
MANY_SLABS = [(65, 24, 700), (62, 61, 300), (1300, 1152), (642, 64), (7, 2000), (30, 20), (33,)]


def assert_kernels_agree(
    kwargs: dict[str, Any],
    params: Callable[[], Any],
    steps: int = 2,
    grads: Callable[..., None] = set_grads,
    **more: Any,
) -> Any:
    runs = [train(Adafactor(params(), **kwargs, **more, backend=b), steps, grads=grads) for b in ("cuda", "cpu")]
    assert len(runs[0]._sessions()["cuda"]._tables) == 1
    assert_same_run(*runs)
    if "max_grad_norm" in kwargs | more:
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)
    return runs[0]


@factored_dtypes
def test_variants(variant: str, dtype: str) -> None:
    params = assert_kernels_agree(VARIANTS[variant], lambda: params_on("cpu", SHAPES, DTYPES[dtype])).param_groups[0]
    assert all(param.isfinite().all() for param in params["params"])


@pytest.mark.parametrize("state_format", FORMATS)
def test_first_moments(state_format: str) -> None:
    kwargs = {**VARIANTS["momentum"], **FORMATS[state_format]}
    assert_kernels_agree(kwargs, lambda: params_on("cpu", SHAPES[:6], torch.bfloat16))


@pytest.mark.parametrize(("dtype", "rounding", "master"), MASTERS)
@pytest.mark.parametrize("variant", ["relative", "compat", "torch"])
def test_masters_and_rounded_parameters(variant: str, dtype: str, rounding: str, master: str | None) -> None:
    """The RMS is that of weights in full precision."""
    kwargs = {**VARIANTS[variant], "rounding": rounding, "master_weights": master}
    assert_kernels_agree(kwargs, lambda: params_on("cpu", [*SHAPES[:4], (2, 4097), (300,)], DTYPES[dtype]))


def test_a_parameter_written_by_others_counts_as_written() -> None:
    runs = []
    for backend in ("cuda", "cpu"):
        params = make_params([(40, 30)], torch.bfloat16)
        optimizer = train(Adafactor(params, master_weights="float32", backend=backend), 1)
        with torch.no_grad():
            params[0][3] *= 7.0
        runs.append(train(optimizer, 1, first=1))
    assert_same_run(*runs)


@pytest.mark.parametrize(
    ("variant", "how", "dtype"),
    [
        ("relative", {}, "fp32"),
        ("momentum", {"master_weights": "split24", "state_dtype": "8bit"}, "bf16"),
        ("compat", {}, "fp16"),
        ("torch", {}, "fp32"),
    ],
)
def test_slabs_taken_whole(variant: str, how: dict[str, Any], dtype: str) -> None:
    assert_kernels_agree({**VARIANTS[variant], **how}, lambda: make_params(MANY_SLABS, DTYPES[dtype]), steps=1)


@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_several_slabs_of_several_panels(variant: str) -> None:
    assert_kernels_agree(VARIANTS[variant], lambda: make_params([(641, 4100)], torch.float32), steps=1)


@pytest.mark.parametrize("shapes", [SHAPES, MANY_SLABS, [(2600, 70), (641, 4100), (2, 2, 9000), (9000, 2)]])
@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_sums_before_they_are_rounded(variant: str, shapes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An order of additions hardly ever shows in float32: here the doubles are compared, as the kernels leave them."""
    expected, workspaces = [], []
    rms, empty = reference._rms, torch.empty

    def recorded_rms(square_sum: torch.Tensor, x: torch.Tensor) -> float:
        expected.append(square_sum.item())
        return rms(square_sum, x)

    def recorded_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        if kwargs.get("dtype") == torch.uint8:
            workspaces.append(memory)
        return memory

    kwargs = {**VARIANTS[variant], "max_grad_norm": None}
    monkeypatch.setattr(reference, "_rms", recorded_rms)
    train(Adafactor(make_params(shapes, torch.float32), **kwargs, backend="eager"), 1)
    monkeypatch.setattr(torch, "empty", recorded_empty)
    train(Adafactor(make_params(shapes, torch.float32), **kwargs, backend="cuda"), 1)
    (workspace,) = workspaces
    found = set(workspace.view(torch.float64).tolist())
    assert len(expected) == 2 * sum(0 not in shape for shape in shapes)
    assert [value for value in expected if value not in found] == []


def test_columns_for_more_sums_than_a_block_holds() -> None:
    """Pairs over weighted sums of more than 2,048 columns, means over more than a chunk of rows."""
    assert_kernels_agree({}, lambda: make_params([(2, 2049), (3, 10_000), (9000, 2)], torch.float32))


def test_longer_lists_than_a_launch_takes() -> None:
    shapes = [(n % 7 + 1, n % 5 + 1) for n in range(400)] + [(n % 9 + 1,) for n in range(900)]

    def groups() -> list[dict[str, Any]]:
        params = make_params(shapes, torch.float32)
        return [{"params": params[i::40], "weight_decay": 10.0 ** -(i % 5)} for i in range(40)]

    assert_kernels_agree({"max_grad_norm": 0.5}, groups)


def test_clipping() -> None:
    for variant in ("relative", "torch"):
        kwargs = {**VARIANTS[variant], "max_grad_norm": 0.01}
        assert_kernels_agree(kwargs, lambda: params_on("cpu", SHAPES, torch.float32))


@pytest.mark.parametrize("variant", ["momentum", "torch"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scale_and_what_is_not_finite(found: float, variant: str) -> None:
    """A step that is skipped changes nothing: neither averages nor second moments.

    It comes after two others: in the first, averages forget what they were, so that doing it twice would not show.
    """
    kwargs = {**VARIANTS[variant], "max_grad_norm": 1.0}
    assert_scaling_is_read_by_kernels(
        "cuda",
        found,
        2,
        lambda backend: Adafactor(make_params([(300,), (7, 65), (2, 4100)], torch.float16), **kwargs, backend=backend),
    )


def test_slabs_are_skipped_too() -> None:
    params = make_params([(128, 128, 128)], torch.bfloat16)
    optimizer = train(Adafactor(params, backend="cuda"), 2)
    held = {"parameter": params[0].detach(), **optimizer.state[params[0]]}
    before = {name: value.clone() for name, value in held.items()}
    optimizer.found_inf = Unread(torch.tensor([1.0]))
    optimizer.step()
    for name, value in held.items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_blocks_and_threads_changes_nothing(order: int) -> None:
    for variant, how in (("momentum", {}), ("torch", {"max_grad_norm": 1.0})):
        kernels.module().set_order(order)
        try:
            assert_kernels_agree({**VARIANTS[variant], **how}, lambda: make_params(SHAPES, torch.bfloat16))
        finally:
            kernels.module().set_order(0)


@pytest.mark.parametrize("variant", ["relative", "torch"])
def test_a_gradient_that_is_not_finite_reaches_what_its_means_reach(variant: str) -> None:
    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step)
        params[0].grad[3, 4] = float("inf")
        params[1].grad[5] = float("nan")
        params[2].grad[0, 4098] = float("-inf")

    assert_kernels_agree(
        VARIANTS[variant], lambda: make_params([(40, 30), (50,), (2, 4100)], torch.float32), grads=grads
    )


@pytest.mark.parametrize("variant", ["relative", "momentum", "torch"])
def test_steps_counted_for_health(variant: str) -> None:
    reports = []
    for backend in ("cuda", "cpu"):
        params = make_params([(80, 64), (50,), (70, 70)], torch.bfloat16)
        optimizer = train(Adafactor(params, **VARIANTS[variant], backend=backend), 2)
        optimizer.record_health()
        set_grads(params, 2)
        params[1].grad[5] = float("nan")
        optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("shapes", "bytes_each"),
    [
        # Two sums of 8 bytes for each column of a slab of at least 320 rows and a factor for each column; for each
        # row two sums and a factor.
        ([(320, 768)], 16 / 320 + 4 / 320 + 20 / 768),
        ([(3200, 4096)], 16 / 320 + 4 / 3200 + 20 / 4096),
        ([(768, 3072)], 16 * 2 / 768 + 4 / 768 + 20 / 3072),
        # Slabs taken whole need no sums of rows but those of weights.
        ([(50_257, 768), (20_480, 768)], 16 * 64 / 20_480 + 4 / 20_480 + 12 / 768),
    ],
)
def test_memory_for_what_is_found_out(shapes: list[tuple[int, int]], bytes_each: float) -> None:
    """Of gradients and parameters that are not touched."""
    params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
    optimizer = Adafactor(params, backend="cuda")
    for param in params:
        param.grad = torch.empty(param.shape)
    session = optimizer._gather().sessions["cuda"]
    ((_, table),) = session._active()
    batch = table.batch(grad_multipliers=[1.0] * len(session._groups))
    found = kernels.module().workspace_bytes(batch=batch, clips=False, sums_updates=False)
    assert 0 < found <= bytes_each * sum(param.numel() for param in params) + 1024 * len(params)
