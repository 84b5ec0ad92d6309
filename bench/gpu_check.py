"""`make gpu-check`: builds for the GPU that is here, runs the tests that need one, and measures.

    python bench/gpu_check.py --out out/gpu

Offline, with the packages of the interpreter that runs it (torch, pytest, pybind11, setuptools) and with cmake, ninja
and nvcc on the PATH. The package goes to a folder of its own; the environment stays as it is. If a step fails, this is
reported, the others still run, and the exit status is not 0. Logs, test results and the benchmark's JSON are in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A command with a time limit, in seconds; all of them have to fit into ten minutes of a GPU's time.

    A step that is a `remedy_for` another one runs only if that one failed.
    """

    name: str
    command: Sequence[str]
    limit: float
    remedy_for: str = ""


@dataclass(frozen=True)
class Result:
    """How a step ended: its exit status, or a sentence."""

    name: str
    status: int | str
    seconds: float


def capability() -> str | None:
    """The capability of the first device, as in 90; None if there is no device."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


def steps(out: Path) -> list[Step]:
    """The steps, in their order."""
    python = sys.executable
    site = out / "site"
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    built = "import fusedopt._cuda; from fusedopt.backends.info import render; print(render())"
    tests = sorted(str(path) for path in (ROOT / "tests").rglob("test_gpu_*.py"))
    return [
        Step("build", [*pip, "--upgrade", "--target", str(site), str(ROOT)], 200),
        Step("build without pip", [python, str(Path(__file__).resolve()), "--build-into", str(site)], 200, "build"),
        Step("kernels", [python, "-c", built], 30),
        Step(
            "tests",
            [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}", *tests],
            250,
        ),
        Step("bench", [python, str(ROOT / "bench" / "gpu.py"), "--out", str(out)], 120),
    ]


def build_into(site: Path) -> None:
    """Builds the package by CMake alone, in case an old setuptools cannot read the metadata."""
    import pybind11

    build = site.parent / "build-without-pip"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_INSTALL_PREFIX={site}"]
    configure += [f"-DFUSEDOPT_CUDA_ARCHITECTURES={os.environ.get('FUSEDOPT_CUDA_ARCHITECTURES', '')}"]
    shutil.copytree(ROOT / "fusedopt", site / "fusedopt", dirs_exist_ok=True)
    for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
        subprocess.run(command, check=True)


def run(step: Step, out: Path, environment: dict[str, str]) -> Result:
    """Runs a step. Its output goes to a log and, if it fails, the end of that to the terminal."""
    log = out / f"{step.name}.log"
    print(f"{step.name} ...", flush=True)
    begun = time.monotonic()
    status: int | str
    try:
        with log.open("w") as file:
            done = subprocess.run(
                step.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=step.limit
            )
        status = done.returncode
    except subprocess.TimeoutExpired:
        status = f"cut off after {step.limit:g} s"
    except OSError as error:
        status = str(error)
    result = Result(step.name, status, round(time.monotonic() - begun, 1))
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    shown = lines[-3:] if step.name == "tests" and status == 0 else lines if step.name in ("kernels", "bench") else []
    print("\n".join(lines[-40:] if status != 0 else shown))
    said = "passed" if status == 0 else f"FAILED ({status}), see {log}"
    print(f"{step.name}: {said}, {result.seconds:g} s\n", flush=True)
    return result


def check(planned: Sequence[Step], out: Path, environment: dict[str, str]) -> int:
    """Runs all steps; 0 if all passed."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for step in planned:
        if step.remedy_for and all(result.status == 0 for result in results if result.name == step.remedy_for):
            continue
        results.append(run(step, out, environment))
        (out / "summary.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    failed = [result.name for result in results if result.status != 0]
    print(f"failed: {', '.join(failed)}" if failed else "all passed", f"({sum(r.seconds for r in results):.0f} s)")
    return 1 if failed else 0


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="bench/gpu_check.py", description="Builds, tests and measures on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for logs and results")
    parser.add_argument("--build-into", type=Path, help="only build the package, into this folder, without pip")
    arguments = parser.parse_args()
    if arguments.build_into is not None:
        build_into(arguments.build_into.resolve())
        return 0
    out = arguments.out.resolve()
    found = capability()
    if found is None:
        print("torch finds no CUDA device here: nothing was built, tested or measured", file=sys.stderr)
        return 2
    environment = {
        **os.environ,
        "PYTHONPATH": str(out / "site"),
        "PYTHONSAFEPATH": "1",  # the sources, which have no compiled core, stay off the path
        "FUSEDOPT_CUDA_ARCHITECTURES": found,
        "FUSEDOPT_BUILD_DIR": str(out / "build"),
    }
    environment.pop("FUSEDOPT_GPU_DRY", None)
    return check(steps(out), out, environment)


if __name__ == "__main__":
    sys.exit(main())
