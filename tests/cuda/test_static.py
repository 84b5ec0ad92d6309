"""What the compiled CUDA kernels are made of, told from their machine code: no device is needed.

The code is that of the installed module, compiled as everybody's is, so there is nothing to compile again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import fusedopt
from fusedopt import _core

ARCHITECTURE = "sm_90"


@functools.cache
def tools() -> str:
    """A PATH with cuobjdump, and nvdisasm that it calls: the toolkit's, or those of their packages."""
    folders = os.environ.get("PATH", "")
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name):
            continue
        try:
            files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = [str(file.locate().parent) for file in files if file.name == name]
        if not found:
            pytest.skip(f"needs {name}: of the CUDA toolkit, or of the package nvidia-cuda-{name}")
        folders += os.pathsep + found[0]
    return folders


@functools.cache
def module() -> Path:
    """The installed kernels."""
    (folder,) = fusedopt.__path__
    found = list(Path(folder).glob("_cuda*.so"))
    if not found:
        pytest.skip("this build of fusedopt has no CUDA kernels; they are built where nvcc is")
    return found[0]


@functools.cache
def dump(*arguments: str) -> str:
    environment = {**os.environ, "PATH": tools()}
    command = ["cuobjdump", *arguments, str(module())]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@functools.cache
def listing() -> dict[str, list[str]]:
    """The instructions of every kernel by its mangled name."""
    architectures = dump("--list-elf")
    if f".{ARCHITECTURE}." not in architectures:
        pytest.skip(f"the kernels were not built for {ARCHITECTURE}")
    kernels: dict[str, list[str]] = {}
    for line in dump("-sass", "-arch", ARCHITECTURE).splitlines():
        if function := re.search(r"Function : (\S+)", line):
            instructions = kernels.setdefault(function[1], [])
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return kernels


def steps() -> dict[str, list[str]]:
    return {name: found for name, found in listing().items() if "step_kernel" in name}


def opcodes(instructions: list[str]) -> Counter[str]:
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0] for instruction in instructions)


def test_kernels_of_every_rule() -> None:
    rules = len(_core.rules())
    assert len(steps()) == 2 * rules  # dense, and with codes
    assert sum("prepare_kernel" in name for name in listing()) == rules


def test_registers_only() -> None:
    """Arrays of a lane are registers: none is indexed by what the compiler does not know, none is spilled."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("--dump-resource-usage"))
    assert len(usage) >= len(listing())
    assert [name for name, _, stack, local in usage if (stack, local) != ("0", "0")] == []
    # Four blocks of 128 threads on a multiprocessor, which has 64 Ki registers.
    assert [(name, registers) for name, registers, *_ in usage if int(registers) > 128] == []


def test_kernels_access_memory_by_16_bytes() -> None:
    """As many vectors stored as there are buffers: float32 takes two, 16 bits one; the compiler merges none away."""
    states = {name: len(held) for name, held in _core.rules().items()}
    fewest = min(states.values())
    for name, instructions in steps().items():
        found = opcodes(instructions)
        loads = sum(count for code, count in found.items() if re.fullmatch(r"LDG\.E\.128(\.\w+)*", code))
        stores = sum(count for code, count in found.items() if re.fullmatch(r"STG\.E\.128(\.\w+)*", code))
        assert loads >= 3 * (2 + fewest), (name, loads)
        assert stores >= 3 * (1 + fewest), (name, stores)


def test_step_kernels_neither_call_pow_nor_compute_in_double() -> None:
    """What needs double is derived once a tensor, by prepare_kernel."""
    for name, instructions in steps().items():
        assert not [code for code in opcodes(instructions) if re.match(r"D(ADD|MUL|FMA|SETP)\b", code)], name


def test_nothing_is_contracted() -> None:
    """Of PTX, which still says what the source did: divisions and roots become FFMAs later, products must not.

    --fmad=false shows in every operation's rounding mode: what has one is not fused by what comes after. The fused
    ones are CUDA's own powers, in double.
    """
    operations = ("add", "sub", "mul", "div", "rcp", "sqrt")
    kernels = re.split(r"\.entry\s+(\w+)", dump("-ptx"))[1:]
    assert len(kernels) == 2 * len(listing())
    for name, text in zip(kernels[::2], kernels[1::2]):
        found = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)\.[a-z0-9.]*f(?:32|64)\b", text))
        allowed = {f"{operation}.rn.f{bits}" for operation in operations for bits in (32, 64)}
        if "prepare_kernel" in name:
            allowed |= {"fma.rn.f64", "rcp.approx.ftz.f64"}
        assert found <= allowed, (name, found - allowed)


def test_module_exports_what_python_calls_and_needs_no_cuda() -> None:
    """Of CUDA a machine needs the driver only, and that only once kernels are called."""
    if shutil.which("nm") is None or shutil.which("ldd") is None:
        pytest.skip("needs nm and ldd")
    command = ["nm", "-D", "--defined-only", str(module())]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__cuda"]
    linked = subprocess.run(["ldd", str(module())], check=True, capture_output=True, text=True).stdout
    assert "cuda" not in linked
    assert "torch" not in linked
    assert importlib.util.find_spec("fusedopt._cuda") is not None
