"""What triton/test_compile.py runs without the interpreter: python triton_compiled.py "TASK TARGET ..." ...

Prints a line of JSON for each task.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from unittest import mock

import torch
from cases import CASES, make_params, set_grads
from fusedopt.triton_kernels import ahead, launch, prepare, reduce, step, sums, updates

from fusedopt import Adafactor
from fusedopt.backends import triton as backend
from fusedopt.engine.norms import NormsRecord

FACTORED = ["adafactor_momentum_matrix", "adafactor_momentum_vector"]
FORMATS = ["float32/float32", "bfloat16/8bit/split24"]  # of both kinds; what lies between is made of the same
KERNELS = [
    kernel
    for module in (step, prepare, reduce, sums, updates)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
]


def compile_all(target: str, first: str, every: str) -> dict[str, list[str]]:
    """Every rule's kernels, or some, from one on: label to what was made of it."""
    with ahead.on(ahead.parse_target(target)):
        jobs = list(enumerate(ahead.jobs(None, FORMATS)))[int(first) :: int(every)]
        return {f"{i} {job.label}": sorted(job.compile().asm) for i, job in jobs}


def norms(target: str) -> dict[str, list[str]]:
    """What AdamW's step launches that takes norms, and no other step: label to what was made of it."""
    with ahead.on(ahead.parse_target(target)):
        without = ahead.jobs(["adamw"], ["bfloat16/bfloat16"])
        jobs = [job for job in ahead.jobs(["adamw"], ["bfloat16/bfloat16"], norms=True) if job not in without]
        return {job.label: sorted(job.compile().asm) for job in jobs}


def instructions(target: str) -> dict[str, dict[str, int]]:
    """How often each instruction of memory or of floating point occurs in PTX: of AdamW's step, all of Adafactor's.

    As far as training takes them, too, they are compiled once.
    """
    jobs = []
    for formats in ("float32/float32", "bfloat16/bfloat16", "bfloat16/8bit"):
        for word in ahead.words_of("adamw", formats):
            constants = launch.Launch("adamw", word, 0, 1, 1).step_constants()
            for block_sums in (None, torch.float32) if formats == "bfloat16/bfloat16" else (None,):
                arguments = (torch.int64, torch.int32, block_sums, 2)
                label = f"{formats} {word:#x}{' norms' if block_sums else ''}"
                jobs.append(ahead.Job(label, step.step_kernel, arguments, constants))
    jobs += ahead.jobs(FACTORED, ["bfloat16/8bit"])
    jobs += [job for job in ahead.jobs(["adafactor_matrix"], ["float32/float32"]) if "sum_kernel" in job.label]
    found: dict[str, dict[str, int]] = {}
    with ahead.on(ahead.parse_target(target)):
        for job in jobs:
            counts = found.setdefault(job.label, {})
            for name in re.findall(r"^\s*(?:@\S+\s+)?([a-z][a-z0-9_.]+)", job.compile().asm["ptx"], re.MULTILINE):
                if re.match(r"(ld|st)\.global|(fma|mad|div|sqrt|add|mul|rcp)\..*f(32|64)", name):
                    counts[name] = counts.get(name, 0) + 1
    return found


def scaled_roots(target: str) -> dict[str, list[int]]:
    """In the intermediate code of AdamW's step: square roots, and products with 2^96 (as a float32, or a double)."""
    found = {}
    with ahead.on(ahead.parse_target(target)):
        for job in ahead.jobs(["adamw"], FORMATS[1:]):
            code = job.compile().asm["llir"]
            roots = re.findall(r"call [^@]*@llvm\.(?:amdgcn\.)?(?:rsq|sqrt)\.(?:v\d+)?f32", code)
            found[job.label] = [len(roots), len(re.findall(r"f0x6F800000|0x45F0000000000000", code))]
    return found


def compiled_in_training(target: str) -> list[list[int]]:
    """How many kernels there are: compiled ahead, after the first of 100 steps of a schedule, and after the last.

    Launches end before the launch itself, and tensors are on the CPU; all before that is as on the device.
    """

    def without_launching(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)

    with (
        mock.patch.object(type(step.step_kernel), "__getitem__", without_launching),
        mock.patch.object(backend, "is_interpreting", return_value=True),
        mock.patch.object(NormsRecord, "end"),  # what has not been launched has summed nothing
        ahead.on(ahead.parse_target(target)),
    ):
        return [
            _compiled_by(CASES[0].ours, ["adamw"], {}, takes_norms=True),
            _compiled_by(
                Adafactor,
                FACTORED,
                {"beta1": 0.9, "lr": 1e-2, "relative_step": False},
            ),
        ]


def _compiled_by(kind: Any, rules: list[str], kwargs: dict[str, Any], *, takes_norms: bool = False) -> list[int]:
    counts = []

    def count() -> None:
        counts.append(sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values()))

    for job in ahead.jobs(rules, ["bfloat16/8bit"], norms=takes_norms):
        job.compile()
    count()
    params = make_params([(64, 100), (70, 64), (33,), (5000,)], torch.bfloat16)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = kind(groups, **kwargs, backend="triton", state_dtype="8bit", max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100)
    for i in range(100):
        # Sums of chunks in pairs are as many as gradients have elements: parameters come and go.
        set_grads(params, i)
        params[i % 4].grad = None
        optimizer.record_norms(takes_norms and i % 10 == 0)
        optimizer.step()
        schedule.step()
        if i == 0:
            count()
    count()
    return counts


if __name__ == "__main__":
    tasks: Any = {
        "all": compile_all,
        "norms": norms,
        "instructions": instructions,
        "scaled_roots": scaled_roots,
        "training": compiled_in_training,
    }
    for argument in sys.argv[1:]:
        task, *rest = argument.split()
        print(json.dumps(tasks[task](*rest)))
