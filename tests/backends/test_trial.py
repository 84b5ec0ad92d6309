"""What is found out before the first step on a device: once, where nothing is disturbed, and remembered."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import make_params, train
from emulated import EmulatedBackend
from torch._subclasses import FakeTensorMode

from fusedopt import SGD, AdamW, _core, backends
from fusedopt.backends import trial, triton

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(trial.FIRST_CHECK, raising=False)
    return tmp_path / "fusedopt"


class Broken(EmulatedBackend):
    """Kernels that write one unit in the last place too much to what they stepped last."""

    def module(self) -> Any:
        module = super().module()
        names = [name for name in dir(module) if not name.startswith("__")]
        return SimpleNamespace(**{name: getattr(module, name) for name in names})

    def session(self) -> Any:
        session = super().session()
        step, add, added = session.step_scaled, session.add, []

        def broken(*args: Any, **kwargs: Any) -> Any:
            found = step(*args, **kwargs)
            codes = added[-1].states[0][0]
            codes.view(-1)[:1].view(torch.uint8)[:1] += 1
            return found

        def adding(entry: Any) -> bool:
            added.append(entry)
            return add(entry)

        session.step_scaled, session.add = broken, adding
        return session


@pytest.mark.usefixtures("emulated")
def test_what_passed_is_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.first_difference(EmulatedBackend(), CPU) is None
    (mark,) = cache.iterdir()
    assert mark.name.startswith("first-check-")
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedBackend, "session", lambda self: pytest.fail("this machine has passed"))
        assert trial.first_difference(EmulatedBackend(), CPU) is None
        patch.setattr(trial, "__version__", "99")
        with pytest.raises(pytest.fail.Exception):
            trial.first_difference(EmulatedBackend(), CPU)
    for name in ("torch", "triton", "device", "driver", "backend", "build"):
        assert name in mark.read_text()


@pytest.mark.usefixtures("emulated")
def test_what_differs_is_said_and_not_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trial.first_difference(Broken(), CPU)
    assert found is not None
    assert "a first step with float32 parameters and float32 states was not that of the CPU (1 of 210" in found
    assert "please report this with the output of `fusedopt check --device cpu` and `fusedopt info`" in found
    assert not cache.exists()
    monkeypatch.setenv(trial.FIRST_CHECK, "0")
    assert trial.first_difference(Broken(), CPU) is None


@pytest.mark.usefixtures("emulated")
def test_kernels_that_raise_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise RuntimeError("CUDA: an illegal memory access\nand more")

    monkeypatch.setattr(backends.cuda.CudaSession, "launch", fail)
    found = trial.first_difference(EmulatedBackend(), CPU)
    assert found is not None
    assert "(RuntimeError: CUDA: an illegal memory access)" in found


@pytest.mark.usefixtures("emulated")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert trial.first_difference(EmulatedBackend(), CPU) is None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", nobody)
    assert trial.cache_directory() is None
    assert trial.first_difference(EmulatedBackend(), CPU) is None


@pytest.mark.usefixtures("interpreted")
def test_triton() -> None:
    assert trial.launch_error(triton.TritonBackend(), CPU) is None
    assert trial.first_difference(triton.TritonBackend(), CPU) is None


@pytest.mark.usefixtures("emulated")
def test_nothing_of_the_users_changes() -> None:
    """And nothing of the user's gets in the way: generators, default dtype and device, inference mode."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert trial.Verdicts(lambda device: trial.first_difference(EmulatedBackend(), device))(CPU) is None
            assert torch.is_inference_mode_enabled()
            assert torch.empty(1).device.type == "meta"
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_not_while_a_graph_is_captured_or_something_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are taken on trust then, and asked about as soon as that can be."""
    asked: list[torch.device] = []
    device = torch.device("cuda", 0)

    def find(device: torch.device) -> str:
        asked.append(device)
        return "no"

    verdicts = trial.Verdicts(find)
    if not torch.cuda.is_available():
        assert verdicts(device) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verdicts(device) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        assert verdicts(device) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert verdicts(device) is None
    with torch._guards.tracing(torch._guards.TracingContext(None)):
        assert verdicts(device) is None
    assert asked == []
    assert verdicts(device) == "no"
    assert verdicts(device) == "no"
    assert asked == [device]


def test_no_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [torch.OutOfMemoryError("no memory"), "no"]

    def find(device: torch.device) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    verdicts = trial.Verdicts(find)
    assert [verdicts(CPU), verdicts(CPU), verdicts(CPU)] == [None, "no", "no"]


def test_threads_ask_once() -> None:
    asked: list[torch.device] = []
    begun = threading.Barrier(4)

    def find(device: torch.device) -> None:
        asked.append(device)
        time.sleep(0.1)  # in which the others ask

    verdicts = trial.Verdicts(find)

    def ask() -> None:
        begun.wait()
        verdicts(CPU)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [CPU]


def test_not_for_the_cpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(trial.Verdicts, "__call__", lambda self, device: pytest.fail("nothing is to be found out"))
    train(SGD(make_params([(3, 70)], torch.float32)), 1)
    if triton.is_interpreting() and triton.missing() is None:
        assert backends.BACKENDS["triton"].refusal(torch.zeros(1)) is None
    assert not cache.exists()


def test_a_device_that_differs_is_left_to_the_next_backend(monkeypatch: pytest.MonkeyPatch, emulated: None) -> None:
    """With a warning that says how to report it; the name of the backend is an error that says the same."""

    class OnCpu(Broken):
        def unusable(self, device: torch.device) -> str | None:
            return self._verdicts(device)

        def _unfit(self, device: torch.device) -> str | None:
            return trial.first_difference(self, device)

        def refusal(self, param: torch.Tensor) -> str | None:
            reason = self.unusable(param.device)
            if reason is not None:
                trial.warn_unused(self.name, str(param.device), reason)
            return reason

    trial.warn_unused.cache_clear()
    monkeypatch.setitem(backends.BACKENDS, "cuda", OnCpu())
    monkeypatch.setattr(type(backends.BACKENDS["cpu"]), "refusal", lambda self, param: "it is left out")
    monkeypatch.setattr(type(backends.BACKENDS["triton"]), "refusal", lambda self, param: "it is left out")
    with pytest.warns(
        UserWarning, match="parameters on cpu are not stepped by the cuda kernels: a first step with .*report"
    ):
        optimizer = train(AdamW(make_params([(3, 70)], torch.float32)), 1)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 1
    optimizer.param_groups[0]["backend"] = "cuda"
    with pytest.raises(ValueError, match=r"cannot be stepped by backend='cuda' \(cuda: a first step with float32"):
        train(optimizer, 1)


def test_the_rule_that_is_tried_is_one_of_the_cores() -> None:
    group = trial._group()
    assert len(_core.rules()[group.rule]) == len(group.roundings) == 2
