"""Programs that are compiled with the headers for kernels on the CPU, or are not (tests/cuda_on_cpu)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_selftest import HERE, compile_for_cpu


def test_order_can_be_set_from_outside(tmp_path: Path) -> None:
    (tmp_path / "program.cpp").write_text("""#include <cuda_runtime.h>
        __global__ void kernel(unsigned* last) { *last = blockIdx.x; }
        int main() {
          unsigned last = 0;
          const cudaLaunchConfig_t config = {100, 1, 0, nullptr, nullptr, 0};
          cudaLaunchKernelEx(&config, kernel, &last);
          return static_cast<int>(last);
        }""")
    compiled = compile_for_cpu(["program.cpp", "-o", "program"], tmp_path)
    assert compiled.returncode == 0, compiled.stderr

    def last_block(**environment: str) -> int:
        return subprocess.run([tmp_path / "program"], env={**os.environ, **environment}).returncode

    assert last_block(CUDA_ON_CPU_ORDER="0") == 99
    assert len({last_block(CUDA_ON_CPU_ORDER=str(seed)) for seed in range(5)}) > 2


def _program(body: str) -> str:
    return f"#include <cuda_runtime.h>\n{body}\nint main() {{ return cudaLaunchKernelEx(&config, kernel, P{{}}); }}\n"


@pytest.mark.parametrize(("size", "is_accepted"), [(32764, True), (32768, False)])
def test_limit_of_parameters(tmp_path: Path, size: int, is_accepted: bool) -> None:
    text = _program(
        f"struct P {{ unsigned values[{size // 4}]; }};\n"
        "__global__ void kernel(__grid_constant__ const P) {}\n"
        "const cudaLaunchConfig_t config = {1, 32, 0, nullptr, nullptr, 0};"
    )
    (tmp_path / "program.cpp").write_text(text)
    compiled = compile_for_cpu(["program.cpp", "-o", "program"], tmp_path)
    assert (compiled.returncode == 0) == is_accepted
    if is_accepted:
        subprocess.run([tmp_path / "program"], check=True)
    else:
        assert "a kernel's parameters take 32,764 bytes at most" in compiled.stderr


def test_no_sanitizer_that_cannot_follow(tmp_path: Path) -> None:
    (tmp_path / "program.cpp").write_text("#include <cuda_runtime.h>\n")
    compiled = compile_for_cpu(["-fsanitize=address", "-c", "program.cpp"], tmp_path)
    assert compiled.returncode != 0
    assert "AddressSanitizer" in compiled.stderr


def test_same_source_compiles_as_cuda(tmp_path: Path) -> None:
    """What the emulation accepts and a device would not is of no use."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-x", "cu", "-c"]
    command += [str(HERE / "selftest.cpp"), "-o", "selftest.o"]
    compiled = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert compiled.returncode == 0, compiled.stderr
