"""That what needs a GPU runs, as far as it does without one: tests, benchmark and the check that runs both."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulated import FOLDER

ROOT = Path(__file__).resolve().parents[2]


def dry(*command: str) -> str:
    if not FOLDER:
        pytest.skip("FUSEDOPT_EMULATED does not say where the kernels for the CPU are; `make test` builds them")
    environment = {**os.environ, "FUSEDOPT_GPU_DRY": "1", "PYTHONSAFEPATH": "1"}
    command = (sys.executable, *command)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


OF_ADAMW = "adamw and (late or (default and bf16) or (masters and split24))"
CHOSEN = {
    "cuda": f"test_gpu_steps or ({OF_ADAMW}) or (factored and relative and bf16 and fp32)",
    "triton": "(adamw and default and bf16 and (fp16 or 8bit)) or (factored and compat and fp16 and fp32)"
    " or (masters and kahan and fp32) or (test_gpu_cuda and (lion or centered or momentum))",
}


@pytest.mark.long
@pytest.mark.parametrize("folder", CHOSEN)
def test_tests(folder: str) -> None:
    """All of steps, and of bits some of each kind; what needs CUDA itself is skipped."""
    tests = [str(path) for path in sorted((ROOT / "tests" / folder).glob("test_gpu*.py"))]
    assert len(tests) == 2
    command = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist")
    said = dry(*command, "-k", CHOSEN[folder], *tests)
    assert ("a dry run has no CUDA" in said) == (folder == "cuda")
    assert int(said.rpartition(" passed")[0].split()[-1]) > 10


@pytest.mark.long
def test_bench(tmp_path: Path) -> None:
    cases = ["1B float32", "1B bfloat16", "1B float32, clipped", "W2", "W3"]
    if (ROOT / "csrc" / "cuda" / "normalize.cu").exists():
        cases.append("Adafactor")
    if importlib.util.find_spec("triton") is not None:
        cases += ["Triton", "Triton Adafactor"]
    said = dry("bench/gpu.py", "--rounds", "2", "--warmup", "0", "--out", str(tmp_path), "--cases", *cases)
    assert said.startswith("A dry run")
    for part in (*(f"{case}: " for case in cases), "fusedopt Lion", "speed-up to torch fused"):
        assert part in said
    assert "no longer finite" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "bench/gpu_check.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no CUDA device here: nothing was built, tested or measured" in done.stderr
    assert not (tmp_path / "out").exists()


def test_check_goes_on_after_what_fails(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = sys.executable
    planned = [
        check.Step("build", [python, "-c", "print('compiled'); raise SystemExit(3)"], 30),
        check.Step("build without pip", [python, "-c", ""], 30, "build"),
        check.Step("kernels", [python, "-c", "import time; time.sleep(30)"], 0.2),
        check.Step("tests", [str(tmp_path / "missing")], 30),
        check.Step("bench", [python, "-c", "print('measured')"], 30),
    ]
    assert check.check(planned, tmp_path / "out", dict(os.environ)) == 1
    said = capsys.readouterr().out
    for part in (
        "build: FAILED (3), see ",
        "compiled",
        "cut off after 0.2 s",
        "No such file",
        "measured\nbench: passed",
    ):
        assert part in said
    assert "build without pip: passed" in said
    assert "failed: build, kernels, tests (" in said
    assert '"status": 3' in (tmp_path / "out" / "summary.json").read_text()
    remedy = check.Step("remedy", [python, "-c", "raise SystemExit(1)"], 30, "bench")
    assert check.check([planned[-1], remedy], tmp_path / "out", dict(os.environ)) == 0  # nothing failed


def test_steps_of_the_check(check: ModuleType, tmp_path: Path) -> None:
    planned = check.steps(tmp_path)
    assert [step.name for step in planned] == ["build", "build without pip", "kernels", "tests", "bench"]
    assert sum(step.limit for step in planned if not step.remedy_for) <= 600  # seconds of a GPU's time
    assert any(part.endswith("test_gpu_bits.py") for part in planned[3].command)
