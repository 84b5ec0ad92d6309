"""What is stepped on a GPU, by which contenders, and the aims."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt import Adafactor, AdamW, Lion

from .workloads import WORKLOADS

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0  # above the norm of the gradients here: clipping does all of its work and changes nothing

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        name: In tables and JSON.
        build: Makes the optimizer; raises ImportError if its package is not there.
        gradient_reads: How often a step must read the gradients, twice if a norm comes first; None if not known.
        clips: Whether torch's clip_grad_norm_ comes before the step and is timed with it.
        fraction_aimed_at: Of the bandwidth of a copy.
        speed_up_aimed_at: Times the case's baseline.
    """

    name: str
    build: Callable[[list[Parameter]], Optimizer]
    gradient_reads: int | None = 1
    clips: bool = False
    fraction_aimed_at: float | None = None
    speed_up_aimed_at: float | None = None


@dataclass(frozen=True)
class Case:
    """A list of parameters and those who step it, the baseline first.

    Attributes:
        name: Short.
        title: What it is.
        shapes: Of the parameters.
        tiny: Of the parameters in a dry run.
        dtype: Of parameters and gradients.
        contenders: The first is what others are compared with.
        waits_for_host: Many steps are timed by the wall clock, because the host is what takes the time.
        counts_launches: Whether the kernels of a step are counted, too.
    """

    name: str
    title: str
    shapes: Shapes
    tiny: Shapes
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    waits_for_host: bool = False
    counts_launches: bool = False


def ours(**options: Any) -> Callable[[list[Parameter]], Optimizer]:
    return lambda params: AdamW(params, **HYPER, backend="cuda", **options)


def lion(params: list[Parameter]) -> Optimizer:
    return Lion(params, lr=HYPER["lr"], weight_decay=HYPER["weight_decay"], backend="cuda")


def adafactor(params: list[Parameter]) -> Optimizer:
    return Adafactor(params, backend="cuda")


def triton(optimizer: type[Optimizer], **options: Any) -> Callable[[list[Parameter]], Optimizer]:
    def build(params: list[Parameter]) -> Optimizer:
        if importlib.util.find_spec("triton") is None:
            raise ImportError("triton is not installed")
        return optimizer(params, backend="triton", **options)

    return build


def torch_fused(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, **HYPER, fused=True)


def transformers_adafactor(params: list[Parameter]) -> Optimizer:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed")
    from transformers.optimization import Adafactor as Theirs

    return Theirs(params)


_BILLION: Shapes = [(4096, 4096)] * 64
_TINY: Shapes = [(64, 128), (300,), (3, 70)]

CASES = (
    Case(
        "1B float32",
        "64 matrices of 4096 x 4096, float32",
        _BILLION,
        _TINY,
        torch.float32,
        (
            Contender("torch fused", torch_fused),
            Contender("fusedopt", ours(), fraction_aimed_at=0.9, speed_up_aimed_at=1.1),
            Contender("fusedopt Lion", lion, fraction_aimed_at=0.9),
        ),
    ),
    Case(
        "1B bfloat16",
        "64 matrices of 4096 x 4096, bfloat16",
        _BILLION,
        _TINY,
        torch.bfloat16,
        (
            Contender("torch fused, bf16 state", torch_fused),
            Contender("fusedopt, 8-bit state", ours(state_dtype="8bit"), fraction_aimed_at=0.65),
            Contender("fusedopt, bf16 state, nearest", ours(state_dtype="bfloat16", state_rounding="nearest")),
            Contender("fusedopt, 8-bit, split24", ours(state_dtype="8bit", master_weights="split24")),
        ),
    ),
    Case(
        "1B float32, clipped",
        "64 matrices of 4096 x 4096, float32, gradients clipped to a norm",
        _BILLION,
        _TINY,
        torch.float32,
        (
            Contender("torch clip + fused", torch_fused, gradient_reads=2, clips=True),
            Contender(
                "fusedopt, max_grad_norm", ours(max_grad_norm=MAX_GRAD_NORM), gradient_reads=2, speed_up_aimed_at=1.3
            ),
        ),
    ),
    Case(
        "W2",
        "GPT-2 small, 148 tensors, float32",
        WORKLOADS["W2"].shapes(),
        _TINY,
        torch.float32,
        (
            Contender("torch fused", torch_fused),
            Contender("fusedopt", ours()),
            Contender("fusedopt, 8-bit state", ours(state_dtype="8bit")),
            Contender("fusedopt Lion", lion),
        ),
        counts_launches=True,
    ),
    Case(
        "W3",
        "2,000 small tensors, float32, bound by the host",
        WORKLOADS["W3"].shapes(),
        [(n + 1,) for n in range(30)],
        torch.float32,
        (
            Contender("torch fused", torch_fused),
            Contender("fusedopt", ours(), speed_up_aimed_at=3.0),
            Contender("torch clip + fused", torch_fused, gradient_reads=2, clips=True),
            Contender("fusedopt, max_grad_norm", ours(max_grad_norm=MAX_GRAD_NORM), gradient_reads=2),
        ),
        waits_for_host=True,
        counts_launches=True,
    ),
    Case(
        "Adafactor",
        "GPT-2 small, 148 tensors, float32, Adafactor with its defaults",
        WORKLOADS["W2"].shapes(),
        _TINY,
        torch.float32,
        (
            Contender("transformers Adafactor", transformers_adafactor, gradient_reads=None),
            Contender("fusedopt Adafactor", adafactor, gradient_reads=None, speed_up_aimed_at=10.0),
            Contender("torch fused AdamW", torch_fused),
        ),
    ),
    Case(
        "Triton",
        "64 matrices of 4096 x 4096, float32, compiled kernels and Triton's",
        _BILLION,
        _TINY,
        torch.float32,
        (
            Contender("fusedopt", ours()),
            Contender("fusedopt, Triton", triton(AdamW, **HYPER), speed_up_aimed_at=0.85),
        ),
        counts_launches=True,
    ),
    Case(
        "Triton Adafactor",
        "64 matrices of 4096 x 4096, float32, Adafactor by compiled kernels and Triton's",
        _BILLION,
        _TINY,
        torch.float32,
        (
            Contender("fusedopt Adafactor", adafactor, gradient_reads=None),
            Contender("fusedopt Adafactor, Triton", triton(Adafactor), gradient_reads=None, speed_up_aimed_at=0.85),
        ),
        counts_launches=True,
    ),
)
