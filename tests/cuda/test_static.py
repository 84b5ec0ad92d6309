"""What the compiled CUDA kernels are made of, told from their machine code: no device is needed.

The code is that of the installed module, compiled as everybody's is, so there is nothing to compile again.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import pytest
from machine_code import SOME, dump, installed, is_for, kernels_of, named

from fusedopt import _core

ARCHITECTURE = "sm_90"


def found(look: Any, *arguments: int) -> Any:
    """What a function of machine_code.py finds in the installed kernels."""
    if not is_for(installed(), ARCHITECTURE):
        pytest.skip(f"the kernels were not built for {ARCHITECTURE}")
    return look(installed(), ARCHITECTURE, *arguments)


some = pytest.mark.parametrize("every", [SOME, pytest.param(1, marks=pytest.mark.thorough)])


def steps(every: int) -> list[Any]:
    return [kernel for kernel in found(kernels_of, every) if kernel.rule]


def opcodes(kernel: Any) -> Counter[str]:
    return Counter(instruction.opcode for instruction in kernel.instructions)


def test_kernels_of_every_rule() -> None:
    rules, kernels = len(_core.rules()), found(named)
    general = Counter(kernel.rule for kernel in kernels if kernel.rule and kernel.formats is None)
    assert len(general) == rules
    assert set(general.values()) == {2}  # of whole tensors, and row by row
    usual = Counter(kernel.rule for kernel in kernels if kernel.formats is not None)
    assert set(usual) == set(general)
    assert min(usual.values()) >= 1
    assert usual["Adam<0,0>"] == usual["Lion"] == 8
    assert sum("prepare_kernel" in kernel.name for kernel in kernels) == rules


def test_registers_only() -> None:
    """Arrays of a lane are registers: none is indexed by what the compiler does not know, none is spilled."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump(installed(), "--dump-resource-usage")
    )
    kernels = found(named)
    assert len(usage) >= len(kernels)
    assert [name for name, _, stack, local in usage if (stack, local) != ("0", "0")] == []
    # Three blocks of 128 threads on a multiprocessor, which has 64 Ki registers; of usual formats, five.
    most = {kernel.name: 168 if kernel.formats is None else 96 for kernel in kernels}
    assert [(name, registers) for name, registers, *_ in usage if int(registers) > most.get(name, 168)] == []


@some
def test_kernels_access_memory_by_16_bytes(every: int) -> None:
    """As many vectors stored as there are buffers: float32 takes two, 16 bits one; the compiler merges none away."""
    fewest = min(len(held) for held in _core.rules().values())
    for kernel in steps(every):
        codes = opcodes(kernel)
        loads = sum(count for code, count in codes.items() if re.fullmatch(r"LDG\.E\.128(\.\w+)*", code))
        stores = sum(count for code, count in codes.items() if re.fullmatch(r"STG\.E\.128(\.\w+)*", code))
        formats = kernel.formats
        if formats is None:
            assert loads >= 3 * (2 + fewest), (kernel.name, loads)
            assert stores >= 3 * (1 + fewest), (kernel.name, stores)
        elif formats[0] == "float32" or formats[2] == "bfloat16":
            each = 2 if formats[0] == "float32" else 1
            assert loads >= each * (2 + fewest), (kernel.name, loads)
            assert stores >= each * (1 + fewest), (kernel.name, stores)
    (norm,) = [kernel for kernel in found(kernels_of, every) if "square_sum_kernel" in kernel.name]
    assert opcodes(norm)["LDG.E.128"] >= 8  # under way at once


@some
def test_step_kernels_neither_call_pow_nor_compute_in_double(every: int) -> None:
    """What needs double is derived once a tensor, by prepare_kernel."""
    for kernel in steps(every):
        assert not [code for code in opcodes(kernel) if re.match(r"D(ADD|MUL|FMA|SETP)\b", code)], kernel.name


def test_nothing_is_contracted() -> None:
    """Of PTX, which still says what the source did: divisions and roots become FFMAs later, products must not.

    --fmad=false shows in every operation's rounding mode: what has one is not fused by what comes after. The fused
    ones are CUDA's own powers, in double; sums of squares, whose products are exact; and in steps those that the source
    asks for, with estimates of roots and inverses, to round roots and quotients correctly (csrc/cuda/numbers.cuh).
    """
    operations = ("add", "sub", "mul", "div", "rcp", "sqrt")
    entries = re.split(r"\.entry\s+(\w+)", dump(installed(), "-ptx"))[1:]
    assert len(entries) == 2 * len(found(named))
    for name, text in zip(entries[::2], entries[1::2]):
        operators = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rcp|rsqrt)\.[a-z0-9.]*f(?:32|64)\b", text))
        allowed = {f"{operation}.rn.f{bits}" for operation in operations for bits in (32, 64)}
        if "prepare_kernel" in name:
            allowed |= {"fma.rn.f64", "rcp.approx.ftz.f64"}
        if "step_kernel" in name:
            allowed |= {"fma.rn.f32", "rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32"}
            allowed |= {"sqrt.approx.ftz.f32", "add.rm.f32"}  # codes are proposed and cut to integers (codes.cuh)
        if re.search(r"sum_kernel|slab_kernel|vector_kernel", name):
            allowed |= {"fma.rn.f64"}
        assert operators <= allowed, (name, operators - allowed)


def test_module_exports_what_python_calls_and_needs_no_cuda() -> None:
    """Of CUDA a machine needs the driver only, and that only once kernels are called."""
    if shutil.which("nm") is None or shutil.which("ldd") is None:
        pytest.skip("needs nm and ldd")
    command = ["nm", "-D", "--defined-only", str(installed())]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__cuda"]
    linked = subprocess.run(["ldd", str(installed())], check=True, capture_output=True, text=True).stdout
    assert "cuda" not in linked
    assert "torch" not in linked
    assert importlib.util.find_spec("fusedopt._cuda") is not None
