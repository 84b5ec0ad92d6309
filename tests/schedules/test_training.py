"""The Trainer of transformers, Accelerate and Lightning train the demo's GPT with our schedules and log the lr."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from torch.utils.data import Dataset

import fusedopt
from fusedopt import get_scheduler
from fusedopt.schedules import Cosine, GradientNorm, Plateau, Schedule, constant, decay, warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from gpt import GPT, Config, load_text

STEPS = 20
LR = 1e-3
CONFIG = Config(steps=STEPS, batch=2, context=16, width=16, depth=1, heads=2)
SCHEDULE = (warmup(0.2) >> constant() >> decay("1-sqrt", 0.4)).resolve(STEPS)


class Windows(Dataset):
    """Windows of the demo's text."""

    def __init__(self, count: int = CONFIG.batch * STEPS) -> None:
        text = load_text()[0]
        self.windows = [text[start : start + CONFIG.context + 1] for start in range(0, 7 * count, 7)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.windows[i][:-1], "labels": self.windows[i][1:]}


class Model(torch.nn.Module):
    """The GPT, with a forward that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt = GPT(CONFIG)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.gpt.loss(x, labels)}


def make_optimizer(model: torch.nn.Module, **kwargs: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(fusedopt.param_groups(model), lr=LR, **kwargs)


def expected(schedule: Schedule) -> list[float]:
    return [LR * schedule(step) for step in range(STEPS)]


def make_trainer(folder: Path, optimizer: Any, scheduler: Any, model: Any, **kwargs: Any) -> Any:
    transformers = peer("transformers")
    peer("accelerate")
    trainer = peer("transformers.trainer")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=CONFIG.batch,
        per_device_eval_batch_size=8,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **kwargs.pop("arguments", {"save_strategy": "no"}),
    )
    return trainer.Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(),
        eval_dataset=Windows(4),
        optimizers=(optimizer, scheduler),
        **kwargs,
    )


def logged(trainer: Any) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


@pytest.mark.parametrize("guided", [SCHEDULE, Cosine(4, STEPS)], ids=["composed", "cosine"])
def test_trainer_logs_the_lr(guided: Schedule, tmp_path: Path) -> None:
    model = Model()
    optimizer = make_optimizer(model)
    trainer = make_trainer(tmp_path, optimizer, get_scheduler(guided, optimizer), model)
    trainer.train()
    assert logged(trainer) == expected(guided)


def test_trainer_resumes(tmp_path: Path) -> None:
    def run(folder: Path, schedule: Schedule, **kwargs: Any) -> list[float]:
        model = Model()
        optimizer = make_optimizer(model)
        arguments = {"save_strategy": "steps", "save_steps": 8, "save_only_model": False}
        trainer = make_trainer(folder, optimizer, get_scheduler(schedule, optimizer), model, arguments=arguments)
        trainer.train(**kwargs)
        return logged(trainer)

    assert run(tmp_path, SCHEDULE) == expected(SCHEDULE)
    # The schedule comes from the checkpoint, arguments included.
    assert run(tmp_path, Cosine(0, STEPS), resume_from_checkpoint=str(tmp_path / "checkpoint-8")) == expected(SCHEDULE)


def test_trainer_drives_a_plateau_by_its_evaluations_and_warms_it_up(tmp_path: Path) -> None:
    peer("transformers")
    model = Model()
    optimizer = make_optimizer(model)
    # Nothing is better by a thousand: every evaluation but the first is bad.
    rule = Plateau(patience=0, factor=0.5, threshold=1e3, threshold_mode="abs", metric="eval_loss")
    scheduler = get_scheduler(warmup(4) >> rule, optimizer)
    arguments = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "loss"}
    trainer = make_trainer(
        tmp_path, optimizer, scheduler, model, arguments=arguments, callbacks=[scheduler.trainer_callback()]
    )
    trainer.train()
    assert scheduler.last_epoch == STEPS
    assert logged(trainer) == [LR * s / 4 for s in range(4)] + [LR] * 6 + [LR / 2] * 5 + [LR / 4] * 5


def test_trainer_drives_a_gradient_norm_by_itself(tmp_path: Path) -> None:
    model = Model()
    optimizer = make_optimizer(model, max_grad_norm=1.0)
    scheduler = get_scheduler(warmup(4) >> GradientNorm(threshold=1.05, beta=0.5), optimizer)
    trainer = make_trainer(tmp_path, optimizer, scheduler, model, arguments={"save_strategy": "no", "max_grad_norm": 0})
    trainer.train()
    lrs = logged(trainer)
    assert lrs[:5] == [LR * s / 4 for s in range(5)]
    assert len(set(lrs[5:])) > 3
    assert min(lrs[5:]) >= 0.1 * LR


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = make_optimizer(model)
    scheduler = get_scheduler(SCHEDULE, optimizer)
    data = torch.utils.data.DataLoader(Windows(4 * STEPS), batch_size=CONFIG.batch)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)
    seen: list[float] = []
    for i, batch in enumerate(data):
        with accelerator.accumulate(model):
            if accelerator.sync_gradients:
                seen += scheduler.get_last_lr()[:1]
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if i == 20:
            accelerator.save_state(str(tmp_path))
    assert seen == expected(SCHEDULE)
    accelerator.load_state(str(tmp_path))
    # Ten updates after 21 batches of two each: the next step is number ten.
    assert scheduler.get_last_lr()[0] == expected(SCHEDULE)[10]


@pytest.mark.filterwarnings("ignore")  # of Lightning about its own data loaders and devices
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, guided: Any, monitored: bool = False) -> None:
            super().__init__()
            self.model, self.guided, self.monitored, self.lrs = Model(), guided, monitored, []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            self.lrs.append(self.optimizers().param_groups[0]["lr"])
            loss = self.model(**batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = make_optimizer(self)
            scheduler = {"scheduler": get_scheduler(self.guided, optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler | ({"monitor": "loss"} if self.monitored else {})}

    def run(module: Any) -> list[float]:
        metrics = lightning.loggers.CSVLogger(tmp_path)
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=metrics,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[lightning.callbacks.LearningRateMonitor("step")],
            enable_checkpointing=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(Windows(), batch_size=CONFIG.batch))
        trainer.save_checkpoint(tmp_path / "checkpoint")
        with open(Path(metrics.log_dir) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["lr-AdamW/pg1"]) for row in rows if row["lr-AdamW/pg1"]] == module.lrs
        return module.lrs

    assert run(Module(SCHEDULE)) == expected(SCHEDULE)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["lr_schedulers"][0]["schedules"] == [SCHEDULE.to_dict()] * 2
    # Driven by what it monitors: every loss but the first is bad.
    rule = Plateau(patience=0, factor=0.5, threshold=1e3, threshold_mode="abs")
    assert run(Module(warmup(4) >> rule, monitored=True)) == [LR * s / 4 for s in range(4)] + [
        LR / 2**i for i in range(STEPS - 4)
    ]
