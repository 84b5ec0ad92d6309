"""Who steps: ours, torch's own and other packages', one entry each in CONTENDERS."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt import Adafactor, AdamW, AdEMAMix, Lion

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0

OURS, TORCH, PEER = "fusedopt", "torch", "peer"

_ALL = ("float32", "bfloat16", "float16")
_UNSCALED = ("float32", "bfloat16")  # float16 gradients are scaled: there is no norm to clip yet


class UnavailableError(Exception):
    """A peer cannot take part; the message says why, in one line."""


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        name: What tables, charts and JSON call it.
        family: OURS, TORCH or PEER.
        build: Makes the optimizer. For a peer the first argument is its module.
        module: What a peer is imported from.
        dtypes: Parameter dtypes it is measured with.
        before_step: Called before every `optimizer.step()` and timed with it.
        gradient_reads: How often a step has to read the gradients: twice when a norm comes first.
        workloads: Where it is measured. Vectors are not quantized, so their 8-bit state would be float32.
    """

    name: str
    family: str
    build: Callable[..., Optimizer]
    module: str | None = None
    dtypes: Sequence[str] = _ALL
    before_step: Callable[[Sequence[Parameter]], object] | None = None
    gradient_reads: int = 1
    workloads: Sequence[str] = ("W1", "W2", "W3")


def _ours(**options: Any) -> Callable[..., Optimizer]:
    return partial(AdamW, **HYPER, **options)


def _lion(**options: Any) -> Callable[..., Optimizer]:
    return partial(Lion, lr=HYPER["lr"], weight_decay=HYPER["weight_decay"], **options)


def _torch(**options: Any) -> Callable[..., Optimizer]:
    return partial(torch.optim.AdamW, **HYPER, **options)


def _class(name: str, **options: Any) -> Callable[..., Optimizer]:
    """Builds a peer's optimizer from its class's name."""
    return lambda module, params: getattr(module, name)(params, **HYPER, **options)


def _clip(params: Sequence[Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)


BASELINE = Contender("torch fused", TORCH, _torch(fused=True))

CONTENDERS = (
    BASELINE,
    Contender("fusedopt", OURS, _ours()),
    Contender("fusedopt, bf16 state, nearest", OURS, _ours(state_dtype="bfloat16", state_rounding="nearest")),
    Contender("fusedopt, bf16 state, stochastic", OURS, _ours(state_dtype="bfloat16", state_rounding="stochastic")),
    Contender("fusedopt, 8-bit state", OURS, _ours(state_dtype="8bit"), workloads=("W2",)),
    Contender(
        "fusedopt, 8-bit state, split24",
        OURS,
        _ours(state_dtype="8bit", master_weights="split24"),
        dtypes=("bfloat16",),
        workloads=("W2",),
    ),
    Contender("fusedopt Lion", OURS, _lion()),
    Contender("fusedopt Lion, 8-bit state", OURS, _lion(state_dtype="8bit"), workloads=("W2",)),
    Contender("fusedopt AdEMAMix", OURS, partial(AdEMAMix, lr=HYPER["lr"], weight_decay=HYPER["weight_decay"])),
    Contender("fusedopt Adafactor", OURS, Adafactor, gradient_reads=3),
    Contender(
        "fusedopt Adafactor, lr given",
        OURS,
        partial(Adafactor, lr=HYPER["lr"], relative_step=False, scale_parameter=False),
        gradient_reads=2,
    ),
    Contender("fusedopt + clip", OURS, _ours(max_grad_norm=MAX_GRAD_NORM), dtypes=_UNSCALED, gradient_reads=2),
    Contender(
        "torch fused + clip",
        TORCH,
        _torch(fused=True),
        dtypes=_UNSCALED,
        before_step=_clip,
        gradient_reads=2,
    ),
    Contender("torch Adafactor", TORCH, partial(torch.optim.Adafactor, foreach=True)),
    Contender("torch foreach", TORCH, _torch(foreach=True)),
    Contender("torch for-loop", TORCH, _torch(foreach=False, fused=False)),
    Contender("DeepSpeed CPUAdam", PEER, _class("DeepSpeedCPUAdam", adamw_mode=True), module="deepspeed.ops.adam"),
    Contender("bitsandbytes AdamW8bit", PEER, _class("AdamW8bit"), module="bitsandbytes.optim"),
    Contender("torch-optimi AdamW", PEER, _class("AdamW"), module="optimi"),
    Contender(
        "transformers Adafactor",
        PEER,
        lambda module, params: module.Adafactor(params),
        module="transformers.optimization",
        gradient_reads=3,
    ),
    Contender("torchao AdamW8bit", PEER, _class("AdamW8bit"), module="torchao.optim"),
)


@dataclass(frozen=True)
class Running:
    """A contender that has taken its first step, so its state exists.

    Attributes:
        contender: Which one.
        step: Takes one step.
        first_step_seconds: Construction and first step: allocation, page faults, compilation.
        state_bytes: Bytes per parameter that its optimizer holds.
        moved_bytes: Bytes per parameter that a step has to read and write: parameters and state both ways,
            gradients as often as it needs them. Temporaries do not count, so a contender that writes
            some shows a lower bandwidth.
    """

    contender: Contender
    step: Callable[[], object]
    first_step_seconds: float
    state_bytes: float
    moved_bytes: float


def start(contender: Contender, params: list[Parameter], *, first_step_limit: float = 0.0) -> Running:
    """Builds a contender's optimizer and takes its first step.

    Args:
        contender: The contender.
        params: Parameters with gradients; the step changes them.
        first_step_limit: Seconds that a peer may take, since some compile; 0 is no limit.

    Raises:
        UnavailableError: A peer is not installed, raised, took too long or left the parameters as they were.
            Errors of ours and of torch's pass through: those must not go missing.
    """
    if contender.family != PEER:
        return _start(contender, contender.build, params)
    assert contender.module is not None, contender.name
    if importlib.util.find_spec(contender.module.partition(".")[0]) is None:
        raise UnavailableError("not installed")
    with _watched(first_step_limit):
        module = importlib.import_module(contender.module)
        return _start(contender, partial(contender.build, module), params)


def _start(contender: Contender, build: Callable[..., Optimizer], params: list[Parameter]) -> Running:
    before = _sample(params)
    started = time.perf_counter()
    optimizer = build(params)
    step = _step(contender, optimizer, params)
    step()
    seconds = time.perf_counter() - started
    if torch.equal(_sample(params), before):
        raise RuntimeError(f"the first step of {contender.name} left the parameters unchanged")
    numel = sum(param.numel() for param in params)
    state_bytes = _state_bytes(optimizer) / numel
    param_bytes = params[0].element_size()
    moved = (2 + contender.gradient_reads) * param_bytes + 2 * state_bytes
    return Running(contender, step, seconds, state_bytes, moved)


def _step(contender: Contender, optimizer: Optimizer, params: list[Parameter]) -> Callable[[], object]:
    before_step = contender.before_step
    if before_step is None:
        return optimizer.step

    def step() -> None:
        before_step(params)
        optimizer.step()

    return step


def _sample(params: Sequence[Parameter]) -> Tensor:
    """A copy of a few values of the last parameter."""
    return params[-1].detach().flatten()[:4096].clone()


def _state_bytes(optimizer: Optimizer) -> int:
    """Bytes of memory behind an optimizer's state; tensors that share memory count once."""
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Plain tensors within nested containers and tensor subclasses."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """Turns whatever a peer raises into an UnavailableError, cuts it off after some seconds, and mutes its logs."""
    was_cut_off = False

    def cut_off(signum: int, frame: object) -> None:
        nonlocal was_cut_off
        was_cut_off = True
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, cut_off)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    logging.disable()
    try:
        yield
    except Exception as error:
        # The flag decides, not the error: compilers wrap the error that cut them off in one of their own.
        reason = f"the first step took more than {seconds:g} s" if was_cut_off else _one_line(error)
        raise UnavailableError(reason) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        logging.disable(logging.NOTSET)


def _one_line(error: Exception) -> str:
    """An error as one short line without the paths of this machine."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
    text = re.sub(r"/[^\s'\"]*/", ".../", text)
    return text if len(text) <= 140 else text[:139] + "…"
