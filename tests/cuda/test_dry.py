"""That what needs a GPU runs, as far as it does without one: `make gpu-check` from its first stage to its last."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from emulated import FOLDER
from on_gpu import ROOT, lines_of, parsed, stages_of

DOCS = ROOT / "docs"


# Each stage is a process that imports torch and more; what those left out do, other tests run.
SOME = ["build", "smoke", "bench", "steps", "triton", "ncu"]
ALL = ["build", "smoke", "check", "bench", "steps", "bits", "triton", "triton-cuda", "ncu", "sanitizer"]


@pytest.mark.long
@pytest.mark.parametrize("expected", [SOME, pytest.param(ALL, marks=pytest.mark.thorough)], ids=["some", "all"])
def test_the_whole_order(bench, expected: list[str], tmp_path: Path) -> None:
    """Tests, benchmark and all, on the CPU. At any time the file has what was found by then, in whole lines."""
    if not FOLDER:
        pytest.skip("FUSEDOPT_EMULATED does not say where the kernels for the CPU are; `make test` builds them")
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, "bench/gpu_check.py", "--dry", "--out", str(out), "--work", str(work)]
    if expected != ALL:
        command += ["--only", *expected]
    moments, cuts = random.Random(0), []
    with (tmp_path / "said").open("w+") as said:
        running = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=ROOT)
        while running.poll() is None:
            time.sleep(moments.uniform(0.05, 1.0))
            cuts.append((out / "results.jsonl").read_bytes() if (out / "results.jsonl").exists() else b"")
        said.seek(0)
        text = said.read()
    assert running.returncode == 0, text[-4000:]

    found = lines_of(out / "results.jsonl")
    whole = (out / "results.jsonl").read_bytes()
    assert len(set(cuts)) > 5
    for cut in cuts:
        assert whole.startswith(cut)
        assert len(parsed(cut)) >= cut.count(b"\n")
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.jsonl", "summary.txt"]
    assert (work / "site" / "fusedopt" / "triton_kernels" / "step.py").exists()
    outcomes = stages_of(found)
    assert list(outcomes) == expected
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} <= {"check", "ncu", "sanitizer"}

    smoke = [line for line in found if line["kind"] == "smoke"]
    assert all(line["equal"] for line in smoke)
    assert {line["backend"] for line in smoke} == {"cuda", "triton"}
    steps = [line for line in found if line["kind"] == "bench"]
    assert all("ms" in line or "unavailable" in line for line in steps)
    assert {"torch fused", "fusedopt", "fusedopt, Triton", "fusedopt Lion"} <= {
        line["step"] for line in steps if "ms" in line
    }
    assert {line["case"] for line in found if line["kind"] == "case" and line["finite"]} == {
        case.name for case in bench("gpu_cases").CASES
    }
    tests = [line for line in found if line["kind"] == "test"]
    names = [(line["stage"], line["test"]) for line in tests]
    assert {line["outcome"] for line in tests} == {"passed"}
    for stage in {"steps", "bits", "triton"} & set(expected):
        assert any(name.endswith("bucket]") for where, name in names if where == stage)
    summary = (out / "summary.txt").read_text()
    for part in ("A dry run", "predicted for an H100", "92 to 96 % of copy", "1.6 ms", "none: a dry run on the CPU"):
        assert part in summary
    assert "This run has not ended" not in summary


def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "bench/gpu_check.py", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {key: value for key, value in os.environ.items() if key != "FUSEDOPT_GPU_DRY"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2, done.stderr
    assert "no CUDA device here: nothing was built, tested or measured" in done.stderr
    assert not (tmp_path / "out").exists()


def test_stages_and_their_seconds_are_those_of_the_documents(bench, tmp_path: Path) -> None:
    gpu_stages = bench("gpu_stages")
    planned = [("facts", gpu_stages.FACTS_SECONDS)]
    planned += [(stage.name, stage.limit) for stage in gpu_stages.stages(tmp_path, "90")]
    assert sum(limit for _, limit in planned) <= gpu_stages.TOTAL_SECONDS == 480
    text = (DOCS / "cuda.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", text, re.MULTILINE) == [
        (name, str(int(limit))) for name, limit in planned
    ]


def test_predictions_are_those_of_the_documents(bench) -> None:
    gpu_summary, cases = bench("gpu_summary"), bench("gpu_cases").CASES
    steps = {(case.name, contender.name) for case in cases for contender in case.contenders}
    text = " ".join((DOCS / "performance.md").read_text().split())
    for each in gpu_summary.predictions():
        assert (each["case"], each["step"]) in steps
        shown = gpu_summary.shown(each["quantity"], each["low"], each["high"])
        assert f"| {each['what']} | {each['case']} | {shown} |" in text


def test_old_kernels_are_built_and_measured_beside_the_present_ones(bench, tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in bench("gpu_stages").stages(tmp_path, "90", old=tmp_path / "sources")}
    names = ["build", "smoke", "smoke-old", "check", "bench", "bench-old", "steps"]
    assert list(planned)[: len(names)] == names
    assert planned["bench-old"].site == tmp_path / "site-old"
    assert planned["bench"].site == planned["steps"].site == tmp_path / "site"
    assert sum(stage.limit for stage in planned.values()) <= 460
    assert planned["bench"].missing() == "there is no package in site: it was not built"
    (tmp_path / "site-old" / "fusedopt").mkdir(parents=True)
    (tmp_path / "site-old" / "fusedopt" / "_core.so").write_text("")
    assert planned["bench-old"].missing() == ""


def test_what_is_not_there_is_said(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_stages = bench("gpu_stages")
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    absent = {stage.name: stage.absent for stage in gpu_stages.stages(tmp_path, "90")}
    assert absent["build"] == "pybind11 is not installed"
    assert absent["smoke"] == absent["bench"] == ""  # which need torch alone
    assert absent["steps"] == absent["bits"] == "pytest is not installed"
    assert absent["triton"] == "triton is not installed"
    assert absent["ncu"] == "ncu is not on the PATH"
    assert absent["sanitizer"] == "compute-sanitizer is not on the PATH"


def test_the_package_is_put_together_as_setup_py_does(bench, tmp_path: Path) -> None:
    (tmp_path / "fusedopt").mkdir()
    (tmp_path / "fusedopt" / "gone.py").write_text("")
    bench("gpu_build").assemble(tmp_path, ROOT)
    found = {str(path.relative_to(tmp_path / "fusedopt")) for path in tmp_path.rglob("*.py*")}
    sources = {str(path.relative_to(ROOT / "fusedopt")) for path in (ROOT / "fusedopt").rglob("*.py*")}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "triton_kernels").rglob("*.py*")}
    assert found == {name for name in sources | kernels if "__pycache__" not in name}
    assert {"optimizers/adamw.py", "_core.pyi", "triton_kernels/adamw.py"} <= found


def test_nothing_is_looked_for_on_an_index(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    gpu_build, commands = bench("gpu_build"), []
    monkeypatch.setattr(gpu_build.subprocess, "run", lambda command, check: commands.append(command))
    gpu_build.compile_into(tmp_path / "site", tmp_path / "build", "90", ROOT)
    assert [command[:2] for command in commands] == [["cmake", "-S"], ["cmake", "--build"], ["cmake", "--install"]]
    expected = {"-DFUSEDOPT_CUDA_ARCHITECTURES=90", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'site'}"}
    assert expected <= set(commands[0])


def test_a_build_without_cuda_kernels_has_failed(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_build = bench("gpu_build")
    monkeypatch.setenv("FUSEDOPT_GPU_DRY", "0")
    monkeypatch.setenv("FUSEDOPT_GPU_RESULTS", str(tmp_path / "results.jsonl"))
    monkeypatch.setattr(sys, "argv", ["gpu_build", "--work", str(tmp_path)])
    module = "_core.so"
    monkeypatch.setattr(
        gpu_build, "compile_into", lambda site, *_: (site / "fusedopt" / module).write_text("not empty")
    )
    assert gpu_build.main() == 1
    module = "_cuda.so"
    assert gpu_build.main() == 0
    failed, passed = lines_of(tmp_path / "results.jsonl")
    assert "there are no CUDA kernels" in failed["error"]
    assert failed["modules"] == {"_core.so": 9}
    assert "error" not in passed


def test_what_ncu_says_is_understood(bench) -> None:
    output = (
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","other"\n'
        '"","","%",""\n'
        '"0","step_kernel<AdamW>(StepParams)","91.25","1"\n'
    )
    (found,) = bench("gpu_tools").metrics_of(output)
    assert found["function"] == "step_kernel<AdamW>(StepParams)"
    assert found["metrics"] == {"dram__throughput.avg.pct_of_peak_sustained_elapsed (%)": 91.25}
    assert bench("gpu_tools").metrics_of("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_what_fusedopt_check_says_is_kept(bench) -> None:
    parsed_output = bench("gpu_tools").parsed
    assert parsed_output(json.dumps({"passed": True})) == {"passed": True}
    assert parsed_output('a warning\n{"a": 1}\n{"b": 2}\n') == [{"a": 1}, {"b": 2}]
    assert parsed_output("nothing of the kind") == "nothing of the kind"
