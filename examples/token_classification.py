"""transformers' Trainer teaches a small BERT what each character of Python's own source is part of.

Every `optim` name of TrainingArguments runs fusedopt's optimizer, after `enable`.

python examples/token_classification.py [--steps N]
"""

import argparse
import io
import keyword
import tokenize
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

from fusedopt.integrations.transformers import enable

KINDS = ("space", "name", "keyword", "number", "string", "operator", "comment")
OF_TYPE = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.OP: 5, tokenize.COMMENT: 6}
LENGTH = 64


def labelled(source: str) -> np.ndarray:
    """The kind of each character."""
    kinds = np.zeros(len(source), dtype=np.int64)
    starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            kind = 2 if keyword.iskeyword(token.string) else 1
        else:
            kind = OF_TYPE.get(token.type, 0)
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        kinds[begin:end] = kind
    return kinds


def load() -> tuple[list[dict], list[dict]]:
    rows = []
    for name in ("argparse", "calendar", "ast", "cmd", "csv", "queue"):
        source = (Path(argparse.__file__).parent / f"{name}.py").read_text()
        source = source.encode("ascii", "replace").decode()
        ids, kinds = torch.tensor(list(source.encode())), torch.from_numpy(labelled(source))
        for start in range(0, len(source) - LENGTH, LENGTH // 2):
            rows.append({"input_ids": ids[start : start + LENGTH], "labels": kinds[start : start + LENGTH]})
    held_out = rows[::20]
    return [row for i, row in enumerate(rows) if i % 20 not in (0, 1, 19)], held_out  # windows overlap


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    train, held_out = load()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        num_labels=len(KINDS),
    )
    args = TrainingArguments(
        "out/token_classification",
        optim="adamw_torch",
        optim_args="state_dtype=bfloat16",
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    with enable():
        trainer = Trainer(
            BertForTokenClassification(config),
            args,
            train_dataset=train,
            eval_dataset=held_out,
            compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
        )
        trainer.train()
    made = trainer.optimizer.optimizer
    print(f"{type(made).__module__}.{type(made).__name__} with {made.defaults['state_dtype']} state")
    print(f"{trainer.evaluate()['eval_accuracy']:.1%} of the characters are told apart")


if __name__ == "__main__":
    main()
