"""Trains a small GPT with FSDP2, clipped, in 8-bit states, and goes on from its checkpoint in any number of processes.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 20 --checkpoint out/checkpoint

Runs on GPUs where there are any, else on the CPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fusedopt

TOKENS, WIDTH, LENGTH = 256, 192, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch_of(text: Tensor, step: int, rank: int, world: int, size: int = 8) -> Tensor:
    """Every rank takes its share of a step's places in the text."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(text) - LENGTH - 1, (size * world,), generator=generator)[rank::world]
    return torch.stack([text[begin : begin + LENGTH + 1] for begin in begins.tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, help="saved here at the end, and gone on from if it is there")
    options = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = GPT(options.blocks).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    groups = fusedopt.param_groups(model, weight_decay=0.1)
    optimizer = fusedopt.AdamW(groups, lr=1e-3, state_dtype="8bit", max_grad_norm=1.0)

    first = torch.zeros((), dtype=torch.int64)
    if options.checkpoint and (options.checkpoint / ".metadata").exists():
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states, "step": first}
        dcp.load(saved, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        first = saved["step"]

    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    for step in range(int(first), int(first) + options.steps):
        batch = batch_of(text, step, rank, world).to(device)
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}, gradient norm {optimizer.last_grad_norm.item():.3f}")
    if rank == 0:
        print(f"state of rank 0: {optimizer.memory_report().state_bytes / 2**20:.2f} MiB")

    if options.checkpoint:
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states, "step": torch.tensor(int(first) + options.steps)}
        dcp.save(saved, checkpoint_id=options.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
