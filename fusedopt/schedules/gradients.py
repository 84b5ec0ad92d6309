"""Schedules that are driven by the gradients: by their norm, and by how many of them are zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import checks
from ..reference.norm import numbers
from .feedback import Feedback, State
from .schedule import fill


class _OfGradients(Feedback):
    """What both rules share: an average, and a scale that multiplies the lr of every group alike."""

    measures_gradients = True
    beta: float
    min_scale: float

    def measure(self, optimizer: Optimizer) -> float:
        """Takes the measurement from the gradients that the optimizer's parameters hold.

        Args:
            optimizer: After its step, before `zero_grad`.

        Returns:
            The measurement.

        Raises:
            ValueError: No parameter has a gradient.
        """
        raise NotImplementedError

    def _check(self, **values: Any) -> None:
        min_scale = checks.positive("min_scale", self.min_scale)
        if min_scale > 1:
            raise ValueError(f"min_scale={min_scale!r} is above 1; pass the smallest multiplier of the lr")
        fill(self, beta=checks.fraction("beta", self.beta), min_scale=min_scale, **values)

    def _apply(self, state: State, scale: float, base_lrs: list[float]) -> None:
        state["scale"] = scale
        state["lrs"] = [lr * scale for lr in base_lrs]


@dataclass(frozen=True)
class GradientNorm(_OfGradients):
    """The lr falls when the gradient norm spikes, and comes back.

    Let n be the measured norm, a its average over the steps before (initially the first norm), and c the scale,
    initially 1:

        c = max(min_scale, min(threshold a / n, 1 - recovery (1 - c)))
        a = beta a + (1 - beta) min(n, threshold a)

    A norm above `threshold` times the average is a spike: the lr of the next step is lowered by the factor by which
    the norm exceeds that. Afterwards the gap to 1 shrinks by the factor `recovery` in each step. A spike enters the
    average clipped, so that the next one is still seen. A norm that is not finite scales by min_scale and leaves the
    average as it is.

    AdaGC (Wang et al., arXiv:2502.11034) finds spikes in the same way, by comparing with an average of clipped norms;
    ZClip (Kumar et al., arXiv:2504.02507) uses a z-score. Both scale the gradient of that step. A scheduler comes after
    the step and can only scale the lr of the steps that follow: use `max_grad_norm` for the step itself.

    Args:
        beta: Of the average, in [0, 1).
        threshold: How many times the average is a spike, above 1.
        recovery: What is left of a reduction one step later, in [0, 1).
        min_scale: The smallest multiplier, in (0, 1].
    """

    name: ClassVar[str] = "gradient_norm"
    beta: float = 0.98
    threshold: float = 2.0
    recovery: float = 0.9
    min_scale: float = 0.1

    def __post_init__(self) -> None:
        threshold = checks.number("threshold", self.threshold)
        if threshold <= 1:
            raise ValueError(f"threshold={threshold!r} would make every norm a spike; pass a number above 1, such as 2")
        self._check(threshold=threshold, recovery=checks.fraction("recovery", self.recovery))

    def start(self, base_lrs: list[float]) -> State:
        return {"lrs": list(base_lrs), "scale": 1.0, "average": None}

    def update(self, state: State, value: float, base_lrs: list[float], counts: bool = True) -> None:
        if not math.isnan(value) and value < 0:
            raise ValueError(f"the gradient norm {value!r} is negative; pass a norm")
        average = state["average"]
        finite = math.isfinite(value)
        if average is None:
            state["average"] = value if finite else None
            return
        bar = self.threshold * average
        if counts:
            recovered = 1.0 - self.recovery * (1.0 - state["scale"])
            allowed = 0.0 if not finite else bar / value if value > bar else 1.0
            self._apply(state, max(self.min_scale, min(allowed, recovered)), base_lrs)
        if finite:
            state["average"] = self.beta * average + (1.0 - self.beta) * min(value, bar)

    def measure(self, optimizer: Optimizer) -> float:
        norm = getattr(optimizer, "last_grad_norm", None) if _takes_norm(optimizer) else None
        if norm is None:
            norm = _full(torch.nn.utils.get_total_norm([numbers(each) for each in _gradients(optimizer)]))
            scale = getattr(optimizer, "last_grad_scale", None)  # GradScaler's, which a fused step leaves in gradients
            norm = norm if scale is None else norm / scale
        return float(norm)


@dataclass(frozen=True)
class GradientSparsity(_OfGradients):
    """The lr follows the density of the gradients: the fewer elements are not zero, the smaller it is.

    Let z be the measured fraction of zeros, a the average density (initially that of the first step), and d the
    density that it is compared with:

        a = beta a + (1 - beta) (1 - z)
        c = min(max_scale, max(min_scale, (a / d)^power))

    An element that is zero saw nothing of the batch, so the other elements were averaged over fewer examples each. The
    default power of 1/2 is therefore the square root rule for the lr and the size of batches (Krizhevsky,
    arXiv:1404.5997; for adaptive optimizers Malladi et al., arXiv:2205.10287). Its use for sparsity is our own; we know
    of no published schedule that does this. A negative power, with max_scale above 1, does the opposite.

    Args:
        beta: Of the average, in [0, 1).
        power: How strongly the lr follows.
        reference: d, in (0, 1]; by default the average at the time when measurements begin to count.
        min_scale: The smallest multiplier, in (0, 1].
        max_scale: The largest multiplier, at least 1.
    """

    name: ClassVar[str] = "gradient_sparsity"
    beta: float = 0.98
    power: float = 0.5
    reference: float | None = None
    min_scale: float = 0.1
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        reference = None if self.reference is None else checks.positive("reference", self.reference)
        if reference is not None and reference > 1:
            raise ValueError(f"reference={reference!r} is above 1; pass a fraction of elements that are not zero")
        max_scale = checks.number("max_scale", self.max_scale)
        if max_scale < 1:
            raise ValueError(f"max_scale={max_scale!r} is below 1; pass the largest multiplier of the lr")
        self._check(power=checks.number("power", self.power), reference=reference, max_scale=max_scale)

    def start(self, base_lrs: list[float]) -> State:
        return {"lrs": list(base_lrs), "scale": 1.0, "average": None, "reference": self.reference}

    def update(self, state: State, value: float, base_lrs: list[float], counts: bool = True) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"the gradient sparsity {value!r} is outside [0, 1]; pass the fraction of zeros")
        density, average = 1.0 - value, state["average"]
        average = state["average"] = density if average is None else self.beta * average + (1.0 - self.beta) * density
        if not counts:
            return
        if state["reference"] is None:
            # An average of exactly 0 is nothing to compare with, so the first one that is not 0 is taken.
            state["reference"] = average or None
        if state["reference"] is not None:
            self._apply(state, self._scale(average / state["reference"]), base_lrs)

    def _scale(self, ratio: float) -> float:
        try:
            scale = ratio**self.power
        except (OverflowError, ZeroDivisionError):  # a negative power of a number close to 0
            scale = math.inf
        return min(self.max_scale, max(self.min_scale, scale))

    def measure(self, optimizer: Optimizer) -> float:
        return gradient_sparsity(_gradients(optimizer))


def gradient_sparsity(gradients: Iterable[Tensor]) -> float:
    """The fraction of elements that are zero.

    Args:
        gradients: Of any shapes; elements that a sparse tensor does not hold count as zero.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: The gradients have no elements.
    """
    total, filled = 0, 0
    for gradient in gradients:
        total += gradient.numel()
        filled += int(_full(torch.count_nonzero(numbers(gradient))))
    if total == 0:
        raise ValueError("the gradients have no element, so nothing is known of their zeros; pass some")
    return 1.0 - filled / total


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        raise ValueError(
            "no parameter has a gradient to measure; step the scheduler before zero_grad, or pass the measurement"
        )
    return gradients


def _takes_norm(optimizer: Optimizer) -> bool:
    """Whether the steps of an optimizer with `last_grad_norm` find it; where they stopped to, it is an old one."""
    limits = [group.get(key, True) for group in optimizer.param_groups for key in ("max_grad_norm", "skip_step_above")]
    return any(limit is not None for limit in limits)


def _full(value: Tensor) -> Tensor:
    """What a DTensor stands for."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
