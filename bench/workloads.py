"""What is stepped: lists of parameters whose gradients are set."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PARAM_STD = 0.02  # GPT-2's initialisation

# Below the max_grad_norm of the contenders that clip: a clipped step then does all of its work, yet leaves
# the gradients, which all contenders share, as they are.
_GRAD_NORM = 0.5

# float16 gradients come scaled, as a GradScaler hands them over; unscaled ones would be subnormal.
_LOSS_SCALE = {torch.float16: 2.0**13}


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes.

    Attributes:
        name: Short name, as on the command line.
        title: What it is, for tables and charts.
        shapes: Makes the shapes, in order.
        tensors: How many tensors there are.
        numel: Elements in all of them.
    """

    name: str
    title: str
    shapes: Callable[[], list[tuple[int, ...]]]
    tensors: int
    numel: int

    def params(self, dtype: torch.dtype) -> list[Parameter]:
        """Parameters with gradients of the same dtype, the same values in every process."""
        shapes = self.shapes()
        numel = sum(math.prod(shape) for shape in shapes)
        assert (len(shapes), numel) == (self.tensors, self.numel), (
            f"{self.name}: {len(shapes)} tensors, {numel} elements"
        )
        generator = torch.Generator().manual_seed(0)
        grad_std = _GRAD_NORM / math.sqrt(numel) * _LOSS_SCALE.get(dtype, 1.0)
        params = []
        for shape in shapes:
            param = Parameter(torch.randn(shape, generator=generator).mul_(_PARAM_STD).to(dtype))
            param.grad = torch.randn(shape, generator=generator).mul_(grad_std).to(dtype)
            params.append(param)
        return params


def _one_tensor() -> list[tuple[int, ...]]:
    return [(2**26,)]


def _gpt2_small() -> list[tuple[int, ...]]:
    width = 768
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention: list[tuple[int, ...]] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: list[tuple[int, ...]] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    embeddings: list[tuple[int, ...]] = [(50257, width), (1024, width)]
    return embeddings + 12 * (norm + attention + norm + mlp) + norm


def _many_small() -> list[tuple[int, ...]]:
    generator = random.Random(0)
    return [(generator.randint(64, 4096),) for _ in range(2000)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "one large tensor", _one_tensor, tensors=1, numel=2**26),
        Workload("W2", "GPT-2 small", _gpt2_small, tensors=148, numel=124_439_808),
        Workload("W3", "2,000 small tensors", _many_small, tensors=2000, numel=4_124_467),
    )
}
