"""Proofs that kernels step as the reference does, on the machine at hand, and how fast: what `fusedopt check` runs.

Every rule is stepped by a real optimizer on each device and backend, and by the reference in plain torch on the CPU.
After each step the bits of all parameters, states and norms are compared.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.trial import FIRST_CHECK, differing, said_by
from ..engine.optimizer import FusedOptimizer
from ..storage.state import EIGHT_BIT
from .subjects import Subject, Target, subjects

# Fewer elements than a block of 8-bit codes, a block, one more; whole tiles and not, rows that blocks do not divide,
# more than a chunk of a norm. The last is there once more, at an address that is not aligned.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (63,),
    (64,),
    (65,),
    (257,),
    (4, 64),
    (3, 5, 70),
    (1000, 70),
    (7, 257),
)
FORMATS = {
    "fp32": (torch.float32, "float32"),
    "fp32, 8-bit": (torch.float32, EIGHT_BIT),
    "bf16": (torch.bfloat16, "float32"),
    "bf16, 8-bit": (torch.bfloat16, EIGHT_BIT),
}
MEASURED = ("fp32", "bf16, 8-bit")
SECONDS = 2.0  # of stepping for the bandwidth, all rules together

# How large a tensor the bandwidth is of, by kind of device.
_MEASURED_NUMEL = {"cpu": 1 << 22}
_LARGE_NUMEL = 1 << 25  # elsewhere: several times what a device's cache holds


class Scene(NamedTuple):
    """How one step is taken."""

    name: str
    max_grad_norm: float | None = None
    grad_scale: float | None = None
    found_inf: float = 0.0
    takes_norms: bool = False  # of updates and weights
    is_captured: bool = False  # where graphs can be: captured once, for all that follow, and replayed


SCENES = (
    Scene("a first step"),
    Scene("a second step"),
    Scene("a clipped step", max_grad_norm=0.5),
    Scene("a step with a gradient scale, whose norms are taken", grad_scale=64.0, takes_norms=True),
    Scene("a step that found_inf forbids", grad_scale=64.0, found_inf=1.0),
    Scene("a captured step", max_grad_norm=0.5, grad_scale=64.0, is_captured=True),
    Scene("a captured step once more", max_grad_norm=0.5, grad_scale=64.0, is_captured=True),
)


@dataclass
class Row:
    """What was found of a rule: by format what differs, None if nothing does; and gigabytes per second."""

    rule: str
    differences: dict[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0
    bandwidth: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Report:
    """What was found of a target; `refusal` says why it steps nothing here, and then there are no rows."""

    target: Target
    device_name: str
    refusal: str | None = None
    rows: list[Row] = field(default_factory=list)

    def failures(self) -> list[tuple[str, str, str]]:
        """Rule, format, and what differs."""
        return [(row.rule, name, text) for row in self.rows for name, text in row.differences.items() if text]


@contextmanager
def _alone() -> Iterator[None]:
    """The kernels are used whatever the first check says of them, and nothing is printed on the way."""
    before = os.environ.get(FIRST_CHECK)
    os.environ[FIRST_CHECK] = "0"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[FIRST_CHECK]
        else:
            os.environ[FIRST_CHECK] = before


def _name_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "CPU"
    kind = torch.xpu if device.type == "xpu" else torch.cuda
    return str(kind.get_device_name(device))


def check(
    chosen: Sequence[Target],
    *,
    of: Sequence[Subject] | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """Steps everything everywhere and compares.

    Args:
        chosen: What is checked; see `targets`.
        of: What is stepped; everything unless given.
        formats: Of FORMATS, those that are stepped.
        shapes: Of the parameters.
        seconds: For how long steps of each target are measured; 0 does not measure.
        progress: Is told what comes next.

    Returns:
        A report of each target.
    """
    of = subjects() if of is None else of
    with _alone():
        reports = [_opened(target) for target in chosen]
        for subject in of if any(report.refusal is None for report in reports) else ():
            progress(subject.name)
            for report in reports:
                if report.refusal is None:
                    report.rows.append(Row(subject.name))
            for name in formats:
                # Once for all targets, and for one rule at a time: these are many tensors.
                expected = list(_run(subject, name, shapes, Target(torch.device("cpu"), "eager")))
                for report in reports:
                    if report.refusal is None:
                        _prove(report, subject, name, shapes, expected)
            for report in reports:
                if report.refusal is None and seconds > 0:
                    for name in MEASURED:
                        budget = seconds / len(of) / len(MEASURED)
                        report.rows[-1].bandwidth[name] = _measure(report, subject, name, budget)
    return reports


def _opened(target: Target) -> Report:
    try:
        probe = torch.zeros(1, dtype=torch.float32, device=target.device)
        refusal = BACKENDS[target.backend].refusal(probe)
    except (ImportError, RuntimeError) as error:
        refusal = said_by(error)
    return Report(target, _name_of(target.device), refusal)


# ---- bits ----------------------------------------------------------------------------------------------------


def _prove(
    report: Report, subject: Subject, name: str, shapes: Sequence[tuple[int, ...]], expected: list[dict[str, Tensor]]
) -> None:
    row, begin = report.rows[-1], time.perf_counter()
    row.differences[name] = None
    scene = SCENES[0]
    try:
        run = _run(subject, name, shapes, report.target)
        for scene, theirs in zip(SCENES, expected):
            difference = _difference(next(run), theirs)
            if difference is not None:
                row.differences[name] = f"{scene.name}: {difference}"
                break
    except Exception as error:  # whatever compilers and drivers may raise
        row.differences[name] = f"{scene.name}: {said_by(error)}"
    row.seconds += time.perf_counter() - begin


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    """The first tensor whose bits differ, and in how many elements."""
    for name, expected in theirs.items():
        if name not in ours:
            return f"there is no {name}"
        if (ours[name].shape, ours[name].dtype) != (expected.shape, expected.dtype):
            return f"{name} is {ours[name].dtype} of shape {tuple(ours[name].shape)}, not {expected.dtype}"
        places = differing(ours[name], expected).nonzero().flatten()
        if len(places) == 0:
            continue
        first = int(places[0])
        one, other = (tensor.reshape(-1)[first].item() for tensor in (ours[name], expected))
        return (
            f"{len(places):,} of {expected.numel():,} elements of {name} differ, the first of them element {first:,}: "
            f"{one!r} instead of {other!r}"
        )
    return None


def _run(subject: Subject, name: str, shapes: Sequence[tuple[int, ...]], target: Target) -> Iterator[dict[str, Tensor]]:
    """Everything that a step writes, on the CPU, after each of SCENES."""
    dtype, state_dtype = FORMATS[name]
    device, settings = target.device, subject.settings
    params = [torch.nn.Parameter(tensor.to(device, dtype)) for tensor in _numbers(shapes, seed=0)]
    memory = torch.empty(params[-1].numel() + 1, dtype=dtype, device=device)
    memory[1:] = params[-1].detach().flatten()
    params.append(torch.nn.Parameter(memory[1:].view(params[-1].shape)))
    optimizer = subject.optimizer(
        params, **settings, state_dtype=state_dtype, min_quantized_numel=1, backend=target.backend
    )
    graph = None
    for number, scene in enumerate(SCENES):
        grads = _numbers([tuple(param.shape) for param in params], seed=1 + number)
        for tensor in grads:
            tensor *= 1.0 if scene.grad_scale is None else scene.grad_scale
        if scene.found_inf:
            grads[-1][..., 0] = float("inf")
        for param, grad in zip(params, grads):
            if graph is None:
                param.grad = grad.to(device, dtype)
            else:
                assert param.grad is not None
                param.grad.copy_(grad)
        if graph is None:
            _set(optimizer, scene, device)
            if scene.is_captured and device.type == "cuda" and not optimizer.changes_groups:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
            else:
                optimizer.step()
        if graph is not None:
            graph.replay()
        yield _written(optimizer, params, scene)


def _set(optimizer: FusedOptimizer, scene: Scene, device: torch.device) -> None:
    for group in optimizer.param_groups:
        group["max_grad_norm"] = scene.max_grad_norm
    optimizer.record_norms(scene.takes_norms)
    scaling: dict[str, Tensor | None] = {"grad_scale": None, "found_inf": None}
    if scene.grad_scale is not None:
        scaling["grad_scale"] = torch.full((), scene.grad_scale, dtype=torch.float32, device=device)
        scaling["found_inf"] = torch.full((), scene.found_inf, dtype=torch.float32, device=device)
    vars(optimizer).update(scaling)  # as GradScaler does


def _written(optimizer: FusedOptimizer, params: Sequence[Tensor], scene: Scene) -> dict[str, Tensor]:
    found = {}
    for i, param in enumerate(params):
        of = f"parameter {i} of shape {tuple(param.shape)}"
        found[of] = param.detach().cpu().clone()
        for key, value in optimizer.state[param].items():
            found[f"{key} of {of}"] = value.detach().cpu().clone()
    if scene.max_grad_norm is not None and optimizer.last_grad_norm is not None:
        found["the gradient norm"] = optimizer.last_grad_norm.detach().cpu().clone()
    if scene.takes_norms:
        norms = [(each.update, each.weight) for each in optimizer.norms_report().parameters]
        found["the norms of updates and weights"] = torch.tensor(norms, dtype=torch.float64, device="cpu")
    return found


# Zeros of both signs, and numbers that are subnormal, or whose square is.
_EDGES = (0.0, -0.0, 1e-40, -1e-30, 1e-20)


def _numbers(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Numbers of several magnitudes: the same each time, and none of torch's own generator."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    found = []
    for shape in shapes:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        row = numbers.view(-1)
        row *= 0.5 ** (torch.arange(len(row), dtype=torch.float32, device="cpu") % 16)
        if len(row) > 2 * len(_EDGES):
            row[1 : 1 + len(_EDGES)] = torch.tensor(_EDGES, dtype=torch.float32, device="cpu")
        found.append(numbers)
    return found


# ---- bandwidth -----------------------------------------------------------------------------------------------


def _measure(report: Report, subject: Subject, name: str, seconds: float) -> float | None:
    """Gigabytes per second of what a step must move: it reads the gradient, and reads and writes everything else."""
    if report.rows[-1].differences.get(name, "") is not None:
        return None
    dtype, state_dtype = FORMATS[name]
    device = report.target.device
    numel = _MEASURED_NUMEL.get(device.type, _LARGE_NUMEL)
    try:
        param = torch.nn.Parameter(torch.full((numel // 1024, 1024), 0.5, dtype=dtype, device=device))
        param.grad = torch.full_like(param, 1e-3)
        optimizer = subject.optimizer(
            [param], **subject.settings, state_dtype=state_dtype, backend=report.target.backend
        )
        end = time.perf_counter() + seconds
        for _ in range(2):  # makes state, and compiles what has not been
            optimizer.step()
        _wait(device)
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() < end:
            optimizer.step()
            count += 1
            if count % 4 == 1:
                _wait(device)
        _wait(device)
        taken = time.perf_counter() - begin
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # of a step of this size
        report.rows[-1].differences[name] = f"a step of {numel:,} elements: {said_by(error)}"
        return None
    states = sum(value.nbytes for value in optimizer.state[param].values())
    return count * (2 * param.nbytes + param.grad.nbytes + 2 * states) / taken / 1e9


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        (torch.xpu if device.type == "xpu" else torch.cuda).synchronize(device)
