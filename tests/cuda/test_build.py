"""Whether the CUDA kernels are built: if the toolkit works, for the architectures asked for; else a line says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = f"""
cmake_minimum_required(VERSION 3.18)
project(asked LANGUAGES CXX)
include({ROOT}/cmake/cuda.cmake)
message(STATUS "built: ${{FUSEDOPT_HAS_CUDA}} for ${{FUSEDOPT_CUDA_ARCHITECTURES}}")
"""


def configure(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """What CMake says of the kernels in one paragraph, and its exit status."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    (folder / "CMakeLists.txt").write_text(PROJECT)
    done = subprocess.run(
        ["cmake", "-S", str(folder), "-B", str(folder / "build"), "-G", "Ninja", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_nvcc(tmp_path: Path) -> None:
    status, said = configure(tmp_path, CUDACXX=str(tmp_path / "nvcc"))
    assert status == 0
    assert "fusedopt: building without CUDA kernels: nvcc not found; put nvcc 12 or later on the PATH" in said
    assert "built: OFF" in said


def test_broken_nvcc(tmp_path: Path) -> None:
    nvcc = executable(tmp_path / "nvcc", "echo 'nvcc: its licence ran out' >&2; exit 3")
    status, said = configure(tmp_path, CUDACXX=nvcc)
    assert status == 0
    assert f"without CUDA kernels: {nvcc} --version fails (3) nvcc: its licence ran out" in said
    assert "built: OFF" in said


def test_old_nvcc(tmp_path: Path) -> None:
    nvcc = executable(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    status, said = configure(tmp_path, CUDACXX=nvcc)
    assert status == 0
    assert "without CUDA kernels: nvcc 11.8 is too old, 12 is needed" in said


def test_nvcc_that_does_not_compile(tmp_path: Path) -> None:
    nvcc = executable(
        tmp_path / "nvcc",
        'case "$1" in --version) echo "release 12.4, V12.4.1";; *)\n'
        'echo "In file included from x.h:"; echo "x.h:1: error: #error -- unsupported GNU version!"; exit 1;; esac',
    )
    status, said = configure(tmp_path, CUDACXX=nvcc)
    assert status == 0
    assert "without CUDA kernels: nvcc 12.4 does not compile a program: x.h:1: error: #error -- unsupported GNU" in said
    assert "another host compiler may help, in CUDAHOSTCXX" in said
    assert "built: OFF" in said


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
def test_architectures(tmp_path: Path) -> None:
    """What was asked for and cannot be had is an error, as everywhere."""
    status, said = configure(tmp_path, "-DFUSEDOPT_CUDA_ARCHITECTURES=80, 90")
    assert status == 0, said
    assert "built: ON for 80;90 --" in said
    status, said = configure(tmp_path, "-DFUSEDOPT_CUDA_ARCHITECTURES=sm_90")
    assert status != 0
    assert "FUSEDOPT_CUDA_ARCHITECTURES: 'sm_90' is nothing that nvcc" in said
    assert "write compute capabilities as in 80,90 and choose from compute_" in said


NVCC = """case "$*" in
*--version*) echo "Cuda compilation tools, release 12.4, V12.4.1";;
*--list-gpu-arch*) for known in 52 70 75 80 86 89 90; do echo compute_$known; done;;
*trial.cu*) ;;  # a program that is not looked at
*) exec %s "$@";;
esac"""


SEVERAL = "75;80;90"
SAID_BY_NVIDIA_SMI = {
    "echo 8.6": "86",
    "echo 9.0; echo 8.0; echo 9.0": "80;90",  # the last one also gets PTX
    "echo 9.0; echo 12.0": SEVERAL,  # of which one is nothing that this nvcc knows: PTX of the last is for it
    "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2": SEVERAL,
    "echo 'driver 9.0 does not answer'; exit 9": SEVERAL,
    "echo 'No devices were found'": SEVERAL,
    "echo '[N/A]'": SEVERAL,
}


@needs_nvcc
def test_default_architectures_are_those_of_the_gpus_here(tmp_path: Path) -> None:
    """By an nvcc that knows 9.0 at most. In one folder, because CMake finds out once what that compiler can do."""
    nvcc = executable(tmp_path / "nvcc", NVCC % shutil.which("nvcc"))
    tools = tmp_path / "tools"
    tools.mkdir()
    asked = '[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] || exit 9'
    for script, expected in SAID_BY_NVIDIA_SMI.items():
        executable(tools / "nvidia-smi", f"{asked}\n{script}")
        status, said = configure(tmp_path, CUDACXX=nvcc, PATH=f"{tools}:{os.environ['PATH']}")
        assert status == 0, said
        assert f"built: ON for {expected} --" in said, script
    if shutil.which("nvidia-smi") is None:
        _, said = configure(tmp_path, CUDACXX=nvcc)
        assert f"built: ON for {SEVERAL} --" in said


def test_setup_passes_architectures_on(tmp_path: Path) -> None:
    """Quotes keep what has spaces together; an empty list replaces that of another build."""
    code = """
import runpy, subprocess, sys, types
import setuptools
setuptools.setup = lambda **given: given["cmdclass"]["build_ext"]
build = runpy.run_path("setup.py")["CMakeBuild"]
subprocess.run = lambda command, check: print([part for part in command if "CUDA" in part])
from setuptools.dist import Distribution
command = build(Distribution())
command.build_temp = sys.argv[1]
command.get_ext_fullpath = lambda name: sys.argv[1]
command.build_extension(types.SimpleNamespace(name="core"))
"""
    pytest.importorskip("pybind11")
    for environment, expected in (
        ({}, ["-DFUSEDOPT_CUDA_ARCHITECTURES="]),
        ({"FUSEDOPT_CUDA_ARCHITECTURES": "80,90"}, ["-DFUSEDOPT_CUDA_ARCHITECTURES=80,90"]),
        (
            {"FUSEDOPT_CMAKE_ARGS": "-DA=1 '-DCUDA_X=a b'"},
            ["-DFUSEDOPT_CUDA_ARCHITECTURES=", "-DCUDA_X=a b"],
        ),
    ):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FUSEDOPT_C")}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, **environment})
        assert done.stdout.splitlines()[0] == str(expected), done.stderr


def test_cpu_steps_import_no_cuda_kernels() -> None:
    code = """
import sys, torch, fusedopt
param = torch.nn.Parameter(torch.ones(8))
param.grad = torch.ones(8)
fusedopt.create_optimizer(fusedopt.optimizer_names()[0], [param]).step()
print("fusedopt._core" in sys.modules, "fusedopt._cuda" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    assert output.split() == ["True", "False"]
