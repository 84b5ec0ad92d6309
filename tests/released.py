"""Backward passes and models for tests of released gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import assert_same_run, params_of, set_grads
from torch import Tensor

import fusedopt

SHAPES = [(40, 100), (7, 257), (65,), (3,), (), (30, 64), (0,)]
BUCKET = 3000


def backward(params: list[torch.nn.Parameter], step: int, handle: Any = None, scale: float = 1.0) -> None:
    """A backward pass that gives parameters the gradients of `set_grads`, the last ones first."""
    twins = [torch.nn.Parameter(param.detach()) for param in params]
    set_grads(twins, step, scale)
    # In float32 the gradient of each product is the other factor, and its sum's is 1.
    loss = torch.stack([(param * twin.grad).sum().float() for param, twin in zip(params, twins)]).sum()
    loss.backward() if handle is None else handle.backward(loss)


def train(optimizer: Any, steps: int, first: int = 0, handle: Any = None, scale: float = 1.0) -> Any:
    for step in range(first, first + steps):
        backward(params_of(optimizer), step, handle, scale)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def twins(make: Callable[[], Any], steps: int = 3, **release: Any) -> tuple[Any, Any]:
    """The same run with release and without."""
    released, usual = make(), make()
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, **release)
    train(released, steps, handle=handle)
    train(usual, steps)
    assert_same_run(released, usual)
    return released, usual


class Tied(torch.nn.Module):
    """A weight that is used at both ends, and a layer that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 32)
        self.middle = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        self.unused = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.head(self.middle(self.embed(x))), x.roll(1))


def fit(
    releases: bool, steps: int = 4, model: torch.nn.Module | None = None, **release: Any
) -> tuple[Any, list[float]]:
    model = model or Tied()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle = fusedopt.release_gradients(optimizer, **release) if releases else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    losses = []
    for step in range(steps):
        loss = model(torch.randint(50, (8,), generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    if handle is not None:
        handle.remove()
    return optimizer, losses


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("a failure in the backward pass")
