"""Compiles tests/cuda_on_cpu/selftest.cpp, launches its kernels, and knows what is said of those that diverge."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
# As strict as the core is compiled, and fortified, which must not forbid switching stacks.
FLAGS = [
    *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"),
    *("-D_FORTIFY_SOURCE=2", "-fvisibility=hidden", "-fsanitize=alignment", "-I", str(HERE)),
]
INVALID_CONFIGURATION = 9
THROWN = -1


def compile_for_cpu(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return subprocess.run(["g++", *FLAGS, *arguments], capture_output=True, text=True, cwd=folder)


class Device:
    """The kernels of selftest.cpp."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.selftest_message.restype = ctypes.c_char_p

    def __call__(self, kernel: str, grid: Any, threads: Any, given: Any, size: int) -> np.ndarray:
        """What the kernel writes; an exception, if it throws."""
        output = np.zeros(size, np.uint32)
        error = self.launch(kernel, grid, threads, given, output)
        if error == THROWN:
            raise RuntimeError(self.message())
        assert error == 0
        return output

    def launch(self, kernel: str, grid: Any, threads: Any, given: Any, output: np.ndarray) -> int:
        given = np.ascontiguousarray(given, dtype=np.uint32)
        arguments = (kernel.encode(), dim3(grid), dim3(threads), pointer(given), pointer(output))
        return self.library.selftest_launch(*arguments)

    def message(self) -> str:
        return self.library.selftest_message().decode()

    def set_order(self, seed: int) -> None:
        self.library.selftest_set_order(ctypes.c_ulonglong(seed))


def dim3(sizes: Any) -> Any:
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


THREAD = r"thread \(\d+,0,0\) \(warp \d, lane \d+\)"
# What is said of each kernel: one of several sentences, since it is the thread that comes last that is told of. <X>
# stands for any thread, <X 31> for the one with that index, <at> for a place in the source.
DIVERGENCES = {
    "barrier_in_branch": [
        "<X 31> finishes, but <X> waits in __syncthreads <at> for it",
        "<X> calls __syncthreads <at>, but <X 31> has finished",
    ],
    "barrier_after_return": [
        "<X> calls __syncthreads <at>, but <X 0> has finished",
        "<X 0> finishes, but <X> waits in __syncthreads <at> for it",
    ],
    "barriers_at_two_sites": ["<X> calls __syncthreads <at>, but <X> waits in __syncthreads <at>"],
    "barrier_against_ballot": [
        "<X 31> calls __syncthreads <at>, but <X> waits in __ballot_sync with mask 0xffffffff <at>",
        "<X> calls __ballot_sync with mask 0xffffffff <at>, which names lane 31, but <X 31> waits in __syncthreads"
        " <at>",
    ],
    "ballot_against_barrier": [
        "<X 31> calls __ballot_sync with mask 0xffffffff <at>, which names lane [0-9]+, but <X> waits in __syncthreads"
        " <at>",
        "<X> calls __syncthreads <at>, but <X 31> waits in __ballot_sync with mask 0xffffffff <at>",
    ],
    "shuffle_against_ballot": [
        "<X> calls __ballot_sync with mask 0xffffffff <at>, but <X> waits in __shfl_xor_sync with mask 0xffffffff <at>"
        " for it",
        "<X> calls __shfl_xor_sync with mask 0xffffffff <at>, but <X> waits in __ballot_sync with mask 0xffffffff <at>"
        " for it",
    ],
    "masks_differ": [
        "<X> calls __syncwarp with mask 0xffffffff <at>, but <X> waits in __syncwarp with mask 0x00ffffff <at> for it",
        "<X> calls __syncwarp with mask 0x00ffffff <at>, but <X> waits in __syncwarp with mask 0xffffffff <at> for it",
    ],
    "mask_without_caller": ["<X> calls __syncwarp with mask 0x0000fff0 <at>, which does not contain its own lane"],
    "mask_names_finished_lane": [
        "<X> calls __syncwarp with mask 0xffffffff <at>, which names lane 2, but <X 2> has finished",
        "<X 2> finishes, but <X> waits in __syncwarp with mask 0xffffffff <at> for it",
    ],
    "mask_names_absent_lane": [
        "<X> calls __syncwarp with mask 0xffffffff <at>, which names lane 20, but the block ends before it"
    ],
    "finishes_while_awaited": [
        "<X 31> finishes, but <X> waits in __syncwarp with mask 0xffffffff <at> for it",
        "<X> calls __syncwarp with mask 0xffffffff <at>, which names lane 31, but <X 31> has finished",
    ],
    "waits_in_a_circle": [
        "all threads wait for each other: <X 0> waits in __syncwarp with mask 0x00000003 <at>; <X 1> waits in"
        " __syncwarp with mask 0x00000006 <at>; <X 2> waits in __syncwarp with mask 0x00000005 <at>"
    ],
    "shuffle_from_outside": [
        "<X> calls __shfl_down_sync with mask 0x0000ffff <at> and reads lane 1[6-9], which the mask does not contain"
    ],
    "traps": ["<X 6> calls __trap"],
}


def pattern_of(kernel: str) -> str:
    block = "1" if kernel == "traps" else "[012]"
    text = rf"In block \({block},0,0\), ({'|'.join(DIVERGENCES[kernel])})\."
    text = re.sub(r"<X (\d+)>", r"thread \\(\1,0,0\\) \\(warp 0, lane \1\\)", text)
    return text.replace("<X>", THREAD).replace("<at>", r"at \S*selftest_kernels.cuh:\d+")
