"""Draws what a step on the host does while a backward pass goes on: `python -m bench.timeline PNG`.

The device is pretended: its memory is the host's, and copies are done at once by the thread that asks for them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import fusedopt
from fusedopt.offload import runtime
from fusedopt.offload.host import Span

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, Config, batches, load_text

_CONFIG = Config(steps=4, batch=1, context=128, width=384, depth=6, heads=6)
_LANES = ("backward pass", "copy in", "step")
_COLOURS = ("#8c959f", "#c4cad1", "#0a7ea4")
_INK, _FAINT = "#1f2328", "#656d76"


class _Pretended:
    """What of fusedopt.offload.runtime.Runtime a step on the host asks for; all tensors but pinned ones are on it."""

    name = "pretended"

    def __init__(self) -> None:
        self._pinned: list[Tensor] = []

    def is_host(self, tensor: Tensor) -> bool:
        where = tensor.data_ptr()
        return any(slab.data_ptr() <= where < slab.data_ptr() + slab.numel() for slab in self._pinned)

    def owns(self, tensor: Tensor) -> bool:
        return not self.is_host(tensor)

    def device_of(self, tensor: Tensor) -> torch.device:
        return tensor.device

    def pinned(self, size: int) -> Tensor:
        self._pinned.append(torch.zeros(size, dtype=torch.uint8))
        return self._pinned[-1]

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        target.copy_(source)

    def is_capturing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None  # streams and events, which order nothing that is done at once


def trace() -> list[Span]:
    """The spans of a step, after others that make states."""
    runtime.RUNTIMES[:] = [_Pretended()]  # type: ignore[list-item]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT(_CONFIG)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-4, state_dtype="8bit", step_device="cpu", host_threads=1)
    fusedopt.release_gradients(optimizer)
    spans: list[Span] = []
    for x, y in batches(load_text()[0], _CONFIG):
        loss = model.loss(x, y)
        spans = optimizer._on_host()[0].trace = []
        begin = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        spans.append(Span(_LANES[0], begin, end))
    return spans


def draw(spans: list[Span], path: Path) -> None:
    """A lane for each kind of span."""
    start = min(span.begin for span in spans)
    figure = Figure(figsize=(7.5, 1.9), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.14, 0.27, 0.83, 0.6))
    for lane, (what, colour) in enumerate(zip(_LANES, _COLOURS)):
        bars = [(1e3 * (s.begin - start), 1e3 * (s.end - s.begin)) for s in spans if s.what == what]
        axes.broken_barh(bars, (lane - 0.3, 0.6), facecolors=colour)
    axes.set_yticks(range(len(_LANES)), ["backward pass", "waits for\ngradients", "steps on\nthe host"], color=_INK)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds", color=_FAINT, fontsize=8)
    axes.set_title("One step with step_device='cpu' and released gradients", loc="left", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    draw(trace(), Path(sys.argv[1]))
