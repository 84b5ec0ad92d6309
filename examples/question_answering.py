"""FusedTrainer teaches a small BERT to answer questions about a line of Python: what does it define, and what is its
last argument? Answers are where in the line they are.

Lion, whose state is one number for each weight, in 8 bits here.

python examples/question_answering.py [--steps N]
"""

import argparse
import random
import re
from pathlib import Path

import torch
from transformers import BertConfig, BertForQuestionAnswering, TrainingArguments

from fusedopt.integrations.transformers import FusedTrainer

LENGTH = 64
NAME, ARGUMENT = 1, 2  # questions, as characters that no line has


def load() -> tuple[list[dict], list[dict]]:
    """Definitions in Python's library that fit, each with one of the questions."""
    rows = []
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        for line in path.read_text(errors="replace").splitlines():
            found = re.fullmatch(r"\s*(?:async )?def (\w+)\((?:.*, ?)?(\w+)(?:=[^,()]*)?\):", line)
            if found and line.isascii() and len(line) < LENGTH:
                question = NAME if len(rows) % 2 else ARGUMENT
                start, end = (torch.tensor(place) for place in found.span(1 if question == NAME else 2))
                ids = torch.zeros(LENGTH, dtype=torch.long)
                ids[: len(line) + 1] = torch.tensor([question, *line.encode()])
                rows.append(
                    {"input_ids": ids, "attention_mask": ids > 0, "start_positions": start + 1, "end_positions": end}
                )
    random.Random(0).shuffle(rows)
    return rows[256:], rows[:256]


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
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForQuestionAnswering(config)
    args = TrainingArguments(
        "out/question_answering",
        optim="lion_8bit",
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = FusedTrainer(model, args, train_dataset=train, optimizer_options={"betas": (0.9, 0.99)})
    trainer.train()

    model.eval()
    batch = {key: torch.stack([row[key] for row in held_out]) for key in held_out[0]}
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    starts, ends = found.start_logits.argmax(-1), found.end_logits.argmax(-1)
    right = ((starts == batch["start_positions"]) & (ends == batch["end_positions"])).float().mean()
    made = trainer.optimizer.optimizer
    print(f"{type(made).__name__}, betas {made.defaults['betas']}, {made.defaults['state_dtype']} state")
    print(f"{right:.1%} of 256 questions are answered")


if __name__ == "__main__":
    main()
