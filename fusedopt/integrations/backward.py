"""Backward passes of accelerate that step as gradients come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..offload.handle import Release
from .training_arguments import SCALED


@contextmanager
def released_backward(accelerator: Any, handle: Release) -> Iterator[None]:
    """Backward passes that step, or add up the gradients of all micro-batches but the last.

    Trainer gives those of optimizers that step during the backward pass the learning rate, which is in the optimizer's
    param groups.

    Raises:
        ValueError: Losses are scaled.
    """
    if accelerator.scaler is not None:
        raise ValueError(f"float16 with {accelerator.scaler.__class__.__name__}: {SCALED}")
    backward, before = accelerator.backward, vars(accelerator).get("backward")

    def step(loss: Tensor, learning_rate: float | None = None, **kwargs: Any) -> None:
        if not accelerator.sync_gradients:
            with handle.accumulate():
                backward(loss, **kwargs)
        else:
            handle.backward(loss / accelerator.gradient_accumulation_steps)

    accelerator.backward = step
    try:
        yield
    finally:
        if before is None:
            del accelerator.backward
        else:
            accelerator.backward = before
