"""The demo's GPT, smaller, as a loop for `fusedopt train`, `compare`, `search` and `lr-range`: `--train loop:train`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpt import GPT, Config, batches, load_text

from fusedopt.training import Recipe

CONFIG = Config(batch=8, context=64, width=96, depth=1, heads=3)


def make_model() -> GPT:
    return GPT(CONFIG)


def train(recipe: Recipe, seed: int, budget: int) -> Iterator[dict[str, float]]:
    """Everything but the recipe hangs on the seed and the budget."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer, scheduler = recipe.build(model, total_steps=budget)
    data, held_out = load_text()
    windows = held_out[: 100 * (CONFIG.context + 1)].view(100, -1)
    config = Config(**{**vars(CONFIG), "steps": budget, "seed": seed})
    for step, (x, y) in enumerate(batches(data, config), 1):
        lr = optimizer.param_groups[0]["lr"]
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        record = {"step": step, "loss": loss.item(), "lr": lr}
        if optimizer.last_grad_norm is not None:
            record["grad_norm"] = optimizer.last_grad_norm.item()
        if step % max(1, budget // 10) == 0:
            with torch.no_grad():
                record["eval_loss"] = model.loss(windows[:, :-1], windows[:, 1:]).item()
        yield record
