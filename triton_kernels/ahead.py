"""Compiles kernels ahead of time, without a GPU, into Triton's cache, where a first step then finds what it needs.

Triton's key consists of the source of the kernel and of what it calls, what it is compiled for (constants, types and
alignment of arguments), the options, the target, and the versions of Triton and ptxas. Kernels are therefore "launched"
as a step launches them, with a driver whose device is the target and with arguments that have nothing but a dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedopt import checks
from fusedopt.backends.table import DTYPE_CODES, MASTER_CODES, ROUNDING_CODES
from fusedopt.engine.optimizer import CLASSES
from fusedopt.storage.masters import KEYS
from fusedopt.storage.masters import rounding_of as param_rounding_of
from fusedopt.storage.state import DTYPES, EIGHT_BIT, FORMATS, StateSpec, requested_format, rounding_of

from . import launch, passes, prepare, reduce, rules, step, updates

# What training usually has: parameters and gradients / states / what 16-bit parameters keep.
USUAL_FORMATS = (
    "float32/float32",
    "float32/8bit",
    "bfloat16/float32",
    "bfloat16/bfloat16",
    "bfloat16/8bit",
    "bfloat16/8bit/split24",
)
_MASTER_DTYPES = {"kahan": torch.bfloat16, "split24": torch.int8, "split32": torch.int16, "float32": torch.float32}


def parse_target(text: str) -> GPUTarget:
    """The device of a text such as cuda:90, of compute capability 9.0, or hip:gfx942."""
    kind, _, arch = text.partition(":")
    if kind == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if kind == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(
        f"target {text!r} is not known; write cuda:<compute capability without its point> or hip:<architecture>, "
        "for example cuda:90 or hip:gfx942"
    )


def _specs_of(name: str) -> list[StateSpec]:
    """The states of a rule."""
    owner = next(cls for cls in CLASSES.values() if name in cls.REFERENCES)
    specs = {spec.name: spec for spec in owner.STATES}
    return [specs[state] for state, _ in rules.RULES[name].states]


def words_of(name: str, text: str) -> list[int]:
    """The FORMATS (table.py) of a rule's kernels for one of the texts that USUAL_FORMATS has.

    There are two if states have 8 bits, because vectors keep float32.
    """
    parts = text.split("/")
    if len(parts) not in (2, 3):
        raise ValueError(f"formats {text!r} are not PARAMETERS/STATES or PARAMETERS/STATES/MASTERS; see --help")
    param = checks.one_of("the parameters' format", parts[0], DTYPES)
    states = checks.one_of("the states' format", parts[1], FORMATS)
    master = checks.one_of("master_weights", parts[2], KEYS) if len(parts) == 3 else None
    rounding = param_rounding_of({"rounding": None, "master_weights": master})
    dtype = DTYPE_CODES[DTYPES[param]]
    word = dtype | dtype << 3 | MASTER_CODES[master] << 9
    if master is not None:
        word |= DTYPE_CODES[_MASTER_DTYPES[master]] << 6
    if param != "float32":
        word |= ROUNDING_CODES[rounding] << 12
    words = set()
    for wanted in {states, "float32"} if states == EIGHT_BIT else {states}:
        whole = word
        for k, spec in enumerate(_specs_of(name)):
            stored = requested_format(spec, "float32" if wanted == EIGHT_BIT and spec.unquantized else wanted)
            if stored != "float32":
                code = DTYPE_CODES[torch.uint8 if stored == EIGHT_BIT else DTYPES[stored]]
                whole |= code << (13 + 3 * k) | ROUNDING_CODES[rounding_of(spec, None)] << (25 + k)
        words.add(whole)
    return sorted(words)


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    label: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)

    def compile(self) -> Any:
        """Compiles it, or finds it in the cache."""
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants, **launch.OPTIONS)


def jobs(names: Sequence[str] | None = None, formats: Sequence[str] | None = None, *, norms: bool = False) -> list[Job]:
    """Everything that a step of these rules (None: of all rules) in these formats launches.

    `norms` adds what a step launches that records norms.
    """
    chosen = [checks.one_of("rule", name, rules.RULES) for name in names] if names else list(rules.RULES)
    found = [
        Job("square sums", reduce.square_sum_kernel, (torch.int64, torch.float64, 2)),
        Job("pairwise sum", reduce.pairwise_kernel, (torch.float64, torch.float64, 2)),
    ]
    if norms:
        arguments = (torch.int64, torch.float32, torch.float64, 2, 2)
        found.append(Job("sums of updates", updates.update_sum_kernel, arguments))
    for name in chosen:
        for clips in (False, True):
            square_sum = torch.float64 if clips else torch.float32
            floats = (torch.float32, torch.float32, square_sum, torch.float32)
            arguments = (torch.int64, torch.int64, torch.int32, *floats, 2)
            label = f"{name}, preparation{', clipping' if clips else ''}"
            found.append(Job(label, prepare.prepare_kernel, arguments, launch.prepare_constants(name, clips=clips)))
        for word in sorted({word for text in formats or USUAL_FORMATS for word in words_of(name, text)}):
            label = f"{name}, formats {word:#x}"
            if rules.RULES[name].normalizing:
                found += _sums(label, rules.RULES[name], word)
            constants = launch.Launch(name, word, 0, 1, 1).step_constants()
            found.append(Job(label, step.step_kernel, (torch.int64, torch.int32, None, 2), constants))
            if norms:
                arguments = (torch.int64, torch.int32, torch.float32, 2)
                found.append(Job(f"{label}, norms", step.step_kernel, arguments, constants))
    once: dict[Any, Job] = {}
    for job in found:
        once.setdefault((job.kernel, job.arguments, tuple(job.constants.items())), job)
    return list(once.values())


def _sums(label: str, rule: rules.Rule, formats: int) -> list[Job]:
    """What comes before the step of a rule that normalizes."""
    arguments = (torch.int64, torch.int64, torch.int64, torch.int32, torch.float64, torch.float32, 2)
    kernels = [(each.kernel, each.constants) for each in passes.passes(rule, formats)]
    kernels.append((prepare.finish_kernel, passes.finish_constants(rule)))
    return [Job(f"{label}, {kernel.fn.__name__}", kernel, arguments, constants) for kernel, constants in kernels]


class _Pretended:
    """A driver whose device is a target. Triton remembers kernels by device, so each target has a device of its own."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def on(target: GPUTarget) -> Iterator[None]:
    """Makes Triton compile for a target; nothing can be launched meanwhile."""
    before = dict(vars(driver))  # its fields have other names in other versions
    driver.set_active(_Pretended(target))  # type: ignore[arg-type]
    try:
        yield
    finally:
        vars(driver).update(before)
