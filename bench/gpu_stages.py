"""The stages of `make gpu-check`, in their order: what is most wanted comes first. docs/cuda.md lists them, too."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_build import Kernels, versions

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 480
SHARES = 8
FACTS_SECONDS = 20  # versions and device, before anything else

# Of the tests, what a dry run takes: some of each kind.
DRY_TESTS = {
    "steps": "waits or mixed or bucket",
    "bits": "adamw and (late or (default and bf16-nearest) or zero)",
    "triton": "(adamw and default and bf16 and fp16-nearest) or (bucket and AdamW and fp32)",
    "triton-cuda": "lion and fp32",
}


@dataclass(frozen=True)
class Stage:
    """A command with a limit. What a stage leaves of its seconds goes to those that follow.

    Attributes:
        name: In results; of letters, digits and "-".
        limit: In seconds.
        command: What is run.
        processes: How many run at once, each with its share of the work.
        absent: Why it cannot run here; "" if it can.
        site: The folder of the package that it needs; None if it needs none.
    """

    name: str
    limit: float
    command: Sequence[str]
    processes: int = 1
    absent: str = ""
    site: Path | None = None

    def missing(self) -> str:
        """Why it cannot run, now that those before it have; "" if it can."""
        if self.absent or self.site is None or any(self.site.glob("fusedopt/_core*.so")):
            return self.absent
        return f"there is no package in {self.site.name}: it was not built"


def missing_module(*names: str) -> str:
    """A sentence about the first module that is not installed; "" if all are."""
    return next((f"{name} is not installed" for name in names if importlib.util.find_spec(name) is None), "")


def missing_program(name: str) -> str:
    """A sentence about a program that is not on the PATH; "" if it is."""
    return "" if shutil.which(name) is not None else f"{name} is not on the PATH"


def stages(work: Path, capability: str, dry: bool = False, old: Path | None = None) -> list[Stage]:
    """What runs after the facts.

    Args:
        work: Folder for what is built.
        capability: What to build for, as in 90.
        dry: Whether it runs on the CPU, with tiny tensors and some of the tests.
        old: Sources of a version that smoke and benchmark run with, too.
    """
    site = work / "site"
    build = ["-m", "bench.gpu_build", "--work", str(work), "--architectures", capability]
    build += ["--old", str(old)] if old is not None else []
    planned = [Stage("build", 90, build, absent=_cannot_build(dry))]
    both = versions(old)
    planned += [_of_kernels("smoke", 30 / len(both), kernels, work, dry) for kernels in both]
    planned.append(Stage("check", 40, ["-m", "bench.gpu_tools", "check"], site=site))
    planned += [_of_kernels("bench", 100 / len(both), kernels, work, dry) for kernels in both]
    without_gpu = "a dry run has no GPU" if dry else ""
    no_triton = missing_module("triton")
    planned += [
        _tests("steps", 40, "cuda/test_gpu_steps.py", site, dry, "-k", DRY_TESTS["steps"] if dry else "not sanitizer"),
        _tests("bits", 60, "cuda/test_gpu_bits.py", site, dry, processes=SHARES),
        _tests("triton", 30, "triton/test_gpu.py", site, dry, processes=SHARES, absent=no_triton),
        _tests("triton-cuda", 20, "triton/test_gpu_cuda.py", site, dry, processes=SHARES, absent=no_triton),
        Stage("ncu", 25, ["-m", "bench.gpu_tools", "ncu"], absent=without_gpu or missing_program("ncu"), site=site),
        _tests(
            "sanitizer",
            25,
            "cuda/test_gpu_steps.py",
            site,
            False,
            *("-k", "sanitizer"),
            absent=without_gpu or missing_program("compute-sanitizer"),
        ),
    ]
    return planned


def _cannot_build(dry: bool) -> str:
    return "" if dry else missing_module("pybind11") or missing_program("cmake")


def _of_kernels(name: str, limit: float, kernels: Kernels, work: Path, dry: bool) -> Stage:
    """Smoke or benchmark with one version."""
    is_first = kernels.sources == ROOT
    command = ["-m", f"bench.gpu_{name}", "--kernels", kernels.name] if name == "smoke" else ["-m", "bench.gpu"]
    processes = 1 if name == "bench" or dry else 4
    if name == "bench" and dry:
        command += ["--rounds", "1", "--warmup", "0"]
    if name == "bench" and not is_first:
        command += ["--cases", "1B float32", "1B bfloat16", "1B float32, clipped", "W2"]
    name = name if is_first else f"{name}-{kernels.name}"
    return Stage(name, limit, command, processes, site=kernels.site(work))


def _tests(
    name: str, limit: float, file: str, site: Path, dry: bool, *options: str, processes: int = 1, absent: str = ""
) -> Stage:
    chosen = options or (("-k", DRY_TESTS[name]) if dry else ())
    command = ["-m", "bench.gpu_tests", str(ROOT / "tests" / file), *chosen]
    return Stage(name, limit, command, 1 if dry else processes, absent or missing_module("pytest"), site)


def interpreted(stage: Stage) -> list[str]:
    """The command line of a stage."""
    return [sys.executable, *stage.command]
