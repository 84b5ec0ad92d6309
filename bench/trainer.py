"""What transformers' Trainer adds to a step, with torch's AdamW and with ours: `python bench/trainer.py`.

Times are of the processor, not of the clock, and contenders take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import fusedopt
from fusedopt.integrations.transformers import FusedTrainer

BATCH, LENGTH = 8, 32
SKIPPED = 5  # steps at the beginning


class Times(TrainerCallback):
    """The time from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.ends.append(time.process_time())


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
    return BertForSequenceClassification(config)


def data(steps: int) -> list[dict[str, torch.Tensor]]:
    words = torch.randint(1, 4096, (BATCH * steps, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.sum() % 3} for row in words]


def trainer(steps: int, cls: type[Trainer], folder: str) -> list[float]:
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    times = Times()
    trains = cls(model(), args, train_dataset=data(steps), callbacks=[times])
    trains.remove_callback(transformers.PrinterCallback)
    trains.train()
    return times.ends


def bare(steps: int, make: Callable[..., torch.optim.Optimizer], clips: bool) -> list[float]:
    network, rows = model().train(), data(steps)
    optimizer = make(network.parameters())
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    ends = []
    for step in range(steps):
        part = rows[BATCH * step : BATCH * (step + 1)]
        network(**{key: torch.stack([row[key] for row in part]) for key in part[0]}).loss.backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ends.append(time.process_time())
    return ends


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    steps = settings.steps
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], list[float]]] = {
            "torch, bare loop": lambda: bare(steps, lambda p: torch.optim.AdamW(p, lr=5e-5, fused=True), True),
            "ours, bare loop": lambda: bare(
                steps, lambda p: fusedopt.AdamW(p, lr=5e-5, max_grad_norm=1.0), clips=False
            ),
            "torch, Trainer": lambda: trainer(steps, Trainer, folder),
            "ours, FusedTrainer": lambda: trainer(steps, FusedTrainer, folder),
        }
        for _ in range(settings.rounds):
            for name, run in contenders.items():
                ends = run()[SKIPPED:]
                taken.setdefault(name, []).append(statistics.median(b - a for a, b in itertools.pairwise(ends)))
    best = {name: min(values) for name, values in taken.items()}
    for name, value in best.items():
        print(f"{name:20} {1e3 * value:8.2f} ms a step")
    theirs = best["torch, Trainer"] - best["torch, bare loop"]
    ours = best["ours, FusedTrainer"] - best["ours, bare loop"]
    print(f"Trainer adds {1e3 * theirs:.2f} ms with torch's, {1e3 * ours:.2f} ms with ours")
    print(f"the integration adds {(ours - theirs) / best['ours, bare loop']:+.2%} of a step")


if __name__ == "__main__":
    main()
