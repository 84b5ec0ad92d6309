"""FusedTrainer teaches a small BERT to find answers: which number does this name of HTML have, in that list?

Lion, whose state is one number for each weight, in 8 bits here.

python examples/question_answering.py [--steps N]
"""

import argparse
import html.entities
import random

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForQuestionAnswering, TrainingArguments

from fusedopt.integrations.transformers import FusedTrainer

NAMES = sorted(html.entities.name2codepoint)[:120]
ENTRIES = 4
QUESTION, SEPARATOR, FIRST = 0, 1, 2


class Lists(Dataset):
    """A name that is asked for, and a list of names and numbers, all as numbers of words; the answer is in the list."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        draw = random.Random(self.seed + i)
        names = draw.sample(range(len(NAMES)), ENTRIES)
        asked = draw.randrange(ENTRIES)
        entries = [word for name in names for word in (FIRST + name, FIRST + len(NAMES) + name)]
        words = [QUESTION, FIRST + names[asked], SEPARATOR, *entries]
        answer = torch.tensor(words.index(FIRST + len(NAMES) + names[asked]))
        return {"input_ids": torch.tensor(words), "start_positions": answer, "end_positions": answer}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=FIRST + 2 * len(NAMES),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=3 + 2 * ENTRIES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForQuestionAnswering(config)
    args = TrainingArguments(
        "out/question_answering",
        optim="lion_8bit",
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=3e-4,
        weight_decay=0.1,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = FusedTrainer(model, args, train_dataset=Lists(64 * steps, 0), optimizer_options={"betas": (0.9, 0.99)})
    trainer.train()

    model.eval()
    questions = Lists(256, 1_000_000)
    rows = [questions[i] for i in range(len(questions))]
    with torch.no_grad():
        found = model(input_ids=torch.stack([row["input_ids"] for row in rows])).start_logits.argmax(-1)
    right = float((found == torch.stack([row["start_positions"] for row in rows])).float().mean())
    made = trainer.optimizer.optimizer
    print(f"{type(made).__name__}, betas {made.defaults['betas']}, {made.defaults['state_dtype']} state")
    print(f"{right:.1%} of 256 questions are answered")


if __name__ == "__main__":
    main()
