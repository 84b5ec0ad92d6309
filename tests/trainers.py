"""What tests of frameworks share: tiny models made from configurations, data made here, and a Trainer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cases import peer
from torch import nn
from torch.utils.data import Dataset

VOCABULARY, LENGTH, CLASSES = 64, 12, 3
STEPS = 20
LR = 1e-3


class Sentences(Dataset):
    """Random words; the class is how many of them are small."""

    def __init__(self, count: int = 4 * STEPS) -> None:
        generator = torch.Generator().manual_seed(7)
        self.words = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
        self.labels = (self.words < VOCABULARY // 2).sum(1) % CLASSES

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def bert(dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> nn.Module:
    """A BERT of one layer, the same in every call."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config).to(dtype)


def gpt2(layers: int = 2) -> nn.Module:
    """A GPT-2 of two layers, the same in every call."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=64, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder: Path, **changes: Any) -> Any:
    """TrainingArguments for STEPS steps on the CPU, which log every step and report to nobody."""
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return peer("transformers").TrainingArguments(**{**settings, **changes})


def trainer(folder: Path, model: nn.Module, args: Any = None, cls: Any = None, **changes: Any) -> Any:
    """A Trainer of those."""
    peer("accelerate")
    cls = cls or peer("transformers").Trainer
    args = arguments(folder) if args is None else args
    return cls(model=model, args=args, train_dataset=Sentences(), eval_dataset=Sentences(8), **changes)


def logged(made: Any, key: str) -> list[float]:
    """What a Trainer logged under a key, step by step."""
    return [row[key] for row in made.state.log_history if key in row and "loss" in row]


def weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters."""
    return [param.detach().clone() for param in model.parameters()]


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether all parameters have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
