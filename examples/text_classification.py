"""transformers' Trainer fine-tunes a small BERT to tell from which module of Python's library a line comes.

python examples/text_classification.py [--steps N]
"""

import argparse
import random
import re
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fusedopt.integrations.transformers import optimizer

MODULES = ("argparse", "smtplib", "turtle", "zipfile/__init__", "calendar", "unittest/mock")
LIBRARY = Path(argparse.__file__).parent
WORDS, LENGTH = 1500, 24


def load() -> tuple[list[dict], list[dict]]:
    """Lines of at least four words, as numbers of words, and the number of their module."""
    sources = [LIBRARY / f"{name}.py" for name in MODULES]
    lines = [
        (re.findall(r"[A-Za-z]+|[^\sA-Za-z]", line), label)
        for label, path in enumerate(sources)
        if path.exists()
        for line in path.read_text().splitlines()
    ]
    lines = [(words, label) for words, label in lines if len(words) >= 4]
    counts: dict[str, int] = {}
    for words, _ in lines:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    known = {word: i + 2 for i, word in enumerate(sorted(counts, key=counts.__getitem__, reverse=True)[: WORDS - 2])}
    rows = []
    for words, label in lines:
        ids = [known.get(word, 1) for word in words[:LENGTH]]
        ids += [0] * (LENGTH - len(ids))
        rows.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids) > 0, "labels": label})
    random.Random(0).shuffle(rows)
    return rows[512:], rows[:512]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps

    train, held_out = load()
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            num_labels=len(MODULES),
        )
    )
    args = TrainingArguments(
        "out/text_classification",
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=1e-3,
        weight_decay=0.01,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
        optimizer_cls_and_kwargs=optimizer(args, "adamw_8bit"),
    )
    trainer.train()
    made = trainer.optimizer.optimizer
    print(f"{type(made).__name__}: {made.memory_report().state_bytes / made.memory_report().numel:.2f} bytes a weight")
    print(f"lines of {len(MODULES)} modules: {trainer.evaluate()['eval_accuracy']:.1%} of 512 are told apart")


if __name__ == "__main__":
    main()
