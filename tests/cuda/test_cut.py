"""`make gpu-check` loses nothing: when it is cut, when a stage hangs or fails, when a contender or a test does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import ROOT, lines_of, parsed, stages_of

# A stage that finds numbers; it notes each one elsewhere as soon as the results have taken it.
COUNTS = """
import sys, time
from bench.gpu_record import Results
results = Results.of_environment()
with open("told", "a", buffering=1) as told:
    for number in range(int(sys.argv[1])):
        results.add("number", number=number, text="x" * (number % 300))
        told.write(f"{number}\\n")
        time.sleep(0.001)
"""
CHECK = """
import sys
from pathlib import Path
sys.path.append({root!r})
from bench.gpu_check import Check, stop_in_order
from bench.gpu_stages import Stage
out, work = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
work.mkdir()
check = Check(out, work)
check.results.add("run", dry=True, seconds=60, device={{"name": "Card 1"}}, versions={{}})
stop_in_order()
planned = [Stage(f"count-{{i}}", 20, ["-c", {counts!r}, count]) for i, count in enumerate(("100", "10000"))]
sys.exit(check.run_all(planned))
"""


def assert_begun_is_ended(found: list[dict[str, Any]]) -> None:
    assert [line["of"] for line in found if line["kind"] == "begin"] == list(stages_of(found))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_found_before_a_cut_is_kept(tmp_path: Path, seed: int, how: str) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    program = CHECK.format(root=str(ROOT), counts=COUNTS)
    command = [sys.executable, "-c", program, str(out), str(work)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    until = time.monotonic() + 20
    while not (work / "told").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 0.8))
    running.send_signal(signal.Signals[how])
    status = running.wait(timeout=60)

    time.sleep(0.1)
    told = (work / "told").read_text().split()
    data = (out / "results.jsonl").read_bytes()
    time.sleep(0.1)
    assert (work / "told").read_text().split() == told  # the stage has ended with the check
    numbers = [line["number"] for line in parsed(data) if line["kind"] == "number"]
    assert numbers[: len(told)] == [int(number) for number in told]
    assert len(numbers) <= len(told) + 1  # one may have been taken, but not noted any more
    if how == "SIGTERM":
        assert status == 1
        assert parsed(data)[-1]["stopped"] == "SIGTERM"
        assert_begun_is_ended(parsed(data))
        *before, last = stages_of(parsed(data)).items()
        assert {outcome for _, outcome in before} <= {"passed"}
        # Between the stages nothing runs that could be cut off.
        assert last[1] == "cut off" or (last == ("count-0", "passed") and len(told) == 100)
        assert "This run was ended by SIGTERM." in (out / "summary.txt").read_text()
    else:
        assert status == -signal.SIGKILL
        command = [sys.executable, "bench/gpu_check.py", "--summary", "--out", str(out)]
        render = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert "This run has not ended, or was killed." in render.stdout
        assert "began" in render.stdout


@pytest.mark.parametrize("moment", ["begin", "stage", "summary", "process"])
def test_a_signal_at_any_moment_leaves_an_outcome(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also while a line is being written, between two stages, and while a process is started."""
    gpu_check, stage = bench("gpu_check"), bench("gpu_stages").Stage
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    check = gpu_check.Check(tmp_path / "out", tmp_path / "work")
    started = []

    def signalled(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "process":
                started.append(function(*args, **kwargs))
            if name == moment or (args and args[0] == moment):
                os.kill(os.getpid(), signal.SIGTERM)
            return started[-1] if name == "process" else function(*args, **kwargs)

        return call

    monkeypatch.setattr(check.results, "add", signalled("results", check.results.add))
    monkeypatch.setattr(check, "_summarize", signalled("summary", check._summarize))
    monkeypatch.setattr(gpu_check.subprocess, "Popen", signalled("process", subprocess.Popen))
    handlers = {each: signal.getsignal(each) for each in gpu_check.ENDING}
    try:
        gpu_check.stop_in_order()
        assert check.run_all([stage(f"stage-{i}", 20, ["-c", "pass"]) for i in range(3)]) == 1
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    found = lines_of(check.results.path)
    assert found[-1]["stopped"] == "SIGTERM"
    assert_begun_is_ended(found)
    assert stages_of(found) == {"stage-0": "passed" if moment in ("stage", "summary") else "cut off"}
    assert all(process.returncode is not None for process in started)


def test_a_line_that_was_cut_spoils_no_other(bench, tmp_path: Path) -> None:
    gpu_record = bench("gpu_record")
    results = gpu_record.Results(tmp_path / "results.jsonl", "smoke")
    results.add("first", value=float("nan"))
    with results.path.open("ab") as file:
        file.write(b'{"kind": "sec')
    results.add("third", lines="\n".join(f"{'x' * 500} {i}" for i in range(100)))
    first, third = gpu_record.read(results.path)
    assert (first["kind"], first["stage"], first["value"]) == ("first", "smoke", "nan")
    assert len(third["lines"].splitlines()) == 60
    assert max(map(len, third["lines"].splitlines())) == 200


POLITE = """
import time
from bench.gpu_record import Results
try:
    time.sleep(60)
except KeyboardInterrupt:
    Results.of_environment().add("number", number=1)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: None)
while True:
    time.sleep(60)
"""


def test_stages_that_hang_fail_or_are_absent(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one leaves of its seconds goes to those that follow; one that hangs is interrupted, and killed at last."""
    gpu_check, stage = bench("gpu_check"), bench("gpu_stages").Stage
    planned = [
        stage("quick", 2, ["-c", ""]),
        stage("fails", 0.5, ["-c", "print('compiled'); raise SystemExit(3)"]),
        stage("needs", 0.5, ["-c", ""], site=tmp_path / "site"),
        stage("polite", 0.5, ["-c", POLITE]),
        stage("deaf", 0.4, ["-c", DEAF]),
        stage("missing", 1, ["-c", "print('no such tool'); raise SystemExit(77)"]),
        stage("known", 1, ["-c", ""], absent="nothing to run"),
        stage("last", 1, ["-c", "print('measured')"]),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    check = gpu_check.Check(tmp_path / "out", tmp_path / "work")
    begun = time.monotonic()
    assert check.run_all(planned, scale=1.0) == 1
    assert time.monotonic() - begun < sum(each.limit for each in planned)
    found = lines_of(check.results.path)
    assert stages_of(found) == {
        "quick": "passed",
        "fails": "failed",
        "needs": "absent",
        "polite": "cut off",
        "deaf": "cut off",
        "missing": "absent",
        "known": "absent",
        "last": "passed",
    }
    ended = {line["name"]: line for line in found if line["kind"] == "stage"}
    assert ended["fails"]["status"] == [3]
    assert "compiled" in ended["fails"]["lines"]
    assert ended["needs"]["reason"] == "there is no package in site: it was not built"
    assert ended["missing"]["reason"] == "no such tool"
    assert ended["known"]["reason"] == "nothing to run"
    assert [line["stage"] for line in found if line["kind"] == "number"] == ["polite"]
    may_take = {line["of"]: line["may_take"] for line in found if line["kind"] == "begin"}
    assert may_take["quick"] == pytest.approx(2, abs=0.1)
    assert may_take["fails"] > 1.0
    assert found[-1]["failed"] == ["fails", "polite", "deaf"]
    said = capsys.readouterr().out
    assert "fails: failed" in said
    assert "measured" in check.log.read_text()


TESTS = """
import time
import pytest

pytestmark = pytest.mark.gpu


def test_passes():
    pass


def test_skips():
    pytest.skip("needs 15 GB of free memory on the device, which has 3.2 GB")


def deeper(depth):
    if depth == 0:
        print("what was printed")
        raise ValueError("the reason")
    deeper(depth - 1)


def test_fails():
    deeper(100)


@pytest.mark.thorough
def test_comes_last():
    pass


def test_hangs():
    time.sleep(60)
"""


def run_tests(folder: Path, share: str) -> subprocess.Popen:
    (folder / "test_gpu_file.py").write_text(TESTS)
    (folder / "running").mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]),
        "FUSEDOPT_GPU_RESULTS": str(folder / "results.jsonl"),
        "FUSEDOPT_GPU_STAGE": "bits",
        "FUSEDOPT_GPU_SHARD": share,
        "FUSEDOPT_GPU_RUNNING": str(folder / "running"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "bench.gpu_tests", str(folder / "test_gpu_file.py")]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            # As gpu_check does: a shell has its background processes, such as these tests, ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def outcomes_in(folder: Path) -> dict[str, str]:
    return {line["test"].rpartition("::")[2]: line["outcome"] for line in lines_of(folder / "results.jsonl")}


def test_tests_leave_their_outcomes(tmp_path: Path) -> None:
    """Also of a file that is cut: which test it was, and where."""
    running = run_tests(tmp_path, "0/1")
    name, until = tmp_path / "running" / "bits-0", time.monotonic() + 30
    while not (name.exists() and "test_hangs" in name.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)  # from its name to its first line
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    assert outcomes_in(tmp_path) == {
        "test_passes": "passed",
        "test_skips": "skipped",
        "test_fails": "failed",
        "test_hangs": "cut off",
    }
    found = {line["test"].rpartition("::")[2]: line for line in lines_of(tmp_path / "results.jsonl")}
    assert "which has 3.2 GB" in found["test_skips"]["reason"]
    assert "ValueError: the reason" in found["test_fails"]["lines"]
    assert "what was printed" in found["test_fails"]["lines"]
    assert len(found["test_fails"]["lines"].splitlines()) <= 60
    assert "time.sleep(60)" in found["test_hangs"]["lines"]
    assert "test_gpu_file.py" in (tmp_path / "log").read_text().rpartition("most recent call first")[2]


def test_processes_share_tests(tmp_path: Path) -> None:
    """Of five, the third process has the third one; what is thorough comes last."""
    assert run_tests(tmp_path, "2/5").wait(timeout=60) == 1
    assert outcomes_in(tmp_path) == {"test_fails": "failed"}
    assert run_tests(tmp_path, "4/5").wait(timeout=60) == 0
    assert list(outcomes_in(tmp_path)) == ["test_fails", "test_comes_last"]
    assert run_tests(tmp_path, "7/8").wait(timeout=60) == 0  # others have them


class Descends(torch.optim.SGD):
    """Steps until it has had enough."""

    def __init__(self, params: list[torch.nn.Parameter], steps: int) -> None:
        super().__init__(params, lr=0.1)
        self.left = steps

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise MemoryError("out of memory, tried to have 1 GB")
        super().step(closure)


def test_a_contender_that_fails_is_a_result(bench, tmp_path: Path) -> None:
    gpu, cases = bench("gpu"), bench("gpu_cases")

    def missing(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise ImportError("triton is not installed")

    steps = {"steps": 100, "fails at once": 0, "fails later": 4}
    contenders = [cases.Contender(name, lambda params, n=n: Descends(params, n)) for name, n in steps.items()]
    contenders.append(cases.Contender("missing", missing))
    case = cases.Case("W9", "a case", [], [(3, 5), (7,)], torch.float32, tuple(contenders), gradients="bucket")
    results = bench("gpu_record").Results(tmp_path / "results.jsonl")
    measurement = gpu.Measurement(case, results)
    measurement.run(rounds=5, warmup=1)
    found = {line.get("step"): line for line in lines_of(results.path)}
    assert found["steps"]["rounds"] == 5
    assert found["steps"]["fraction_of_copy"] > 0
    for name in ("fails at once", "fails later"):
        assert found[name]["error"].endswith("MemoryError: out of memory, tried to have 1 GB")
    assert found["missing"]["unavailable"] == "triton is not installed"
    assert found[None]["finite"] is True
    assert measurement.failures == 2
    text = gpu.render(case, measurement.lines)
    assert "error: fails later: MemoryError: out of memory" in text


def test_rounds_before_an_interrupt_are_kept(bench, tmp_path: Path) -> None:
    gpu, cases = bench("gpu"), bench("gpu_cases")

    class Interrupted(Descends):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            if self.left == 0:
                raise KeyboardInterrupt
            super().step(closure)

    contender = cases.Contender("steps", lambda params: Interrupted(params, 4))
    case = cases.Case("W9", "a case", [], [(3, 5)], torch.float32, (contender,))
    results = bench("gpu_record").Results(tmp_path / "results.jsonl")
    with pytest.raises(KeyboardInterrupt):
        gpu.Measurement(case, results).run(rounds=50, warmup=0)
    line, whole = lines_of(results.path)
    assert line["rounds"] == 3
    assert whole["error"] == "cut off: KeyboardInterrupt"


def test_a_copy_moves_as_many_bytes(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copied.append(source.numel()))
    bench("gpu_timing").Copies(10_000).of(9_000)()
    assert len(copied) > 1
    assert 2 * sum(copied) == 9_000


def test_other_bits_are_found(bench) -> None:
    smoke = bench("gpu_smoke")
    ours = {"parameter 0": torch.ones(3, 4), "step": torch.tensor(2.0)}
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    assert smoke.compared(ours, theirs)["equal"]
    theirs["parameter 0"][1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    found = smoke.compared(ours, theirs)
    assert not found["equal"]
    assert found["first"] == "parameter 0: 1 of 12 elements"
    assert not smoke.compared(ours, {"parameter 0": ours["parameter 0"]})["equal"]
