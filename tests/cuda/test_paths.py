"""The way that warps take through the step kernels of the usual formats, told from their machine code.

Two rules stand for all: what loads, decodes, encodes and stores knows no rule. For an architecture that the installed
module is not built for, one file with these is compiled.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from machine_code import ROOT, USUAL, dump, installed, is_for, sass, usual_kernels_of

BF16 = "bfloat16"
# Parameter and gradient, master, states; how many accesses a lane makes to load a tile, and to store it.
ACCESSES = {
    "AdamW": {
        ("float32", "", "float32"): (8, 6),
        (BF16, "", "float32"): (8, 6),
        (BF16, "", BF16): (4, 3),
        (BF16, "split24", "float32"): (10, 8),
        (BF16, "split24", BF16): (5, 4),
        ("float32", "", "8bit"): (12, 10),  # the scales of two runs are four of them
        (BF16, "", "8bit"): (6, 5),
        (BF16, "split24", "8bit"): (7, 6),
    },
    "Lion": {
        ("float32", "", "float32"): (6, 4),
        (BF16, "", "float32"): (6, 4),
        (BF16, "", BF16): (3, 2),
        (BF16, "split24", "float32"): (8, 6),
        (BF16, "split24", BF16): (4, 3),
        ("float32", "", "8bit"): (8, 6),
        (BF16, "", "8bit"): (4, 3),
        (BF16, "split24", "8bit"): (5, 4),
    },
}
FOUND = [(rule, *formats) for rule, accesses in ACCESSES.items() for formats in accesses]


class Compiled:
    """The usual kernels for one architecture."""

    def __init__(self, architecture: str, path: Path) -> None:
        usual = usual_kernels_of(path, architecture)
        self.kernels = {(USUAL[kernel.rule], *kernel.formats): kernel for kernel in usual}
        self.registers = sass().registers(path, "-arch", architecture)


def compiled_for(architecture: str, folder: Path) -> Path:
    flags = ["-std=c++17", "--fmad=false", "--expt-relaxed-constexpr", f"-arch={architecture}"]
    source, path = Path(__file__).with_name("usual_kernels.cu"), folder / f"{architecture}.cubin"
    command = ["nvcc", *flags, "-I", str(ROOT / "csrc"), "-cubin", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module", params=[pytest.param("sm_80", marks=pytest.mark.thorough), "sm_90"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    is_installed = is_for(installed(), request.param)
    path = installed() if is_installed else compiled_for(request.param, tmp_path_factory.mktemp("usual"))
    return Compiled(request.param, path)


def test_usual_formats_have_kernels(compiled: Compiled) -> None:
    assert sorted(compiled.kernels) == sorted(FOUND)


def test_all_loads_of_a_tile_come_before_the_first_use(compiled: Compiled) -> None:
    for name, kernel in compiled.kernels.items():
        for stochastic in (False, True):
            path = kernel.tile(stochastic)
            rule, *formats = name
            found = sum(i.is_load for i in path), sum(i.is_store for i in path)
            expected = ACCESSES[rule][tuple(formats)]
            # Scales are stored by a few lanes, which a path of the compiler's may leave out.
            assert found[0] == expected[0], (name, found)
            assert found[1] <= expected[1], (name, found)
            waiting = sass().waits_between_loads(path)
            assert waiting == [], (name, waiting)
            assert not [i for i in path if i.opcode.startswith(("LDL", "STL"))], name  # spilled


def test_registers_leave_room_for_five_blocks(compiled: Compiled) -> None:
    """Enough for 30 KB under way on a multiprocessor, and for twice that in float32."""
    for name, kernel in compiled.kernels.items():
        registers = compiled.registers[kernel.name]
        assert registers <= 96, (name, registers)
        loaded = 32 * sum(i.access_bytes for i in kernel.tile() if i.is_load)
        under_way = sass().blocks_of(registers) * sass().WARPS * loaded
        assert under_way >= (60_000 if name[1] == name[3] == "float32" else 30_000), (name, under_way)


def test_instructions_for_each_element(compiled: Compiled) -> None:
    """3 % more than counted, of which sm_80 has a little more than sm_90."""
    most = {
        ("AdamW", "float32", "", "float32"): 48.1,
        ("AdamW", "float32", "", "8bit"): 114.7,
        ("AdamW", BF16, "", BF16): 66.9,
        ("AdamW", BF16, "", "8bit"): 109.6,
        ("AdamW", BF16, "split24", "8bit"): 117.7,
        ("Lion", BF16, "", "8bit"): 67.0,
    }
    for name, count in most.items():
        assert compiled.kernels[name].per_element(stochastic=True) <= count, name


# What the compiler makes of a root and of a quotient, where operands are in a middle range: numbers.cuh does the same.
SEQUENCES = {
    "MUFU.RSQ": ["FMUL", "FMUL", "FFMA", "FFMA"],
    "MUFU.RCP": ["FFMA", "FFMA", "FFMA", "FFMA", "FFMA"],
}


def test_roots_and_quotients_are_those_of_the_compiler(tmp_path: Path) -> None:
    """They round correctly with the errors that the hardware's estimates have, on which the compiler's code relies.

    If it did something else in a later version, there would be a reason.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "own.cu"
    source.write_text(
        "__global__ void own(float* x) { x[0] = __fsqrt_rn(x[0]); }"
        "__global__ void quotient(float* x) { x[0] = __fdiv_rn(x[0], x[1]); }"
    )
    for architecture in ("sm_80", "sm_90"):
        cubin = tmp_path / f"{architecture}.cubin"
        subprocess.run(["nvcc", f"-arch={architecture}", "-cubin", str(source), "-o", str(cubin)], check=True)
        found = {}
        for kernel in sass().parse(dump(cubin, "-sass")):
            names = [i.opcode for i in kernel.instructions]
            start = next(k for k, name in enumerate(names) if name in SEQUENCES)
            end = next(k for k, name in enumerate(names) if name.startswith("STG"))
            # The subroutine's part is between, behind a branch, and calls what comes after the end.
            found[names[start]] = [name.split(".")[0] for name in names[start:end] if name.startswith(("FMUL", "FFMA"))]
        assert found == SEQUENCES, architecture


def test_the_way_of_a_warp_is_followed() -> None:
    """By hand: a loop of two ways, one of them rare, and loads that wait and that do not."""
    control = {None: 7 << 46, 0: 0, 1: 1 << 46}

    def line(address: int, text: str, signals: int | None = None, waits: int = 0) -> str:
        upper = control[signals] | waits << 52
        return f"        /*{address:04x}*/   {text} ;   /* 0x{0:016x} */\n      /* 0x{upper:016x} */\n"

    def listing(wait: int) -> str:
        return "\tFunction : kernel\n" + "".join(
            [
                line(0x00, "S2R R0, SR_TID.X"),
                line(0x10, "LDG.E.128 R4, desc[UR4][R2.64]", signals=0),
                line(0x20, "@P0 BRA 0x50"),
                line(0x30, "PMTRIG 0x1"),
                line(0x40, "FADD R9, R9, R9"),
                line(0x50, "IADD3 R3, R2, 0x1, RZ", waits=wait),
                line(0x60, "LDG.E R8, desc[UR4][R2.64+0x10]", signals=1),
                line(0x70, "FADD R10, R7, R8", waits=3),
                line(0x80, "@!P1 BRA 0x10"),
                line(0x90, "EXIT"),
            ]
        )

    (kernel,) = sass().parse(listing(0))
    assert kernel.loop() == (0x10, 0x80)
    assert [i.address for i in kernel.tile()] == [0x10, 0x20, 0x50, 0x60, 0x70, 0x80]
    assert [i.address for i in kernel.prologue()] == [0x00, 0x10]
    assert kernel.instructions[1].written() == {4, 5, 6, 7}
    assert kernel.instructions[7].read() == {7, 8}
    assert sass().waits_between_loads(kernel.tile()) == []
    (kernel,) = sass().parse(listing(1))
    assert [i.address for i in sass().waits_between_loads(kernel.tile())] == [0x50]
