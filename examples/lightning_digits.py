"""Lightning trains a small convolutional network on digits, drawn in the fonts that matplotlib ships.

python examples/lightning_digits.py [--steps N]
"""

import argparse
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader

import fusedopt
from fusedopt.integrations.lightning import FusedCallback

SIZE = 28


def load(count: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Digits in all fonts that have them, moved and turned a little, with noise."""
    files = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    files = [file for file in files if file.name.startswith(("DejaVu", "STIXGeneral")) and "Display" not in file.name]
    fonts = [ImageFont.truetype(file, 20) for file in files]
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        digit = draw.randrange(10)
        image = Image.new("L", (SIZE, SIZE))
        place = (draw.uniform(5, 11), draw.uniform(0, 4))
        ImageDraw.Draw(image).text(place, str(digit), fill=255, font=draw.choice(fonts))
        pixels = np.asarray(image.rotate(draw.uniform(-15, 15)), dtype=np.float32) / 255
        pixels = pixels + noise.normal(0, 0.2, pixels.shape).astype(np.float32)
        rows.append((torch.from_numpy(pixels)[None], digit))
    return rows


class Digits(pl.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, digits = batch
        return nn.functional.cross_entropy(self.net(images), digits)

    def test_step(self, batch: Any, index: int) -> None:
        images, digits = batch
        self.log("accuracy", (self.net(images).argmax(1) == digits).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        groups = fusedopt.param_groups(self, weight_decay=0.05)
        optimizer = fusedopt.AdamW(groups, lr=2e-3, state_dtype="8bit", max_grad_norm=1.0)
        scheduler = fusedopt.get_scheduler("cosine", optimizer, self.steps // 10, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    pl.seed_everything(0, verbose=False)
    module = Digits(steps)
    callbacks = [FusedCallback()]
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", precision="bf16-mixed", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(load(64 * min(steps, 60), 0), batch_size=64, shuffle=True))
    report = trainer.optimizers[0].memory_report()
    print(f"state: {report.state_bytes / report.numel:.2f} bytes a weight, for 8 with torch's AdamW")
    accuracy = trainer.test(module, DataLoader(load(1000, 1), batch_size=250), verbose=False)[0]["accuracy"]
    print(f"{accuracy:.1%} of 1,000 digits are read")


if __name__ == "__main__":
    main()
