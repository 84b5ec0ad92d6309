"""TRL: SFTTrainer is a Trainer, so the same line works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import peer
from trainers import LENGTH, LR, STEPS, VOCABULARY, gpt2, logged, same

import fusedopt
from fusedopt.integrations.transformers import disable, enable, optimizer

trl = peer("trl")
datasets = peer("datasets")
peer("trl.trainer.sft_trainer")


def tokenizer() -> Any:
    """Words are numbers."""
    tokenizers = peer("tokenizers")
    words = {str(i): i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return peer("transformers").PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="0", pad_token="1", unk_token="0"
    )


def sft(folder: Path, by: str = "argument", resume: Any = None, **changes: Any) -> Any:
    text = [" ".join(str((7 * i + 3 * j) % VOCABULARY) for j in range(LENGTH - 2)) for i in range(4 * STEPS)]
    args = trl.SFTConfig(
        **{"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": LR},
        **{"logging_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_length": LENGTH},
        **{"bf16": False, "gradient_checkpointing": False, "lr_scheduler_type": "linear"},
        **{"save_strategy": "steps", "save_steps": STEPS // 2, **changes},
        optim="adamw_8bit" if by == "table" else "sgd",
    )
    settings = {"processing_class": tokenizer()}
    dataset = datasets.Dataset.from_dict({"text": text})
    if by == "table":
        made = trl.SFTTrainer(gpt2(), args, train_dataset=dataset, **settings)
    else:
        made = trl.SFTTrainer(
            gpt2(),
            args,
            train_dataset=dataset,
            optimizer_cls_and_kwargs=optimizer(args, "adamw_8bit"),
            **settings,
        )
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("by", ["argument", "table"])
def test_sft(by: str, tmp_path: Path) -> None:
    """The class, the lr of each step, a falling loss, and a resume that is never having stopped."""
    if by == "table":
        enable()
    try:
        whole = sft(tmp_path, by)
        resumed = sft(tmp_path, by, str(tmp_path / f"checkpoint-{STEPS // 2}"))
    finally:
        disable()
    made = whole.optimizer.optimizer
    assert type(made) is fusedopt.AdamW
    assert any("exp_avg_codes" in state for state in made.state.values())
    assert made.last_grad_norm > 0
    assert logged(whole, "learning_rate") == [LR * max(0.0, (STEPS - s) / STEPS) for s in range(STEPS)]
    losses = logged(whole, "loss")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert same(whole.model, resumed.model)
