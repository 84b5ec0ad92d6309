"""The Triton kernels, interpreted, have the bits of the CPU backend: rules, formats, sizes, alignment, lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FORMATS,
    Case,
    assert_same_bits,
    assert_same_run,
    each_variant,
    format_kwargs,
    make_params,
    set_grads,
    train,
)
from interpreted import offset_params
from matrices import compiled_rules_and_formats, masters
from scaling import Unread, assert_scaling_is_read_by_kernels

from fusedopt import _core, backends
from fusedopt.backends import ParamStep
from fusedopt.reference.norm import chunk_sums

pytestmark = pytest.mark.usefixtures("interpreted")

# A whole tile of 16 blocks and a ragged one; rows of whole blocks, and ragged ones; nothing at all. The last shape is
# taken twice. Interpreted, a tile takes tens of milliseconds, hence so few.
SHAPES = [(1100,), (0,), (3,)]
SHAPES_2D = [(17, 64), (6, 0), (5, 130)]


def assert_kernels_agree(case: Case, kwargs: dict[str, Any], dtype: torch.dtype, shapes: list[Any]) -> None:
    runs = [train(case.ours(offset_params(dtype, shapes), **kwargs, backend=b), 2) for b in ("triton", "cpu")]
    assert len(runs[0]._sessions()["triton"]._tables) == 1
    assert_same_run(*runs)


@compiled_rules_and_formats
def test_rules_and_formats(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    has_codes = state_format.startswith("8bit") or state_format == "mixed"
    assert_kernels_agree(case, kwargs, DTYPES[dtype], SHAPES_2D if has_codes else SHAPES)


@pytest.mark.parametrize(("case", "kwargs"), each_variant())
def test_variants(case: Case, kwargs: dict[str, Any]) -> None:
    assert_kernels_agree(case, kwargs, torch.float32, SHAPES)


def test_rules_are_those_of_the_core() -> None:
    from fusedopt.triton_kernels.rules import RULES

    found = {}
    for name, rule in RULES.items():
        is_factored = rule.normalizing is not None and rule.normalizing.second < 0
        factors = ("exp_avg_sq_row", "exp_avg_sq_col") if is_factored else ()
        found[name] = tuple(state for state, _ in rule.states) + factors
    assert found == _core.rules()


@masters
def test_masters_and_rounded_parameters(dtype: str, rounding: str, master: str | None, state_format: str) -> None:
    """Somebody else writes a parameter between the steps, too, and weights are not finite."""
    runs = []
    for backend in ("triton", "cpu"):
        params = offset_params(DTYPES[dtype], [(17, 64), (5, 130)])
        with torch.no_grad():
            params[1][0, :4] = torch.tensor([float("inf"), float("nan"), -float("inf"), 1e-40])
        kwargs = {**CASES[0].kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
        optimizer = train(CASES[0].ours(params, **kwargs, backend=backend), 1)
        with torch.no_grad():
            params[0][0, :3] += 1
        runs.append(train(optimizer, 1, first=1))
    assert_same_run(*runs)


def test_random_bits_hang_on_the_global_index() -> None:
    """Of a shard whose elements' indices pass 2^32 in the middle of a block."""
    runs = []
    for backend in ("triton", "cpu"):
        (param,) = make_params([(3, 100)], torch.bfloat16)
        optimizer = CASES[0].ours([param], state_dtype="8bit", rounding="stochastic", min_quantized_numel=1)
        train(optimizer, 1)
        held = optimizer.state[param]
        specs = optimizer.states(optimizer.param_groups[0])
        entry = ParamStep(
            group=0,
            position=0,
            param=param.detach(),
            grad=param.grad,
            states=tuple(tuple(held[key] for key in spec.keys_in(held)) for spec in specs),
            step=held["step"],
            first_index=2**32 - 130,
        )
        session = backends.BACKENDS[backend].session()
        session.begin([optimizer.group_step(optimizer.param_groups[0])], [None])
        assert session.add(entry)
        session.step([1.0])
        runs.append(optimizer)
    assert_same_run(*runs)


def test_many_groups_and_rules_in_one_list() -> None:
    """More tensors than a program of `prepare` has, in an order that is not that of the launches."""
    runs = []
    for backend in ("triton", "cpu"):
        params = [p for k in range(35) for p in make_params([(k + 1,)], torch.bfloat16 if k % 3 else torch.float32)]
        params += make_params([(9, 64), (2, 100), (30,)] * 12, torch.float32)
        groups = [{"params": params[i::5], "lr": 10.0 ** -(i + 1), "amsgrad": i == 3, "seed": i} for i in range(5)]
        groups[1]["state_dtype"] = "8bit"
        optimizer = CASES[0].ours(groups, min_quantized_numel=1, backend=backend, maximize=True)
        train(optimizer, 1)
        optimizer.param_groups[2]["lr"] *= 0.5
        runs.append(train(optimizer, 1, first=1))
    assert_same_run(*runs)


@pytest.mark.parametrize("sizes", [[5], [0, 3], [4096, 4097, 1, 9_000]])
def test_norm(sizes: list[int]) -> None:
    found = []
    for backend in ("triton", "cpu"):
        params = [torch.nn.Parameter(torch.zeros(n, dtype=list(DTYPES.values())[n % 3])) for n in sizes]
        for i, param in enumerate(params):
            param.grad = torch.randn(sizes[i], generator=torch.Generator().manual_seed(i)).to(param.dtype)
        optimizer = CASES[0].ours(params, backend=backend, max_grad_norm=1.0)
        optimizer.step()
        found.append(optimizer)
    assert_same_bits(found[0].last_grad_norm, found[1].last_grad_norm)
    assert_same_run(*found)


def test_sums_of_blocks_come_in_chunks_and_in_list_order() -> None:
    """Of tensors that nobody needs to have: of more chunks than a program takes, of a part of one, of none."""
    from fusedopt.triton_kernels import launch, table

    numels = [65_536 + 4_100, 0, 64 * 5_000, 7, 64 * 4_096]
    given = np.zeros((len(numels), table.FIRST_PROGRAM.value), np.int64)
    given[:, table.NUMEL.value] = numels
    given[0, [table.SEGMENT.value, table.SEGMENT_STRIDE.value]] = 1, 3  # each element is a block of its own
    given[:, table.FORMATS.value] = [1, 0, 2, 0, 1]
    plan = launch.Plan(given.tobytes(), b"", ["adamw"])
    block_sums = torch.rand(plan.block_sums, generator=torch.Generator().manual_seed(0))
    found = launch.update_sums(plan, torch.from_numpy(plan.rows), block_sums)
    expected = []
    for numel, blocks in zip(numels, [65_536 + 4_100, 0, 5_000, 1, 4_096]):
        (row,) = np.flatnonzero(plan.rows[:, table.NUMEL.value] == numel)
        begin, room = plan.rows[row, table.FIRST_BLOCK_SUM.value], -(-blocks // 16) * 16
        both = [block_sums[at : at + blocks].double() for at in (begin, begin + room)]
        expected.append(torch.stack([chunk_sums(each) for each in both]))
    assert_same_bits(found, torch.cat(expected, 1))


def test_a_step_launches_the_same_whether_it_sums_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for where the sums go, and the kernel that adds them."""
    from fusedopt.triton_kernels import step

    launched: list[tuple[str, list[Any], dict[str, Any]]] = []

    def counted(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            launched.append((self.fn.__name__, [each is None for each in args], kwargs))
            return self.run(*args, grid=grid, warmup=False, **kwargs)

        return launch

    monkeypatch.setattr(type(step.step_kernel), "__getitem__", counted)
    optimizer = train(CASES[0].ours(make_params([(3,), (2, 70)], torch.float32), backend="triton"), 1)
    without, launched = launched, []
    optimizer.record_norms()
    train(optimizer, 1)
    assert [(name, kwargs) for name, _, kwargs in launched[:-1]] == [(name, kwargs) for name, _, kwargs in without]
    assert launched[-1][0] == "update_sum_kernel"
    assert [are_none for name, are_none, _ in without if name == "step_kernel"] == [[False, False, True, False]]
    assert not any(any(are_none) for _, are_none, _ in launched)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 1025, 5000])
def test_pairwise_sum(count: int) -> None:
    from fusedopt.triton_kernels import launch

    from fusedopt.reference.norm import pairwise_sum

    sums = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert launch.pairwise_sum(sums).item() == pairwise_sum(sums.clone()).item()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scale_and_what_is_not_finite(found: float) -> None:
    """A step that is skipped changes nothing, nor does it count."""
    assert_scaling_is_read_by_kernels(
        "triton",
        found,
        1,
        lambda backend: CASES[0].ours(
            make_params([(300,), (7, 65)], torch.float16), backend=backend, max_grad_norm=1.0
        ),
    )

    def detach(self) -> Unread:
        return self

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).to(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_learning_rate_on_the_device_is_read_there(dtype: torch.dtype) -> None:
    runs = []
    for backend in ("triton", "cpu"):
        rate = torch.tensor(1e-2, dtype=dtype)
        optimizer = CASES[0].ours(make_params([(30,)], torch.float32), lr=1e-3, backend=backend)
        optimizer.param_groups[0]["lr"] = Unread(rate) if backend == "triton" else rate
        train(optimizer, 2)
        rate /= 2
        runs.append(train(optimizer, 1, first=2))
    assert_same_run(*runs)


def test_steps_counted_for_health() -> None:
    reports = []
    for backend in ("triton", "cpu"):
        params = make_params([(80, 64), (50,)], torch.bfloat16)
        optimizer = train(CASES[0].ours(params, state_dtype="8bit", backend=backend), 2)
        optimizer.record_health()
        set_grads(params, 2)
        params[1].grad[5] = float("nan")
        optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1]


def test_a_plan_is_made_once() -> None:
    """For as long as tensors stay where they are."""
    params = make_params([(30,)], torch.float32)
    optimizer = CASES[0].ours(params, backend="triton")
    plans = []
    for step in range(3):
        train(optimizer, 1, first=step, grads=lambda params, step: params[0].grad is None and set_grads(params, step))
        plans.append(next(iter(optimizer._sessions()["triton"]._plans.values()))[1])
    assert plans[0] is plans[1] is plans[2]
