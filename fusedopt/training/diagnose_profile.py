"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks

PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Seconds that a step takes, by part; the mean of some steps.

    Attributes:
        data: Waiting for the next batch.
        forward: The loss of it.
        backward: Its gradients.
        optimizer: The step, and freeing gradients.
        steps: How many were measured.
    """

    data: float
    forward: float
    backward: float
    optimizer: float
    steps: int = 10

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.data + self.forward + self.backward + self.optimizer

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the time, in [0, 1]."""
        return {name: getattr(self, name) / self.total if self.total > 0 else 0.0 for name in PARTS}

    def sentences(self) -> Iterator[str]:
        """What was measured, for people."""
        yield f"a step takes {1e3 * self.total:.3g} ms, the mean of {self.steps}"
        for name, share in self.shares.items():
            yield f"{name}: {1e3 * getattr(self, name):.3g} ms, {share:.0%}"


def profile_steps(
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 10,
    warmup: int = 2,
) -> Profile:
    """Trains for some steps and measures where their time goes. Devices are waited for after each part.

    Args:
        batches: Such as a DataLoader.
        loss_of: The loss of a batch.
        optimizer: Steps the model; the steps are real.
        steps: How many are measured.
        warmup: How many are taken before, not measured.

    Returns:
        The mean seconds of each part.

    Raises:
        ValueError: There are too few batches, or a count is below 1.
    """
    if checks.whole("steps", steps) < 1:
        raise ValueError(f"steps={steps!r} measures nothing; pass a whole number above 0")
    checks.whole("warmup", warmup)
    seconds = dict.fromkeys(PARTS, 0.0)
    iterator = iter(batches)
    for step in range(warmup + steps):
        last = _now()
        times = []
        try:
            batch = next(iterator)
        except StopIteration:
            raise ValueError(
                f"batches ended after {step}, and {warmup} + {steps} are needed; pass more, or fewer steps"
            ) from None
        times.append(_now())
        loss = loss_of(batch)
        times.append(_now())
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(_now())
        optimizer.step()
        optimizer.zero_grad()
        times.append(_now())
        if step >= warmup:
            for name, at in zip(PARTS, times):
                seconds[name] += at - last
                last = at
    return Profile(**{name: value / steps for name, value in seconds.items()}, steps=steps)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.xpu.is_available():
        torch.xpu.synchronize()
    return time.perf_counter()
