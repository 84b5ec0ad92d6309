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
from gpt import GPT, Config, load_text
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fusedopt

CONFIG = Config(width=192, context=64)


def batch_of(text: Tensor, step: int, rank: int, world: int, size: int = 8) -> Tensor:
    """Every rank takes its share of a step's places in the text."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(text) - CONFIG.context, (size * world, 1), generator=generator)[rank::world]
    return text[begins + torch.arange(CONFIG.context + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="saved here at the end, and gone on from if it is there")
    options = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = GPT(CONFIG).to(device)
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

    text, _ = load_text()
    for step in range(int(first), int(first) + options.steps):
        batch = batch_of(text, step, rank, world).to(device)
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
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
