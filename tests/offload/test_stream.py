"""States on the host, streamed through a device that runs late: the bits of resident states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, FORMATS, Case, assert_same_run, format_kwargs, make_params, params_of, saved, set_grads, train
from queued import QueuedRuntime, queued, run  # noqa: F401

import fusedopt
from fusedopt.offload.stream import _SLOTS

# Larger than a window and not, rows that are and are not whole chunks of the norm, a row larger than a window.
SHAPES = [(300, 256), (65,), (90, 257), (2, 70_000), (), (3, 4, 400), (0,), (33_000,)]
SMALL = [(40, 256), (3,), (7, 100)]
BYTES = 1 << 16

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


def streamed(cls: Any, params: Any, **kwargs: Any) -> Any:
    return cls(params, backend="cuda", **{"state_device": "cpu", "stream_bytes": BYTES, **kwargs})


@pytest.mark.parametrize("state_format", ["fp32", "8bit-stochastic", "mixed"])
def test_many_windows(queued: QueuedRuntime, state_format: str) -> None:  # noqa: F811
    """Parameters are cut anywhere, and slots are used again and again."""
    case = Case("adamw", fusedopt.AdamW, torch.optim.AdamW)
    options = {"max_grad_norm": 0.5, **format_kwargs(case, {}, state_format)}
    ours = streamed(fusedopt.AdamW, make_params(SHAPES, torch.float32), **options)
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu", **options)
    ours.record_health()
    ours.record_norms()
    usual.record_health()
    usual.record_norms()
    run(queued, ours, 3, seed=7)
    train(usual, 3)
    assert_same_run(ours, usual)
    assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)
    assert ours.health_report() == usual.health_report()
    assert ours.norms_report() == usual.norms_report()
    assert len(next(iter(ours._streamer()._rings.values())).windows) > 2 * _SLOTS


@pytest.mark.parametrize("case", [case for case in CASES if case.ours.takes_sums], ids=lambda case: case.name)
def test_what_takes_sums_is_not_cut(queued: QueuedRuntime, case: Case) -> None:  # noqa: F811
    """Its sums go over a whole parameter, for which buffers grow."""
    ours = streamed(case.ours, make_params(SHAPES, torch.float32), **case.kwargs)
    run(queued, ours, 2, seed=7)
    assert_same_run(ours, train(case.ours(make_params(SHAPES, torch.float32), backend="cpu", **case.kwargs), 2))


def missing_waits(runtime: QueuedRuntime, forget: set[int], seeds: range) -> int:
    """In how many of these orders leaving out some waits shows."""
    expected = train(fusedopt.AdamW(make_params(SHAPES[:4], torch.float32), backend="cpu"), 2)
    found = 0
    for seed in seeds:
        ours = streamed(fusedopt.AdamW, make_params(SHAPES[:4], torch.float32))
        runtime.queues.late(0)
        set_grads(params_of(ours), 0)
        ours.step()  # makes states
        runtime.waits, runtime.forget = 0, forget
        try:
            run(runtime, ours, 1, first=1, seed=seed)
            assert_same_run(ours, expected)
        except (RuntimeError, AssertionError):
            found += 1
            runtime.queues.drop_all()
        finally:
            runtime.forget = set()
    return found


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.thorough)])
def test_any_order_of_streams_gives_the_same_bits(queued: QueuedRuntime, count: int) -> None:  # noqa: F811
    assert missing_waits(queued, set(), range(1, count + 1)) == 0


# In a step's order: what is copied in waits for the step to begin, the kernel for that, what is copied out for the
# kernel; two windows later, what is copied in for that. At the end the caller's stream waits for all.
WAITS = {"copied in": 2, "stepped": 3, "copied out": 2 + 2 * _SLOTS}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_that_is_missing_is_found(queued: QueuedRuntime, wait: str) -> None:  # noqa: F811
    assert missing_waits(queued, {WAITS[wait]}, range(1, 13)) > 0


def test_pageable_memory_is_found(queued: QueuedRuntime) -> None:  # noqa: F811
    queued.pinned_as = "pageable"
    ours = streamed(fusedopt.AdamW, make_params(SMALL, torch.float32))
    set_grads(params_of(ours), 0)
    with pytest.raises(RuntimeError, match="pageable memory"):
        ours.step()


# ---- steady state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state_format", "per_param"), [("8bit-stochastic", 4.0625), ("fp32", 16.0)])
def test_bytes_moved_and_allocations(queued: QueuedRuntime, state_format: str, per_param: float) -> None:  # noqa: F811
    params = make_params([(512, 512), (256, 1024)], torch.float32)
    ours = streamed(fusedopt.AdamW, params, **FORMATS[state_format])
    run(queued, ours, 1)
    before, traffic = queued.queues.counts(), ours._streamer().traffic
    moved = traffic.to_device + traffic.from_device
    run(queued, ours, 5, first=1)
    after = queued.queues.counts()
    assert after["allocations"] == before["allocations"]
    copied = [(after[key] - before[key]) / 5 / 524_288 for key in ("bytes_in", "bytes_out")]
    assert copied[0] == copied[1]
    assert sum(copied) == pytest.approx(per_param, rel=1e-3)  # codes, scales; padding between tensors
    assert (traffic.to_device + traffic.from_device - moved) / 5 / 524_288 == sum(copied)
    report = ours.memory_report()
    assert report.moved_bytes / 524_288 == per_param
    assert report.places == {"device": 8, "host": per_param / 2 * 524_288, "disk": 0}
    assert "host" in str(report)


# ---- checkpoints -----------------------------------------------------------------------------------------

PAGED = [name for name in fusedopt.optimizer_names() if name.startswith("paged_")]


@pytest.mark.parametrize("name", PAGED)
def test_paged_names_equal_their_twins(queued: QueuedRuntime, name: str) -> None:  # noqa: F811
    """Over 50 steps, saved and resumed on the way: in another size of window, resident, and back."""
    shapes = [(70, 100), (65,)]

    def make(name: str, **kwargs: Any) -> Any:
        return fusedopt.create_optimizer(name, make_params(shapes, torch.float32), lr=1e-2, backend="cuda", **kwargs)

    plain = name.removeprefix("paged_")
    plain = plain if plain in fusedopt.optimizer_names() else plain.removesuffix("_32bit")
    usual = run(queued, make(plain), 50)
    makers = [
        lambda: make(name, stream_bytes=BYTES),
        lambda: make(name, stream_bytes=2 * BYTES),
        lambda: make(plain),
        lambda: make(name),
    ]
    ours = makers[0]()
    for leg, maker in enumerate(makers):
        if leg > 0:
            kept, weights = saved(ours.state_dict()), [param.detach().clone() for param in params_of(ours)]
            ours = maker()
            ours.load_state_dict(kept)
            for param, value in zip(params_of(ours), weights):
                param.data.copy_(value)
        begin, end = (0, 13, 25, 37, 50)[leg : leg + 2]
        run(queued, ours, end - begin, first=begin, seed=leg)
        is_paged = leg != 2
        assert all(queued.is_host(v) == is_paged for s in ours.state.values() for k, v in s.items() if k != "step")
    assert_same_run(ours, usual)


def test_on_the_cpu_paged_is_plain() -> None:
    params = make_params(SMALL, torch.float32)
    ours = train(fusedopt.create_optimizer("paged_adamw_8bit", params, lr=1e-2), 3)
    assert_same_run(ours, train(fusedopt.AdamW(make_params(SMALL, torch.float32), lr=1e-2, state_dtype="8bit"), 3))
    report = ours.memory_report()
    assert report.moved_bytes == 0
    assert report.places["device"] == 0
    assert "state_device='cpu' changes nothing for parameters on the CPU" in str(report)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_device": "cuda"}, ValueError, "state_device='cuda' is no place for states"),
        ({"state_device": 3}, ValueError, "state_device=3"),
        ({"stream_bytes": 100}, ValueError, "stream_bytes=100 is too small"),
        ({"stream_bytes": 1e6}, TypeError, "stream_bytes"),
        ({"reserve_bytes": -1}, ValueError, "reserve_bytes=-1"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.AdamW(make_params(SMALL, torch.float32), **options)


# ---- as much as there is room for ------------------------------------------------------------------------


def test_auto_fills_the_device(queued: QueuedRuntime) -> None:  # noqa: F811
    """Two of four parameters fit beside the reserve; the step is the same, clipped too."""
    shapes = [(64, 256), (64, 256), (7, 100), (64, 256)]

    def auto(**options: Any) -> Any:
        return streamed(fusedopt.AdamW, make_params(shapes, torch.float32), state_device="auto", **options)

    reserve = 1 << 20
    ours = auto(reserve_bytes=reserve, max_grad_norm=0.3)
    queued.leave_free(reserve + 2 * 64 * 256 * 4 + 2 * 1024 * 4)
    usual = train(fusedopt.AdamW(make_params(shapes, torch.float32), backend="cpu", max_grad_norm=0.3), 3)
    run(queued, ours, 3, seed=5)
    assert_same_run(ours, usual)
    assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)
    hosts = [queued.is_host(ours.state[param]["exp_avg"]) for param in params_of(ours)]
    assert hosts == [False, True, False, True]
    report = ours.memory_report()
    assert report.places["host"] == 2 * 2 * 64 * 256 * 4
    assert report.moved_bytes == 2 * report.places["host"]


def test_auto_survives_a_device_that_is_full_after_all(queued: QueuedRuntime) -> None:  # noqa: F811
    """What is said to be free may be in pieces."""
    ours = streamed(fusedopt.AdamW, make_params(SMALL, torch.float32), state_device="auto", reserve_bytes=0)
    queued.leave_free(4 * BYTES + 1000)
    queued.free_bytes = lambda device: 1 << 40  # type: ignore[method-assign]
    queued.allocate = _full  # type: ignore[method-assign]
    run(queued, ours, 2)
    assert_same_run(ours, train(fusedopt.AdamW(make_params(SMALL, torch.float32), backend="cpu"), 2))
    assert all(queued.is_host(ours.state[param]["exp_avg"]) for param in params_of(ours))


def _full(requests: Any) -> Any:
    raise torch.OutOfMemoryError("the pretended device is full")
