"""Pictures of trainings, with matplotlib: axes in one style, curves, and SVG that is the same for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1f5fd0", "#e8590c", "#12936f", "#8f3fb5", "#b08900", "#0b8fa8", "#c92a2a", "#5c6470")
_POINTS = 600  # of a curve: more than a picture has columns


def axes(ax: Axes | None = None) -> Axes:
    """Axes to draw into. Raises an ImportError that says what to install."""
    checks.installed("matplotlib", "a picture")
    from matplotlib.figure import Figure

    # Not pyplot's: those are kept until they are closed, and ask for a display.
    return Figure(figsize=(7.5, 4.0), layout="constrained").subplots() if ax is None else ax


def finish(ax: Axes, x: str, y: str) -> Axes:
    """Labels, grid and legend."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        # Below, because a curve may pass anywhere inside.
        columns = 3 if max(map(len, labels)) < 24 else 2
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        ax.legend(handles, labels, ncols=columns, fontsize="small", frameon=False, **place)
    return ax


def curves(series: Mapping[str, Sequence[Sequence[tuple[int, float]]]], y: str, *, window: float = 0.02) -> Axes:
    """Curves over steps, a colour for each name; those of one name, such as seeds, are thin, and their mean thick.

    Args:
        series: By name: for each training its (step, value).
        y: What the values are, with the unit.
        window: Part of the steps over which each curve is averaged.
    """
    ax = axes()
    for i, (name, runs) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        smooth = [_averaged(run, window) for run in runs if run]
        for run in smooth if len(smooth) > 1 else ():
            ax.plot(*zip(*_thinned(run)), color=colour, linewidth=0.8, alpha=0.45)
        if smooth:
            mean = [(steps[0][0], sum(v for _, v in steps) / len(steps)) for steps in zip(*smooth)]
            ax.plot(*zip(*_thinned(mean)), color=colour, linewidth=2, label=name)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    keep_in_view(ax, [value for runs in series.values() for run in runs for _, value in run])
    return finish(ax, "step", y)


def keep_in_view(ax: Axes, values: Sequence[float]) -> None:
    """Cuts the upper end of an axis off if a few values are so high that the others would be one line."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if len(ordered) < 2:
        return
    low, most, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))], ordered[-1]
    if high - low > 20 * (most - low) > 0:
        ax.set_ylim(low - 0.05 * (most - low), low + 1.5 * (most - low))
        text: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": "small", "color": "#5a626c"}
        ax.text(1.0, 1.01, f"cut off above; the highest is {high:.3g}", transform=ax.transAxes, **text)


def log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with few ticks, however short it is."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    ax.set_xscale("log")
    if high / low >= 100:
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.xaxis.set_minor_formatter(NullFormatter())
        return
    ticks = [low, (low * high) ** 0.5, high]
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])


def svg(ax: Axes, title: str) -> str:
    """The figure of axes as an SVG element that stands in a page, the same for the same numbers."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fusedopt"}):
        ax.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Title": title})  # type: ignore[union-attr]
    text = out.getvalue()
    return text[text.index("<svg") :]


def _averaged(run: Sequence[tuple[int, float]], window: float) -> list[tuple[int, float]]:
    """Means over a window that ends at each point."""
    width = max(1, round(window * len(run)))
    total, result = 0.0, []
    for i, (step, value) in enumerate(run):
        total += value - (run[i - width][1] if i >= width else 0.0)
        result.append((step, total / min(i + 1, width)))
    return result


def _thinned(run: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    every = -(-len(run) // _POINTS)
    return [*run[::every], *(run[-1:] if (len(run) - 1) % every else [])]
