"""Lightning: configure_optimizers, the command line, mixed precision with clipping, accumulation, checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from torch import nn
from trainers import same

import fusedopt
from fusedopt.integrations.lightning import FusedCallback
from fusedopt.schedules import Cosine

lightning = peer("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning about its own data loaders and devices

STEPS = 8
LR = 1e-2
SCHEDULE = Cosine(2, STEPS)


class Module(lightning.LightningModule):
    """Two layers, whose optimizer is what a run needs."""

    def __init__(self, dtype: torch.dtype = torch.float32, make: Any = fusedopt.AdamW, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 8)).to(dtype)
        self.make, self.options, self.lrs, self.inputs = make, options, [], dtype

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        loss = self.net(batch.to(self.inputs)).float().square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make(self.parameters(), lr=LR, **self.options)
        scheduler = fusedopt.get_scheduler(SCHEDULE, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(count: int = 4 * STEPS) -> torch.utils.data.DataLoader:
    data = torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(list(data), batch_size=4)


def make_trainer(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": lightning.loggers.CSVLogger(folder),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**settings, **changes})


def fit(folder: Path, module: Any, data: Any = None, ckpt_path: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(folder, **changes)
    lightning.seed_everything(5, verbose=False)
    trainer.fit(
        module, loader() if data is None else data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
    )
    return trainer


def test_ours_steps_with_the_expected_lr(tmp_path: Path) -> None:
    module = Module(state_dtype="8bit", max_grad_norm=0.1)
    trainer = fit(tmp_path, module)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is fusedopt.AdamW
    assert module.lrs == [LR * SCHEDULE(step) for step in range(STEPS)]
    twin = Module(state_dtype="8bit", max_grad_norm=0.1).train()
    made = twin.configure_optimizers()
    lightning.seed_everything(5, verbose=False)
    for batch in loader():
        twin.net(batch).square().mean().backward()
        made["optimizer"].step()
        made["optimizer"].zero_grad()
        made["lr_scheduler"]["scheduler"].step()
    assert same(module, twin)


def plugins(precision: str) -> dict[str, Any]:
    if precision != "16-mixed":
        return {"precision": precision}
    # On a CPU the Trainer takes bfloat16 instead of float16 unless it is given the plugin.
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    return {"plugins": [lightning.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("clips", ["trainer", "step"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_with_clipping(precision: str, clips: str, tmp_path: Path) -> None:
    """Clipped by the Trainer before the step or by the step itself, which also unscales, and as with torch's AdamW."""
    limit = 0.02
    by_trainer = {"gradient_clip_val": limit}
    if clips == "trainer":
        module = Module()
        fit(tmp_path, module, **plugins(precision), **by_trainer)
    else:
        module = Module(max_grad_norm=limit)
        trainer = fit(tmp_path, module, **plugins(precision))
        assert trainer.optimizers[0].last_grad_norm > limit
    theirs = Module(make=torch.optim.AdamW)
    fit(tmp_path, theirs, **plugins(precision), **by_trainer)
    start = Module()
    for mine, other, first in zip(module.parameters(), theirs.parameters(), start.parameters(), strict=True):
        # torch rounds steps in another order, and a weight that is rounded to the next bfloat16 changes by 2**-8.
        assert (mine - other).abs().max() <= 2**-8 * (other - first).abs().max()


def test_accumulation(tmp_path: Path) -> None:
    """Half the batch size, twice the batches: the same number of steps, and the lr of each."""
    module = Module()
    module.net[2].p = 0.0
    fit(tmp_path, module, loader(8 * STEPS), accumulate_grad_batches=2)
    twin = Module()
    twin.net[2].p = 0.0
    data = torch.utils.data.DataLoader(loader(8 * STEPS).dataset, batch_size=8)
    fit(tmp_path, twin, data)
    assert module.lrs[::2] == twin.lrs
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        # Means of 8 and of two times 4 are rounded differently, and AdamW divides by their size.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


FORMS: dict[str, dict[str, Any]] = {
    "8bit": {"state_dtype": "8bit", "max_grad_norm": 0.1},
    "split24": {"state_dtype": "8bit", "master_weights": "split24", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("form", FORMS)
def test_resuming_is_never_having_stopped(form: str, tmp_path: Path) -> None:
    def run(**changes: Any) -> Any:
        module = Module(**FORMS[form])
        module.net[2].p = 0.0  # Lightning does not save the state of random generators
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
        # An epoch each: within one, Lightning begins its data anew when it resumes.
        fit(
            tmp_path,
            module,
            loader(2 * STEPS),
            enable_checkpointing=True,
            callbacks=[saver, FusedCallback()],
            **changes,
        )
        return module

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"step={STEPS // 2}.ckpt")
    assert resumed.lrs == whole.lrs[STEPS // 2 :]
    assert same(whole, resumed)
    saved = torch.load(tmp_path / f"step={STEPS // 2}.ckpt", weights_only=True)
    assert (saved["callbacks"]["FusedCallback"]["average"] is None) == ("max_grad_norm" not in FORMS[form])


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


class Plain(Module):
    """Leaves its optimizer to the command line."""

    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = lightning.LightningModule.configure_optimizers


def test_the_command_line_takes_a_class_by_its_path(tmp_path: Path) -> None:
    peer("jsonargparse")
    cli = peer("lightning.pytorch.cli")
    args = ["fit", "--optimizer=fusedopt.AdamW", "--optimizer.lr=0.01", "--optimizer.state_dtype=8bit"]
    args += ["--optimizer.max_grad_norm=1.0", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    args += ["--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    made = cli.LightningCLI(Plain, Data, args=args, save_config_callback=None, seed_everything_default=False)
    (optimizer,) = made.trainer.optimizers
    assert type(optimizer) is fusedopt.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["state_dtype"]) == (0.01, "8bit")
    assert float(optimizer.last_grad_norm) > 0


def test_the_callback_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Module(state_dtype="8bit", max_grad_norm=0.1)
    norms: list[float] = []

    class Spoils(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step + 1 == 7:
                next(pl_module.parameters()).grad[0] = torch.nan

    class Norms(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            norms.append(float(trainer.optimizers[0].last_grad_norm))

    with caplog.at_level(logging.INFO, logger="fusedopt.integrations.lightning"):
        trainer = fit(tmp_path, module, callbacks=[FusedCallback(health=True), Spoils(), Norms()])
    assert f"{sum(p.numel() for p in module.parameters()):,} parameters" in caplog.text
    assert "step 7: the gradient norm was inf or NaN in 1 of the last 1 steps" in caplog.text
    rows = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","))) for row in rows[1:]]
    assert [float(row["grad_norm"]) for row in table] == pytest.approx(norms, rel=1e-6, nan_ok=True)  # as text
    assert {"grad_norm_max", "nonfinite_steps", "stalled_weights", "saturated_codes"} <= table[0].keys()
    theirs = Module(make=torch.optim.AdamW)
    with pytest.raises(TypeError, match="configure_optimizers returns AdamW, of which FusedCallback knows nothing"):
        fit(tmp_path, theirs, callbacks=[FusedCallback()])
