"""Reads the machine code of the step kernels: what a warp executes for a tile, without a device.

    python bench/sass.py              # of the installed module
    python bench/sass.py FILE ...     # of cubins or modules

The way through a kernel is followed branch by branch, as a warp goes that has a whole, aligned tile of normal numbers:
it does nothing that the source marks by rarely() (csrc/cuda/lane_memory.cuh) and calls no subroutine, as the compiler
does for divisions and roots of numbers that are subnormal, zero or not finite. What is left to choose is the rounding.
Where it is stochastic, the longer way is taken; where it is to nearest, the shorter.

It needs cuobjdump and nvdisasm: of the CUDA toolkit, or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

LANE = 8  # elements of a lane
TILES_EACH = 4  # of a warp
WARPS = 4  # of a block
REGISTERS = 65536  # of a multiprocessor, of all architectures from sm_70 on
DTYPES = ("float32", "bfloat16", "float16", "8bit")
MASTERS = ("", "kahan", "split24", "split32", "float32")


@dataclass(frozen=True)
class Instruction:
    """One instruction, and what the hardware is told about those that take long.

    Attributes:
        address: In the kernel, in bytes.
        predicate: The condition under which it is executed, or "".
        opcode: With its modifiers.
        operands: As they are written.
        signals: The barrier on which others wait for its result, or None.
        waits: The barriers on which it waits itself.
    """

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    signals: int | None
    waits: frozenset[int]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        return int(self.operands[-1], 16) if self.opcode.startswith("BRA") else None

    @property
    def is_conditional(self) -> bool:
        return self.predicate != "" or (self.target is not None and len(self.operands) > 1)

    @property
    def is_rare(self) -> bool:
        """Whether the way that warps usually go does not lead here."""
        return self.opcode.startswith(("PMTRIG", "CALL")) and self.predicate == ""

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith("LDG")

    @property
    def is_store(self) -> bool:
        return self.opcode.startswith("STG")

    @property
    def access_bytes(self) -> int:
        """How many bytes a lane loads or stores."""
        bits = re.search(r"\.U?S?(8|16|64|128)\b", self.opcode)
        return int(bits[1]) // 8 if bits else 4

    def written(self) -> set[int]:
        """The registers that a load writes."""
        first = re.match(r"R(\d+)", self.operands[0])
        return {int(first[1]) + i for i in range(max(1, self.access_bytes // 4))} if first else set()

    def read(self) -> set[int]:
        """The registers that it reads, or might."""
        sources = self.operands if self.is_store or self.opcode.startswith(("BRA", "EXIT")) else self.operands[1:]
        found = re.findall(r"\bR(\d+)(\.64)?", " ".join(sources))
        return {int(number) + i for number, wide in found for i in range(2 if wide else 1)}


@dataclass
class Kernel:
    """A kernel's instructions, and of step kernels which one it is.

    Attributes:
        rule: The type of its rule, as in "Adam<0,0>"; "" if it is no step kernel.
        formats: Parameter and gradient, master, states; None if they are looked up at run time.
    """

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    rule: str = ""
    formats: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        if not (found := re.search(r"step_kernelINS_(\d+)", self.name)):
            return
        rest = self.name[found.end() + int(found[1]) :]  # behind the name of the anonymous namespace
        length = re.match(r"\d+", rest)
        if length is None:
            raise ValueError(f"the name {self.name!r} has no rule in it; has csrc/cuda/tile.cuh changed?")
        start = length.end()
        self.rule = rest[start : start + int(length[0])]
        if arguments := re.match(r"I((?:Lb\dE)+)E", rest[start + int(length[0]) :]):
            self.rule += f"<{','.join(re.findall(r'Lb(.)E', arguments[1]))}>"
        if usual := re.search(r"UsualFormatsILNS\w*?_5DTypeE(\d)ELNS\w*?_6MasterE(\d)ELS\w*?_(\d)EE", rest):
            self.formats = DTYPES[int(usual[1])], MASTERS[int(usual[2])], DTYPES[int(usual[3])]

    def loop(self) -> tuple[int, int]:
        """The first and the last address of the loop over tiles: of the branches back, the one that goes furthest."""
        back = [(i.target, i.address) for i in self.instructions if i.target is not None and i.target < i.address]
        if not back:
            raise ValueError(f"{self.name} has no loop; has the compiler unrolled it?")
        return max(back, key=lambda ends: ends[1] - ends[0])

    def prologue(self) -> list[Instruction]:
        """What is executed before the loop; what finds the tensor of a block is in it once."""
        return self._path(0, self.loop()[0], is_longest=False)

    def tile(self, stochastic: bool = False) -> list[Instruction]:
        """What is executed for one tile."""
        first, last = self.loop()
        return self._path(first, last, is_longest=stochastic)

    def per_element(self, stochastic: bool = False) -> float:
        """How many instructions are executed for each element."""
        return (len(self.tile(stochastic)) + len(self.prologue()) / TILES_EACH) / LANE

    def _path(self, first: int, last: int, is_longest: bool) -> list[Instruction]:
        """The shortest or longest way from one address to another that is not rare, both included."""
        by_address = {i.address: i for i in self.instructions}
        steps = dict(zip(by_address, list(by_address)[1:], strict=False))

        def ways_from(address: int) -> list[int]:
            instruction = by_address[address]
            if address == last or instruction.is_rare:
                return []
            ways = [] if instruction.target is None else [instruction.target]
            if instruction.is_conditional or not instruction.opcode.startswith(("BRA", "EXIT", "RET")):
                ways.append(steps[address])
            return ways

        # Depth first: what follows an instruction is done before it. A way back into what is not done closes a loop,
        # which is left after one time.
        lengths: dict[int, int] = {last: 1}
        following: dict[int, int] = {}
        opened: set[int] = set()
        stack = [first]
        while stack:
            address = stack[-1]
            if address not in opened:
                opened.add(address)
                stack += [way for way in ways_from(address) if way not in opened]
                continue
            stack.pop()
            ways = [way for way in ways_from(address) if way in lengths]
            if ways and address not in lengths:
                following[address] = (max if is_longest else min)(ways, key=lengths.__getitem__)
                lengths[address] = lengths[following[address]] + 1
        if first not in lengths:
            raise ValueError(f"{self.name}: there is no way from {first:#x} to {last:#x}")
        path = [first]
        while path[-1] != last:
            path.append(following[path[-1]])
        return [by_address[address] for address in path]


def waits_between_loads(path: list[Instruction]) -> list[Instruction]:
    """What comes before the last load of a path and uses what an earlier one loads, or waits for it."""
    loads = [place for place, instruction in enumerate(path) if instruction.is_load]
    registers: set[int] = set()
    barriers: set[int | None] = set()
    found = []
    for instruction in path[loads[0] : loads[-1] + 1]:
        if instruction.read() & registers or instruction.waits & barriers:
            found.append(instruction)
        if instruction.is_load:
            registers |= instruction.written()
            barriers.add(instruction.signals)
    return found


def environment() -> dict[str, str] | None:
    """With cuobjdump, and nvdisasm that it calls, on the PATH; None if they are nowhere."""
    folders = os.environ.get("PATH", "")
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name):
            continue
        try:
            files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = [str(Path(str(file.locate())).parent) for file in files if file.name == name]
        if not found:
            return None
        folders += os.pathsep + found[0]
    return {**os.environ, "PATH": folders}


def parse(listing: str) -> list[Kernel]:
    """The kernels in what `cuobjdump -sass` prints."""
    kernels: list[Kernel] = []
    line = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s*$")
    lines = listing.splitlines()
    for number, text in enumerate(lines):
        if function := re.search(r"Function : (\S+)", text):
            kernels.append(Kernel(function[1]))
        elif found := line.match(text):
            # Which barriers an instruction waits for or signals is in the upper half of its 128 bits.
            control = int(lines[number + 1].split("/* ")[1].split()[0], 16)
            signals = control >> 46 & 7
            instruction = Instruction(
                address=int(found[1], 16),
                predicate=found[2] or "",
                opcode=found[3],
                operands=tuple(part.strip() for part in found[4].split(",")) if found[4] else (),
                signals=None if signals == 7 else signals,
                waits=frozenset(barrier for barrier in range(6) if control >> 52 + barrier & 1),
            )
            kernels[-1].instructions.append(instruction)
    return kernels


def dump(path: Path, *arguments: str) -> str:
    """What cuobjdump prints.

    Raises:
        FileNotFoundError: If it is not installed.
    """
    found = environment()
    if found is None:
        raise FileNotFoundError(
            "cuobjdump or nvdisasm is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    command = ["cuobjdump", *arguments, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=found).stdout


def registers(path: Path, *arguments: str) -> dict[str, int]:
    """Of each kernel, how many a thread has."""
    usage = dump(path, "--dump-resource-usage", *arguments)
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}


def blocks_of(register_count: int) -> int:
    """How many blocks of a step kernel a multiprocessor has room for. Registers are handed out by eight."""
    return REGISTERS // (-(-register_count // 8) * 8 * 32 * WARPS)


def main(paths: list[Path]) -> None:
    """Prints a line for each step kernel of usual formats."""
    print(
        "rule                     formats                       registers  blocks  bytes in flight  nearest  stochastic"
    )
    for path in paths:
        held = registers(path)
        for kernel in parse(dump(path, "-sass")):
            if kernel.formats is None:
                continue
            tile = kernel.tile()
            blocks = blocks_of(held[kernel.name])
            loaded = 32 * sum(i.access_bytes for i in tile if i.is_load)
            formats = " ".join(part for part in kernel.formats if part)
            print(
                f"{kernel.rule:24} {formats:30} {held[kernel.name]:8} {blocks:7} {blocks * WARPS * loaded:16,}"
                f" {kernel.per_element():8.1f} {kernel.per_element(stochastic=True):11.1f}"
            )


if __name__ == "__main__":
    files = [Path(argument) for argument in sys.argv[1:]]
    if not files:
        spec = importlib.util.find_spec("fusedopt._cuda")
        if spec is None or spec.origin is None:
            sys.exit("no CUDA kernels are installed: name a file, or install where nvcc is found")
        files = [Path(spec.origin)]
    main(files)
