"""FusedTrainer trains a small GPT-2 on Python's help pages: bfloat16 weights, split24 masters, 8-bit state.

TensorBoard, where it is installed, shows the gradient norm that steps found (`tensorboard --logdir out/causal_lm`).

python examples/causal_lm.py [--steps N]
"""

import argparse
from importlib.util import find_spec

import torch
from gpt import load_text
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fusedopt.integrations.transformers import FusedTrainer, add_callback

LENGTH = 64


def windows(data: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    cut = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in cut]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    train, held_out = load_text()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=192, n_layer=3, n_head=6, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        "out/causal_lm",
        optim="adamw_8bit",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        weight_decay=0.1,
        adam_beta2=0.99,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        logging_steps=min(50, steps),
        save_strategy="no",
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        use_cpu=True,
    )
    trainer = FusedTrainer(
        GPT2LMHeadModel(config).bfloat16(),
        args,
        train_dataset=windows(train),
        eval_dataset=windows(held_out)[:200],
        optimizer_options={"master_weights": "split24"},
    )
    add_callback(trainer, health=True)
    trainer.train()
    print(trainer.optimizer.optimizer.memory_report())
    last = [row for row in trainer.state.log_history if "grad_norm_max" in row][-1:]
    for row in last:
        print(f"the last {args.logging_steps} steps: gradient norms up to {row['grad_norm_max']:.2f}")
    print(f"validation loss {trainer.evaluate()['eval_loss']:.2f}; a coin for each bit would have 5.55")


if __name__ == "__main__":
    main()
