"""Pictures of schedules: with matplotlib, and with characters for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import checks
from .elementary import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Drawable(Protocol):
    """What a picture asks of a schedule."""

    @property
    def name(self) -> str:
        """What the legend calls it."""

    @property
    def length(self) -> int | None:
        """Steps until it ends; None if it has no end."""

    def __call__(self, step: Any, base_lr: float | None = None) -> Any:
        """The multipliers of an array of steps."""


_POINTS = 2_000  # more than a picture has columns
_STYLES = ("-", "--", "-.", ":")
_ENDLESS = 1_000  # steps drawn of a schedule that has no end


def plot(
    schedules: Sequence[Drawable],
    *,
    steps: int | None = None,
    base_lr: float | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws schedules into one picture.

    Args:
        schedules: What to draw.
        steps: How many, from 0; the longest schedule's own length by default, 1,000 if it has none.
        base_lr: The lr that is multiplied; without it the multiplier is drawn.
        labels: A name for each; those of the schedules by default.
        ax: Axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The lr is negative or not finite, or there is no step to draw.
    """
    checks.installed("matplotlib", "plotting a schedule")
    import matplotlib.pyplot as plt

    last = _last(schedules, steps)
    if ax is None:
        ax = plt.subplots(figsize=(7.0, 3.6 + 0.2 * len(schedules)), layout="constrained")[1]
    at = np.unique(np.linspace(0, last, _POINTS).astype(np.int64))
    names = [schedule.name for schedule in schedules] if labels is None else labels
    for i, (schedule, name) in enumerate(zip(schedules, names)):
        # Dashed, so that a curve under another one can be seen.
        ax.plot(at, _values(schedule, at, base_lr), label=name, linewidth=1.8, linestyle=_STYLES[i % len(_STYLES)])
    ax.set_xlabel("step")
    ax.set_ylabel("multiplier of the lr" if base_lr is None else "learning rate")
    ax.set_xlim(0, max(1, last))
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(True, alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if len(schedules) == 1:
        ax.set_title(names[0], fontsize="medium")
    else:
        # Below the axes, because some schedule would pass under it anywhere inside.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small", frameon=False)
    return ax


def save(axes: Axes, path: str | Path) -> None:
    """Writes the picture that axes belong to, at 150 dots per inch."""
    kind = Path(path).suffix.removeprefix(".") or "png"  # matplotlib would write curve.png for curve
    axes.figure.savefig(path, dpi=150, format=kind)  # type: ignore[union-attr]  # of a SubFigure, which we do not make


def sketch(
    schedule: Drawable, *, steps: int | None = None, base_lr: float | None = None, width: int = 72, height: int = 12
) -> str:
    """Draws a schedule with characters.

    Args:
        schedule: What to draw.
        steps: How many, from 0; the schedule's own length by default, 1,000 if it has none.
        base_lr: The lr that is multiplied; without it the multiplier is drawn.
        width: Characters in a line.
        height: Lines of the drawing itself.

    Returns:
        Lines to print, of block characters: the smallest visible difference is an eighth of a line.

    Raises:
        ValueError: It would be too small to read, the lr is negative or not finite, or there is no step to draw.
    """
    if checks.whole("width", width) < 30 or checks.whole("height", height) < 3:
        raise ValueError(f"width={width!r} and height={height!r} leave nothing to see; pass at least 30 and 3")
    last = _last([schedule], steps)
    # Every number on the axis is written as in a table, so that the columns under each other mean the same.
    top = float(_values(schedule, np.arange(last + 1), base_lr).max()) or 1.0
    ticks = {0: f"{top:.3g}", height - 1: "0"}
    if height % 2:
        ticks[height // 2] = f"{top / 2:.3g}"
    margin = max(map(len, ticks.values()))
    columns = width - margin - 2
    at = np.linspace(0, last, columns).round().astype(np.int64)
    eighths = np.round(_values(schedule, at, base_lr) / top * height * 8).astype(int)
    lines = []
    for row in range(height):
        filled = np.clip(eighths - 8 * (height - 1 - row), 0, 8)
        lines.append(f"{ticks.get(row, ''):>{margin}} ┤" + "".join(" ▁▂▃▄▅▆▇█"[n] for n in filled).rstrip())
    lines.append(" " * margin + " └" + "─" * columns)
    right = f"{last:,} steps"
    lines.append(" " * (margin + 2) + "0" + right.rjust(columns - 1))
    return "\n".join(lines)


def _last(schedules: Sequence[Drawable], steps: int | None) -> int:
    """The last step that is drawn."""
    if steps is not None:
        if checks.whole("steps", steps) == 0:
            raise ValueError("steps=0 leaves nothing to draw; pass a number of steps above 0")
        return steps
    return max(schedule.length or _ENDLESS for schedule in schedules)


def _values(schedule: Drawable, at: Any, base_lr: float | None) -> Array:
    lr = None if base_lr is None else checks.nonnegative("base_lr", base_lr)
    multiplier = schedule(at, lr)
    return multiplier if lr is None else multiplier * lr
