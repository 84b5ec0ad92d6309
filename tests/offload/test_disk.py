"""States in files: the bits of states in memory, and nothing left of a run that anybody could mistake."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMATS, Case, assert_same_run, format_kwargs, make_params, params_of, saved, train

import fusedopt
from fusedopt.offload import disk

SHAPES = [(300, 256), (65,), (90, 257), (), (0,), (4, 3, 100)]
FILES = disk.PREFIX + "*/states-*"


def on_disk(folder: Path, **kwargs: Any) -> Any:
    return fusedopt.AdamW(make_params(SHAPES, torch.float32), **{"state_device": f"disk:{folder}", **kwargs})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, and several windows, for little."""
    monkeypatch.setattr(disk, "SLAB_BYTES", 1 << 17)
    monkeypatch.setattr(disk.windows, "__defaults__", (1 << 17,))


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_bits_and_places(tmp_path: Path, state_format: str, max_grad_norm: float | None) -> None:
    case = Case("adamw", fusedopt.AdamW, torch.optim.AdamW)
    options = {**format_kwargs(case, {}, state_format), "max_grad_norm": max_grad_norm}
    ours, usual = on_disk(tmp_path, **options), fusedopt.AdamW(make_params(SHAPES, torch.float32), **options)
    for optimizer in (ours, usual):
        optimizer.record_health()
        train(optimizer, 3)
    assert_same_run(ours, usual)
    assert ours.health_report() == usual.health_report()
    if max_grad_norm is not None:
        assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)
    for held in ours.state.values():
        for key, value in held.items():
            assert (disk.slab_of(value) is not None) == (key != "step" and value.numel() > 0)
    report = ours.memory_report()
    assert report.places["disk"] == report.state_bytes
    assert "on the disk" in str(report)
    assert len(list(tmp_path.glob(FILES))) > 1


def test_scaling_and_skipped_steps(tmp_path: Path) -> None:
    runs = []
    for optimizer in (on_disk(tmp_path), fusedopt.AdamW(make_params(SHAPES, torch.float32))):
        for found in (0.0, 1.0):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
            train(optimizer, 1)
        runs.append(optimizer)
    assert_same_run(*runs)


def test_checkpoints_move_between_disk_and_memory(tmp_path: Path) -> None:
    usual = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), state_dtype="8bit"), 6)
    first = train(on_disk(tmp_path, state_dtype="8bit"), 2)
    second = fusedopt.AdamW([p.detach().clone() for p in params_of(first)], state_dtype="8bit")
    second.load_state_dict(saved(first.state_dict()))
    train(second, 2, first=2)
    third = fusedopt.AdamW(
        [p.detach().clone() for p in params_of(second)], state_dtype="8bit", state_device=f"disk:{tmp_path}"
    )
    third.load_state_dict(saved(second.state_dict()))
    train(third, 2, first=4)
    assert_same_run(third, usual)
    assert disk.slab_of(next(iter(third.state.values()))["exp_avg_codes"]) is not None


def test_files_go_with_their_states(tmp_path: Path) -> None:
    ours = train(on_disk(tmp_path), 1)
    (manifest,) = tmp_path.glob(disk.PREFIX + "*/" + disk.MANIFEST)
    assert json.loads(manifest.read_text())["process"] == os.getpid()
    kept = next(iter(ours.state.values()))["exp_avg"]
    expected = kept.clone()
    del ours
    gc.collect()
    assert len(list(tmp_path.glob(FILES))) == 1  # a tensor that somebody holds keeps its file
    assert torch.equal(kept, expected)
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# ---- processes that end -----------------------------------------------------------------------------------

_RUN = """
import sys, torch, fusedopt
sys.path.insert(0, {tests!r})
from cases import make_params, set_grads, params_of
optimizer = fusedopt.AdamW(make_params([(300, 256), (65,)], torch.float32), state_dtype="8bit",
                           state_device="disk:" + sys.argv[1])
for step in range(10**9):
    if step == 2:
        torch.save([optimizer.state_dict(), params_of(optimizer)], sys.argv[1] + "/checkpoint.part")
        import os; os.replace(sys.argv[1] + "/checkpoint.part", sys.argv[1] + "/checkpoint")
        print("saved", flush=True)
    set_grads(params_of(optimizer), step)
    optimizer.step()
    if len(sys.argv) > 2 and step == 3:
        break
"""


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    code = _RUN.format(tests=str(Path(__file__).parents[1]))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments], stdout=subprocess.PIPE, text=True, cwd="/"
    )


_LONGER = [pytest.param(seconds, marks=pytest.mark.thorough) for seconds in (0.01, 0.1)]


@pytest.mark.parametrize("after", [0.0, *_LONGER])
def test_a_run_that_is_killed_is_resumed_from_its_checkpoint(tmp_path: Path, after: float) -> None:
    process = _start(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.glob(disk.PREFIX + "*")
    state, weights = torch.load(tmp_path / "checkpoint", weights_only=False)
    ours = fusedopt.AdamW([w.detach() for w in weights], state_dtype="8bit", state_device=f"disk:{tmp_path}")
    ours.load_state_dict(state)
    assert not left.exists()  # nobody holds it any more, and nobody has read it
    train(ours, 3, first=2)
    assert_same_run(ours, train(fusedopt.AdamW(make_params([(300, 256), (65,)], torch.float32), state_dtype="8bit"), 5))


@pytest.mark.thorough  # starting a process takes seconds
def test_a_run_that_ends_leaves_nothing(tmp_path: Path) -> None:
    """And one that goes on keeps its files, whoever else begins."""
    ours = train(on_disk(tmp_path), 1)
    mine = set(tmp_path.iterdir())
    assert _start(tmp_path, "ends").wait() == 0
    assert set(tmp_path.iterdir()) - {tmp_path / "checkpoint"} == mine
    train(ours, 1, first=1)


# ---- a disk that is full -----------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    """Files larger than a limit of the process stand for it: the same call fails with EFBIG instead of ENOSPC."""
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ours = on_disk(tmp_path)
    before = [param.detach().clone() for param in params_of(ours)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
        with pytest.raises(OSError, match=r"optimizer states need [\d,]+ more bytes; make room there") as error:
            train(ours, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, usual)
    assert str(error.value.filename).startswith(str(tmp_path))
    assert all(torch.equal(param, old) for param, old in zip(params_of(ours), before))
    assert not any(ours.state.values())
    assert list(tmp_path.glob(FILES)) == []
    assert_same_run(train(ours, 1), train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 1))


@pytest.mark.thorough
def test_a_full_tmpfs(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True)
    if shutil.which("mount") is None or mount.returncode != 0:
        pytest.skip("needs to mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left on device: optimizer states need"):
            train(on_disk(tmp_path), 1)
        assert list(tmp_path.glob(FILES)) == []
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("folder", ["", "/nowhere/at/all"])
def test_folders_that_are_not_there(folder: str) -> None:
    with pytest.raises(ValueError, match=f"state_device='disk:{folder}' names no folder"):
        fusedopt.AdamW(make_params([(3,)], torch.float32), state_device=f"disk:{folder}")
