"""A byte-level GPT in plain PyTorch and the loop that trains it: everything but the optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Config:
    """Model, batch and schedule; two cores train the defaults in half a minute."""

    steps: int = 200
    batch: int = 8
    context: int = 128  # bytes
    recent: int = 4  # bytes that are embedded together
    width: int = 384
    depth: int = 2
    heads: int = 6
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup: int = 30
    log_every: int = 10
    seed: int = 0


class Block(nn.Module):
    """Attention and MLP, each applied to a normalised copy of the stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias: on the keys it changes nothing, so its gradient would be rounding noise, which Adam would scale up.
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next one out; a position embeds its byte and the few before it, to learn fast."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.recent = config.recent
        self.bytes = nn.Embedding(256 * config.recent, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)
        for embedding in (self.bytes, self.positions):
            # torch's own 1 is too large to learn from, and the usual 0.02 so small that the first steps turn it round.
            nn.init.normal_(embedding.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        recent = F.pad(x, (self.recent - 1, 0)).unfold(1, self.recent, 1)
        x = (
            self.bytes(recent + 256 * torch.arange(self.recent, device=x.device)).sum(-2)
            + self.positions.weight[: x.shape[1]]
        )
        return self.head(self.norm(self.blocks(x)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy, nats per byte."""
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())


def load_text() -> tuple[Tensor, Tensor]:
    """The help topics of Python itself as bytes: 90 % to train on, the last 10 % to validate."""
    text = bytearray("\n".join(topics[key] for key in sorted(topics)).encode())
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def batches(data: Tensor, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows, and the byte after each of their bytes; every run is given the same ones."""
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        starts = torch.randint(len(data) - config.context, (config.batch, 1), generator=generator)
        windows = data[starts + torch.arange(config.context + 1)]
        yield windows[:, :-1], windows[:, 1:]


class Training:
    """One run: the seed's weights, the seed's batches and an optimizer, a step at a time."""

    def __init__(self, make_optimizer: Callable[[list[dict], Config], Optimizer], config: Config) -> None:
        torch.manual_seed(config.seed)
        self.config, self.model = config, GPT(config)
        parameters = list(self.model.parameters())
        matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
        vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = make_optimizer([matrices, vectors], config)
        # An optimizer that takes its learning rate from the step's number has no rate to schedule.
        has_lr = self.optimizer.param_groups[0]["lr"] is not None
        self.scheduler = LambdaLR(self.optimizer, self.lr_factor) if has_lr else None
        train_data, self.validation_data = load_text()
        self.batches = enumerate(batches(train_data, config))
        self.parameters = sum(p.numel() for p in parameters)
        self.losses: dict[int, float] = {}  # logged step: loss of its batch
        self.optimizer_ms: list[float] = []
        self.seconds = 0.0

    def lr_factor(self, step: int) -> float:
        """Linear warmup, then a cosine down to a tenth."""
        warmup = min(self.config.warmup, self.config.steps // 2)
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (self.config.steps - warmup))

    def step(self) -> float:
        """Train on the next batch; return its loss."""
        start = time.perf_counter()
        number, (x, y) = next(self.batches)
        loss = self.model.loss(x, y)
        loss.backward()
        before = time.perf_counter()
        self.optimizer.step()
        self.optimizer_ms.append(1e3 * (time.perf_counter() - before))
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        if number % self.config.log_every == 0 or number == self.config.steps - 1:
            self.losses[number] = loss.item()
        self.seconds += time.perf_counter() - start
        return loss.item()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss over the whole validation text, cut into windows."""
        data, context = self.validation_data, self.config.context
        count = (len(data) - 1) // context
        x, y = data[: count * context].view(count, context), data[1 : count * context + 1].view(count, context)
        return sum(self.model.loss(a, b).item() * len(a) for a, b in zip(x.split(32), y.split(32))) / count

    def state_bytes(self) -> int:
        """Bytes of every tensor in the optimizer's state."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
