"""States of a device's parameters in files, streamed through pinned memory: the bits of resident states."""

from __future__ import annotations

import mmap
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMATS, Case, assert_same_run, format_kwargs, make_params, params_of, saved, set_grads, train
from queued import QueuedRuntime, queued, run, settle  # noqa: F401

import fusedopt
from fusedopt.offload import disk, staging
from fusedopt.offload.stream import _SLOTS

# Larger than a window and not, rows that are and are not whole chunks of the norm, a row larger than a window.
SHAPES = [(300, 256), (65,), (90, 257), (2, 70_000), (), (3, 4, 400), (0,), (33_000,)]
SMALL = [(40, 256), (3,), (7, 100), (60, 100)]
BYTES = 1 << 16
ADAMW = Case("adamw", fusedopt.AdamW, torch.optim.AdamW)

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files for little."""
    monkeypatch.setattr(disk, "SLAB_BYTES", 1 << 17)


def in_files(folder: Path, shapes: Any = SHAPES, **kwargs: Any) -> Any:
    where = {"backend": "cuda", "state_device": f"disk:{folder}", "stream_bytes": BYTES}
    return fusedopt.AdamW(make_params(shapes, torch.float32), **{**where, **kwargs})


def resident(shapes: Any = SHAPES, **kwargs: Any) -> Any:
    return fusedopt.AdamW(make_params(shapes, torch.float32), backend="cpu", **kwargs)


def resumed(optimizer: Any, **where: Any) -> Any:
    """A new optimizer, with the weights and the state dict of this one, and its states elsewhere."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "step_device")}
    params = [param.detach().clone() for param in params_of(optimizer)]
    found = fusedopt.AdamW([{**group, "params": params, "stream_bytes": BYTES, **where}], backend="cuda")
    found.load_state_dict(saved(optimizer.state_dict()))
    return found


@pytest.mark.parametrize("state_format", ["fp32", "8bit-stochastic", "mixed"])
def test_many_windows(queued: QueuedRuntime, state_format: str, tmp_path: Path) -> None:  # noqa: F811
    """Parameters are cut anywhere, several files are in a window, and buffers are used again and again."""
    options = {"max_grad_norm": 0.5, **format_kwargs(ADAMW, {}, state_format)}
    ours, usual = in_files(tmp_path, **options), resident(**options)
    ours.record_health()
    usual.record_health()
    run(queued, ours, 3, seed=7)
    train(usual, 3)
    assert_same_run(ours, usual)
    assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)
    assert ours.health_report() == usual.health_report()
    assert len(next(iter(ours._streamer()._rings.values())).windows) > 2 * _SLOTS
    assert len(list(tmp_path.glob(disk.PREFIX + "*/states-*"))) > 2


@pytest.mark.parametrize("state_format", FORMATS)
def test_saved_and_resumed_over_50_steps(
    queued: QueuedRuntime,  # noqa: F811
    state_format: str,
    tmp_path: Path,
) -> None:
    """In files, in windows of another size, resident, on the host, and in files again."""
    options = format_kwargs(ADAMW, {}, state_format)
    usual = train(resident(SMALL, **options), 50)
    files = f"disk:{tmp_path}"
    legs: list[dict[str, Any]] = [
        {"state_device": files, "stream_bytes": 2 * BYTES},
        {"state_device": None},
        {"state_device": "cpu"},
        {"state_device": files},
    ]
    ours = run(queued, in_files(tmp_path, SMALL, **options), 10)
    for leg, where in enumerate(legs, 1):
        ours = run(queued, resumed(ours, **where), 10, first=10 * leg, seed=leg)
        tensors = [value for held in ours.state.values() for key, value in held.items() if key != "step"]
        assert {disk.slab_of(value) is not None for value in tensors} == {where["state_device"] == files}
    assert_same_run(ours, usual)


# ---- what is waited for, and what is not -----------------------------------------------------------------


def missing_waits(runtime: QueuedRuntime, folder: Path, forget: set[int], forgotten: int, seeds: range) -> int:
    """In how many of these orders leaving out some waits shows: of streams, or the host's for one of its windows."""
    expected = train(resident(SHAPES[:4]), 2)
    synchronize = QueuedRuntime.synchronize
    found = 0
    for seed in seeds:
        ours = in_files(folder, SHAPES[:4])
        runtime.queues.late(0)
        set_grads(params_of(ours), 0)
        ours.step()  # makes states
        (ring,) = ours._streamer()._rings.values()
        calls: list[int] = []

        def one_less(event: int, events: Any = ring.copied_out, calls: list[int] = calls) -> None:
            calls += [event] if event in events else []
            if event not in events or len(calls) != forgotten:
                synchronize(runtime, event)

        runtime.queues.late(seed)
        runtime.waits, runtime.forget = 0, forget
        set_grads(params_of(ours), 1)
        runtime.synchronize = one_less  # type: ignore[method-assign]
        try:
            ours.step()
            settle(runtime)
            assert_same_run(ours, expected)
        except (RuntimeError, AssertionError):
            found += 1
            runtime.queues.drop_all()
        finally:
            runtime.forget = set()
            del runtime.synchronize
    return found


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.thorough)])
def test_any_order_of_streams_gives_the_same_bits(
    queued: QueuedRuntime,  # noqa: F811
    count: int,
    tmp_path: Path,
) -> None:
    assert missing_waits(queued, tmp_path, set(), 0, range(1, count + 1)) == 0


# Of streams, in a step's order: the kernel waits for what is copied in, and what is copied out for the kernel. The host
# waits for what is copied out, before it writes it to files.
@pytest.mark.parametrize(("wait", "of_host"), [(2, 0), (3, 0), (-1, 1), (-1, 3)])
def test_a_wait_that_is_missing_is_found(
    queued: QueuedRuntime,  # noqa: F811
    wait: int,
    of_host: int,
    tmp_path: Path,
) -> None:
    assert missing_waits(queued, tmp_path, {wait}, of_host, range(1, 9)) > 0


def test_pages_of_files_are_not_copied_asynchronously(
    queued: QueuedRuntime,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pretended device tells when they are."""
    monkeypatch.setattr(staging.disk, "holder", lambda slabs, tensor: None)
    ours = in_files(tmp_path, SMALL)
    set_grads(params_of(ours), 0)
    with pytest.raises(RuntimeError, match="pageable memory"):
        ours.step()


def test_a_step_ends_with_its_states_in_the_files(queued: QueuedRuntime, tmp_path: Path) -> None:  # noqa: F811
    """Whoever holds one of them need not ask the optimizer, which would wait."""
    ours, usual = in_files(tmp_path, SMALL), resident(SMALL)
    run(queued, ours, 1)
    held = ours.state[params_of(ours)[0]]["exp_avg"]
    queued.queues.late(5)
    set_grads(params_of(ours), 1)
    ours.step()
    train(usual, 2)
    assert torch.equal(held, usual.state[params_of(usual)[0]]["exp_avg"])
    settle(queued)


@pytest.mark.parametrize(("state_format", "per_param"), [("8bit-stochastic", 4.0625), ("fp32", 16.0)])
def test_bytes_moved_and_allocations(
    queued: QueuedRuntime,  # noqa: F811
    state_format: str,
    per_param: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of states on the host; and pages are asked for before they are read, and may go after they were written."""
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(disk.Slab, "advise", lambda slab, advice, at, length: advised.append((advice, at, length)))
    ours = in_files(tmp_path, [(256, 256), (128, 512)], **FORMATS[state_format])
    run(queued, ours, 1)
    before = queued.queues.counts()
    advised.clear()
    run(queued, ours, 3, first=1)
    after = queued.queues.counts()
    assert after["allocations"] == before["allocations"]
    copied = [(after[key] - before[key]) / 3 / 131_072 for key in ("bytes_in", "bytes_out")]
    assert copied[0] == copied[1]
    assert sum(copied) == pytest.approx(per_param, rel=1e-3)  # codes, scales; padding between tensors
    for advice in (mmap.MADV_WILLNEED, disk.COLD):
        assert sum(length for given, _, length in advised if given == advice) / 3 / 131_072 == copied[0]
    report = ours.memory_report()
    assert report.moved_bytes / 131_072 == per_param
    assert report.places == {"device": 8, "host": 0, "disk": per_param / 2 * 131_072}
    assert "on the disk" in str(report)
    assert "reads from files" in str(report)


# ---- beside others, and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_groups_in_several_places(queued: QueuedRuntime, max_grad_norm: float | None, tmp_path: Path) -> None:  # noqa: F811
    """Of one optimizer: in files of two folders, on the host, beside parameters, and in files of the CPU's own."""
    places: list[dict[str, Any]] = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        places.append({"state_device": f"disk:{tmp_path / folder}"})
    places += [{"state_device": "cpu"}, {}, {"state_device": f"disk:{tmp_path / 'a'}", "backend": "cpu"}]
    runs = []
    for where in (places, [{}] * len(places)):
        params = make_params([(40, 256), (60, 100), (30, 64), (65,), (20, 256)], torch.float32)
        size = 4 * params[-1].numel()  # a parameter of the CPU is one in the host's memory
        params[-1].data = queued.memory(size, "pageable").view(torch.float32).view(20, 256).copy_(params[-1].data)
        groups = [{"params": [param], **each} for param, each in zip(params, where)]
        backend = "cuda" if where is places else "cpu"
        optimizer = fusedopt.AdamW(
            [{"backend": backend, **group} for group in groups], stream_bytes=BYTES, max_grad_norm=max_grad_norm
        )
        runs.append(run(queued, optimizer, 3))
    assert_same_run(*runs)
    if max_grad_norm is not None:
        assert torch.equal(*(optimizer.last_grad_norm for optimizer in runs))
    for folder, param in zip("aba", [params_of(runs[0])[i] for i in (0, 1, 4)]):
        slab = disk.slab_of(runs[0].state[param]["exp_avg"])
        assert slab is not None
        assert slab.path.parts[len(tmp_path.parts)] == folder


@pytest.mark.parametrize("rows", [12, 40, 90])
def test_windows_without_files_between_those_with_some(queued: QueuedRuntime, rows: int, tmp_path: Path) -> None:  # noqa: F811
    """Each slot's buffer goes to its files before another window takes it, however many windows lie between."""
    places = [{"state_device": f"disk:{tmp_path}"}, {"state_device": "cpu"}] * 4
    runs = []
    for is_elsewhere in (True, False):
        params = make_params([(rows + i, 256) for i in range(len(places))], torch.float32)
        groups = [{"params": [param], **(where if is_elsewhere else {})} for param, where in zip(params, places)]
        backend = "cuda" if is_elsewhere else "cpu"
        runs.append(run(queued, fusedopt.AdamW(groups, backend=backend, stream_bytes=BYTES), 3))
    assert_same_run(*runs)


def test_a_full_disk_is_an_error_before_anything_changes(queued: QueuedRuntime, tmp_path: Path) -> None:  # noqa: F811
    """Files larger than a limit of the process stand for it: the same call fails with EFBIG instead of ENOSPC."""
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ours = in_files(tmp_path)
    before = [param.detach().clone() for param in params_of(ours)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
        with pytest.raises(OSError, match=r"optimizer states need [\d,]+ more bytes; make room there"):
            run(queued, ours, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert all(torch.equal(param, old) for param, old in zip(params_of(ours), before))
    assert not any(ours.state.values())
    assert_same_run(run(queued, ours, 1), train(resident(), 1))
