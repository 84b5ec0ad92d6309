"""A loop in plain torch with everything on: 8-bit state, bfloat16 weights with split24 masters, layer decay, a schedule
of one's own, accumulation, clipping in the step, health, a checkpoint, and a resume that changes no bit.

python examples/plain_loop.py [--steps N]
"""

import argparse
import io
from typing import Any

import torch
from gpt import GPT, Config, load_text

import fusedopt
from fusedopt.schedules import constant, decay, warmup

PARTS = 2  # batches whose gradients are added up
CONFIG = Config(batch=8, context=64, width=192, depth=3, heads=6)


def make(steps: int) -> tuple[torch.nn.Module, fusedopt.FusedOptimizer, Any]:
    torch.manual_seed(0)
    model = GPT(CONFIG).bfloat16()
    groups = fusedopt.param_groups(model, weight_decay=0.1, lr=2e-3, layer_decay=0.9)
    optimizer = fusedopt.AdamW(
        groups, betas=(0.9, 0.99), state_dtype="8bit", master_weights="split24", max_grad_norm=1.0
    )
    schedule = warmup(0.1) >> constant() >> decay("1-sqrt", 0.3)
    return model, optimizer, fusedopt.get_scheduler(schedule, optimizer, num_training_steps=steps)


def batch(data: torch.Tensor, number: int, count: int = CONFIG.batch) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - CONFIG.context, (count, 1), generator=torch.Generator().manual_seed(number))
    words = data[starts + torch.arange(CONFIG.context + 1)]
    return words[:, :-1], words[:, 1:]


def train(model: Any, optimizer: fusedopt.FusedOptimizer, scheduler: Any, data: torch.Tensor, steps: range) -> None:
    for step in steps:
        for part in range(PARTS):
            (model.loss(*batch(data, PARTS * step + part)) / PARTS).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    data, held_out = load_text()
    model, optimizer, scheduler = make(steps)
    print(optimizer.memory_report())
    train(model, optimizer, scheduler, data, range(steps // 2))
    file = io.BytesIO()
    everything = (model, optimizer, scheduler)
    torch.save([each.state_dict() for each in everything], file)
    optimizer.record_health()
    train(model, optimizer, scheduler, data, range(steps // 2, steps))
    print(optimizer.health_report())

    resumed = make(steps)
    file.seek(0)
    for each, state in zip(resumed, torch.load(file, weights_only=True)):
        each.load_state_dict(state)
    train(*resumed, data, range(steps // 2, steps))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters()))
    print(f"resumed halfway, the bits are {'the same' if same else 'others'}")
    with torch.no_grad():
        print(f"validation loss {float(model.loss(*batch(held_out, 1_000_000, 128))):.2f}")


if __name__ == "__main__":
    main()
