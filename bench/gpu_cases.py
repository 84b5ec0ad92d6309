"""What is stepped on a GPU, by which contenders, and the aims; predictions are in gpu_predictions.json."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
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
        parameter_reads: How often it must read the parameters, which it writes once.
        clips: Whether torch's clip_grad_norm_ comes before the step and is timed with it.
        fraction_aimed_at: Of the bandwidth of a copy.
        speed_up_aimed_at: Times the case's baseline.
    """

    name: str
    build: Callable[[list[Parameter]], Optimizer]
    gradient_reads: int | None = 1
    parameter_reads: int = 1
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
        gradients: "random", "zero", or "bucket": views of one tensor at odd offsets.
        waits_for_host: Many steps are timed by the wall clock, because the host is what takes the time.
        counts_launches: Whether the kernels of a step are counted, too.
    """

    name: str
    title: str
    shapes: Shapes
    tiny: Shapes
    dtype: torch.dtype
    contenders: tuple[Contender, ...]
    gradients: str = "random"
    waits_for_host: bool = False
    counts_launches: bool = False


def fused(optimizer: type[Optimizer], backend: str = "cuda", **options: Any) -> Callable[[list[Parameter]], Optimizer]:
    def build(params: list[Parameter]) -> Optimizer:
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            raise ImportError("triton is not installed")
        return optimizer(params, backend=backend, **options)

    return build


def adamw(backend: str = "cuda", **options: Any) -> Callable[[list[Parameter]], Optimizer]:
    return fused(AdamW, backend, **HYPER, **options)


def lion(backend: str = "cuda", **options: Any) -> Callable[[list[Parameter]], Optimizer]:
    return fused(Lion, backend, lr=HYPER["lr"], weight_decay=HYPER["weight_decay"], **options)


def torch_fused(params: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, **HYPER, fused=True)


def transformers_adafactor(params: list[Parameter]) -> Optimizer:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed")
    from transformers.optimization import Adafactor as Theirs

    return Theirs(params)


def adafactor_of(backend: str, aim: float | None = None) -> Contender:
    """With its defaults it reads gradients twice, and parameters, too, because it scales by them."""
    name = "fusedopt Adafactor" + (", Triton" if backend == "triton" else "")
    build = fused(Adafactor, backend)
    return Contender(name, build, gradient_reads=2, parameter_reads=2, speed_up_aimed_at=aim)


_BILLION: Shapes = [(4096, 4096)] * 64
_TINY: Shapes = [(64, 64), (30,), (3, 70)]  # interpreted, a tile of Triton's takes tens of milliseconds

_CLIP = Contender("torch clip + fused", torch_fused, gradient_reads=2, clips=True)
_CLIPPED = Contender("fusedopt, max_grad_norm", adamw(max_grad_norm=MAX_GRAD_NORM), gradient_reads=2)
_TORCH = Contender("torch fused", torch_fused)
_CUDA = Contender("fusedopt", adamw())
_TRITON = Contender("fusedopt, Triton", adamw("triton"))

# In this order: if time runs out, the last ones are missing.
CASES = (
    Case(
        "1B float32",
        "64 matrices of 4096 x 4096, float32",
        _BILLION,
        _TINY,
        torch.float32,
        (
            _TORCH,
            replace(_CUDA, fraction_aimed_at=0.9, speed_up_aimed_at=1.1),
            _TRITON,
            Contender("fusedopt Lion", lion(), fraction_aimed_at=0.9),
            Contender("fusedopt Lion, Triton", lion("triton")),
        ),
        counts_launches=True,
    ),
    Case(
        "1B bfloat16",
        "64 matrices of 4096 x 4096, bfloat16",
        _BILLION,
        _TINY,
        torch.bfloat16,
        (
            Contender("torch fused, bf16 state", torch_fused),
            Contender("fusedopt, 8-bit state", adamw(state_dtype="8bit"), fraction_aimed_at=0.65),
            Contender("fusedopt, 8-bit state, Triton", adamw("triton", state_dtype="8bit")),
            Contender("fusedopt, bf16 state, nearest", adamw(state_dtype="bfloat16", state_rounding="nearest")),
            Contender("fusedopt, 8-bit, split24", adamw(state_dtype="8bit", master_weights="split24")),
            Contender("fusedopt Lion, 8-bit state", lion(state_dtype="8bit")),
        ),
        counts_launches=True,
    ),
    Case(
        "1B float32, clipped",
        "64 matrices of 4096 x 4096, float32, gradients clipped to a norm",
        _BILLION,
        _TINY,
        torch.float32,
        (
            _CLIP,
            replace(_CLIPPED, speed_up_aimed_at=1.3),
            Contender(
                "fusedopt, max_grad_norm, Triton", adamw("triton", max_grad_norm=MAX_GRAD_NORM), gradient_reads=2
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
            _TORCH,
            _CUDA,
            _TRITON,
            Contender("fusedopt, 8-bit state", adamw(state_dtype="8bit")),
            Contender("fusedopt Lion", lion()),
        ),
        counts_launches=True,
    ),
    Case(
        "W3",
        "2,000 small tensors, float32, bound by the host",
        WORKLOADS["W3"].shapes(),
        [(n + 1,) for n in range(5)],
        torch.float32,
        (_TORCH, replace(_CUDA, speed_up_aimed_at=3.0), _TRITON, _CLIP, _CLIPPED),
        waits_for_host=True,
        counts_launches=True,
    ),
    Case(
        "1B Adafactor",
        "64 matrices of 4096 x 4096, float32, Adafactor with its defaults",
        _BILLION,
        _TINY,
        torch.float32,
        (Contender("torch fused AdamW", torch_fused), adafactor_of("cuda"), adafactor_of("triton")),
        counts_launches=True,
    ),
    Case(
        "W2 Adafactor",
        "GPT-2 small, 148 tensors, float32, Adafactor with its defaults",
        WORKLOADS["W2"].shapes(),
        _TINY,
        torch.float32,
        (
            Contender("transformers Adafactor", transformers_adafactor, gradient_reads=None),
            adafactor_of("cuda", aim=10.0),
            adafactor_of("triton"),
            Contender("torch fused AdamW", torch_fused),
        ),
        counts_launches=True,
    ),
    Case(
        "W2, gradients in a bucket",
        "GPT-2 small, 148 tensors, float32, gradients at odd offsets of one tensor",
        WORKLOADS["W2"].shapes(),
        _TINY,
        torch.float32,
        (_TORCH, _CUDA, _TRITON, Contender("fusedopt, 8-bit state", adamw(state_dtype="8bit"))),
        gradients="bucket",
    ),
    Case(
        "W2, gradients of zeros",
        "GPT-2 small, 148 tensors, float32, all gradients zero",
        WORKLOADS["W2"].shapes(),
        _TINY,
        torch.float32,
        (_TORCH, _CUDA, _TRITON, Contender("fusedopt, 8-bit state", adamw(state_dtype="8bit"))),
        gradients="zero",
    ),
)
