"""What the ranks train: a small transformer whose first dimensions no world size divides, and bare parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from cases import assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

TOKENS, WIDTH, HIDDEN = 67, 71, 101
EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))  # one element, of which most ranks hold nothing
        self.mix = nn.Parameter(torch.randn(2, WIDTH) / 8)  # fewer rows than some worlds have ranks
        self.unused = nn.Parameter(torch.ones(5, WIDTH))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.scale * nn.functional.scaled_dot_product_attention(
            self.query(y), self.key(y), self.value(y), is_causal=True
        )
        return x * self.frozen + self.down(nn.functional.gelu(self.up(x + self.mix.sum(0))))


class Transformer(nn.Module):
    """The embedding and the last layer share their weight."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformer(seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(seed)
    return Transformer().to(dtype)


def shard(model: Transformer, **kwargs: Any) -> Transformer:
    """The model under FSDP2, a block at a time."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def tokens(step: int, count: int = 2) -> Tensor:
    return torch.randint(TOKENS, (count, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).float()
    return nn.functional.cross_entropy(logits.reshape(-1, TOKENS), batch[:, 1:].reshape(-1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Losses of steps in which every rank sees the same tokens: gradients of two or four are their mean exactly."""
    losses = []
    for step in steps:
        loss = loss_of(model, tokens(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_whole(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """Parameters and states of a sharded optimizer and of another, bit for bit."""
    pairs = list(zip(params_of(ours), params_of(theirs), strict=True))
    for i, (param, twin) in enumerate(pairs):
        assert_same_bits(whole(param), whole(twin), f"parameter {i} of shape {tuple(param.shape)}")
        held, other = ours.state.get(param, {}), theirs.state.get(twin, {})
        assert held.keys() == other.keys(), f"parameter {i} of shape {tuple(param.shape)}"
        for key, value in held.items():
            assert_same_bits(whole(value), whole(other[key]), f"{key} of parameter {i} of shape {tuple(param.shape)}")


# ---- bare parameters ---------------------------------------------------------------------------------

# Ragged rows and whole blocks of them, fewer rows than ranks, one element, nothing, and three dimensions.
SHAPES = ((67, 71), (13, 192), (2, 70), (1,), (31,), (5, 0), (7, 6, 64))


def full_params(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def full_grads(shapes: Iterable[tuple[int, ...]], step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def placed(full: Tensor, mesh: Any, placements: Any) -> DTensor:
    """A tensor that every rank has, cut up without sending anything."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def set_grads(optimizer: torch.optim.Optimizer, step: int, dtype: torch.dtype = torch.float32) -> None:
    """Gradients that hang on the step alone, and on parameters' global shapes; frozen parameters get none."""
    params = params_of(optimizer)
    for param, grad in zip(params, full_grads([tuple(param.shape) for param in params], step, dtype)):
        if param.requires_grad:
            param.grad = placed(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad


def step_both(
    ours: torch.optim.Optimizer | None,
    theirs: torch.optim.Optimizer | None,
    steps: Iterable[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Steps a sharded optimizer and one that is not, or one of them, with the same gradients."""
    for step in steps:
        for optimizer in (ours, theirs):
            if optimizer is not None:
                set_grads(optimizer, step, dtype)
                optimizer.step()
                optimizer.zero_grad()
