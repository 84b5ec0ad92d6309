"""Trainings of tiny models that go well, and some that do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt

Batches = Iterator[Callable[[], Tensor]]
Made = tuple[nn.Module, Callable[[], Tensor]]


def _mlp(width: int = 32, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def regression(noise: float = 0.1, batch: int = 32) -> Made:
    model, teacher = _mlp(), _mlp()

    def loss() -> Tensor:
        x = torch.randn(batch, 16)
        with torch.no_grad():
            y = 4 * teacher(x) + noise * torch.randn(batch, 1)
        return nn.functional.mse_loss(model(x), y)

    return model, loss


def classification(labels_wrong: float = 0.0, batch: int = 32, separate: bool = False) -> Made:
    model, centers = _mlp(outputs=4), torch.randn(4, 16) * (4.0 if separate else 1.0)

    def loss() -> Tensor:
        y = torch.randint(4, (batch,))
        x = centers[y] + torch.randn(batch, 16)
        y = torch.where(torch.rand(batch) < labels_wrong, torch.randint(4, (batch,)), y)
        return nn.functional.cross_entropy(model(x), y)

    return model, loss


class _Attention(nn.Module):
    """One block of a GPT over 16 symbols."""

    def __init__(self, symbols: int = 16, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(symbols, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x + self.mlp(self.second(x)))


def gpt(batch: int = 8) -> Made:
    model, table = _Attention(), torch.randn(16, 16).mul(2).softmax(-1)

    def loss() -> Tensor:
        tokens = [torch.randint(16, (batch,))]
        for _ in range(16):
            tokens.append(torch.multinomial(table[tokens[-1]], 1)[:, 0])
        text = torch.stack(tokens, 1)
        return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return model, loss


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm(batch: int = 16) -> Made:
    model = _Lstm()

    def loss() -> Tensor:
        x = torch.randn(batch, 10, 4)
        return nn.functional.mse_loss(model(x), x.sum((1, 2), keepdim=False)[:, None] / 4)

    return model, loss


def convolution(batch: int = 16) -> Made:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    patterns = torch.randn(4, 1, 8, 8)

    def loss() -> Tensor:
        y = torch.randint(4, (batch,))
        return nn.functional.cross_entropy(model(patterns[y] + torch.randn(batch, 1, 8, 8)), y)

    return model, loss


def with_warmup(steps: int, warmup: float = 0.05, end: float = 0.0) -> Callable[[int], float]:
    first = max(1, int(warmup * steps))

    def at(step: int) -> float:
        if step < first:
            return (step + 1) / first
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))

    return at


def _restarts(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * ((4 * step / steps) % 1.0)))


def _linear(steps: int) -> Callable[[int], float]:
    return lambda step: 1 - step / steps


# What is trained, by which optimizer, with which schedule of a number of steps.
HEALTHY: dict[str, tuple[Callable[[], Made], Callable[[Any], torch.optim.Optimizer], Any]] = {
    "regression": (regression, lambda p: fusedopt.AdamW(p, lr=3e-3, max_grad_norm=1.0), with_warmup),
    "noiseless": (lambda: regression(0.0), lambda p: fusedopt.AdamW(p, lr=2e-3, max_grad_norm=1e9), with_warmup),
    "classification": (classification, lambda p: fusedopt.Lion(p, lr=3e-4, max_grad_norm=1.0), _linear),
    "separable": (
        lambda: classification(separate=True),
        lambda p: fusedopt.AdamW(p, lr=1e-3, max_grad_norm=1e9),
        with_warmup,
    ),
    "wrong labels": (
        lambda: classification(0.2, batch=8),
        lambda p: fusedopt.SGD(p, lr=0.02, momentum=0.9, max_grad_norm=1e9),
        with_warmup,
    ),
    "restarts": (regression, lambda p: fusedopt.AdamW(p, lr=3e-3, max_grad_norm=1.0), _restarts),
    "gpt": (gpt, lambda p: fusedopt.AdamW(p, lr=3e-3, state_dtype="8bit", max_grad_norm=1.0), with_warmup),
    "gpt, Adafactor": (
        gpt,
        lambda p: fusedopt.Adafactor(p, lr=1e-2, relative_step=False, max_grad_norm=1e9),
        with_warmup,
    ),
    "lstm": (lstm, lambda p: torch.optim.AdamW(p, lr=3e-3), with_warmup),
    "convolution": (convolution, lambda p: fusedopt.AdamW(p, lr=3e-3, max_grad_norm=1e9), with_warmup),
}
