"""Runs as pictures and pages: PNG, and HTML in one file that asks nothing of a network."""

from __future__ import annotations

import html
import io
import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import checks
from .anomalies import Anomaly
from .monitor_runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn, from top to bottom: a label, the numbers, whether the axis is logarithmic if they are far apart.
_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss", ("loss",), True),
    ("learning rate", ("lr",), False),
    ("norm of the gradient", ("grad_norm",), True),
    ("norm of the update", ("update_norm",), True),
    ("update / weights (norms)", ("update_ratio",), True),
    ("loss scale", ("scale",), True),
    ("tokens per second", ("tokens_per_second",), False),
)
_COLORS = {"non_finite": "#a50f15", "divergence": "#a50f15", "loss_spike": "#d7301f", "update_spike": "#e08214"}
_OTHER = "#8073ac"
_LINE = "#2166ac"
_POINTS = 2_000


def figure(run: Run) -> Figure:
    """Draws what was recorded, step by step, with the anomalies marked.

    Args:
        run: At least one record.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing was recorded.
    """
    checks.installed("matplotlib", "drawing a run")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(label, names, is_log) for label, names, is_log in _PANELS if any(run.series(name)[0] for name in names)]
    if not panels:
        raise ValueError("nothing was recorded in this run yet, so there is nothing to draw; wait for its first step")
    drawn = Figure(figsize=(9.0, 0.6 + 1.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(drawn)
    rows = drawn.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    shown: dict[str, Any] = {}
    for ax, (label, names, is_log) in zip(rows, panels):
        for name in names:
            _line(ax, *run.series(name), is_log)
        _style(ax, label)
        for anomaly in run.anomalies:
            color = _COLORS.get(anomaly.kind, _OTHER)
            shown[anomaly.kind] = ax.axvline(anomaly.step, color=color, linewidth=1.0, alpha=0.8, linestyle="--")
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.set_major_formatter("{x:,.0f}")
    if shown:
        drawn.legend(
            list(shown.values()), [kind.replace("_", " ") for kind in shown],
            loc="outside upper center", ncols=min(4, len(shown)), frameon=False, fontsize=9,
        )  # fmt: skip
    return drawn


def _line(ax: Axes, steps: Sequence[int], values: Sequence[float], is_log: bool) -> None:
    at, y = np.asarray(steps), np.asarray(values, np.float64)
    if len(at) > _POINTS:
        # Of each column of pixels the least and the largest, so that no spike is lost.
        kept: set[int] = set()
        for part in np.array_split(np.arange(len(at)), _POINTS // 2):
            finite = part[np.isfinite(y[part])]
            kept.update(
                (part[0], part[-1]) if len(finite) == 0 else (finite[y[finite].argmin()], finite[y[finite].argmax()])
            )
        chosen = np.array(sorted(kept))
        at, y = at[chosen], y[chosen]
    positive = y[np.isfinite(y)]
    if is_log and len(positive) and positive.min() > 0 and positive.max() > 10 * positive.min():
        ax.set_yscale("log")
    y = np.where(np.isfinite(y), y, np.nan)
    marker = "o" if np.isfinite(y).sum() <= 60 else ""
    finite = np.isfinite(y)
    # Numbers of every tenth step are joined all the same.
    ax.plot(at[finite], y[finite], color=_LINE, linewidth=1.3, marker=marker, markersize=3)


def _style(ax: Axes, label: str) -> None:
    ax.set_title(label, loc="left", fontsize=10, pad=4)
    ax.grid(True, alpha=0.3)
    ax.margins(x=0.01)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def save_png(run: Run, path: str | os.PathLike[str]) -> None:
    """Writes `figure` as a PNG."""
    figure(run).savefig(Path(path), format="png", dpi=150)


def svg(run: Run) -> str:
    """`figure` as an SVG element, with text as text, for a page."""
    checks.installed("matplotlib", "drawing a run")
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusedopt", "font.family": "sans-serif"}):
        written = io.StringIO()
        figure(run).savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


# ---- a page ------------------------------------------------------------------------------------------

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { border-bottom: 1px solid #bbb; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } .none { color: #666; }
"""


def save_html(run: Run, path: str | os.PathLike[str], title: str = "Training run") -> None:
    """Writes a page that holds everything in itself: facts, curves and anomalies.

    Args:
        run: At least one record.
        path: The file.
        title: Heading of the page.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing was recorded.
    """
    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td class='number'>{html.escape(value)}</td></tr>"
        for name, value in summary(run)
    )
    Path(path).write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_CSS}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<table>{facts}</table>\n"
        f"<h2>Anomalies</h2>\n{_anomaly_table(run.anomalies)}\n<h2>Curves</h2>\n{svg(run)}\n</body></html>\n",
        encoding="utf-8",
    )


def _anomaly_table(found: Sequence[Anomaly]) -> str:
    if not found:
        return "<p class='none'>None were found.</p>"
    rows = "".join(
        f"<tr><td class='number'>{each.step:,}</td><td>{html.escape(each.kind.replace('_', ' '))}</td>"
        f"<td>{html.escape(each.message)}</td></tr>"
        for each in found
    )
    return f"<table><tr><th>step</th><th>kind</th><th>what was found</th></tr>{rows}</table>"


def summary(run: Run) -> list[tuple[str, str]]:
    """What is known of a run, as (name, value with its unit)."""
    rows: list[tuple[str, str]] = []
    if "started" in run.header:
        began = datetime.fromtimestamp(run.header["started"], timezone.utc)
        rows.append(("started", f"{began:%Y-%m-%d %H:%M:%S} UTC"))
    for name in ("optimizer", "fingerprint"):
        if name in run.header:
            rows.append((name if name == "optimizer" else "recipe", str(run.header[name])))
    if run.resumes:
        rows.append(("resumed", f"{run.resumes} times"))
    state = "ended" if run.ended else "not ended"
    rows.append(("steps", f"{run.records[-1]['step'] if run.records else 0:,} ({state})"))
    for name in run.names():
        value = run.series(name)[1][-1]
        unit = {"seconds_per_step": " s", "tokens_per_second": " tokens/s"}.get(name, "")
        rows.append((labels.get(name, name.replace("_", " ")), f"{_shown(value)}{unit}"))
    rows.append(("anomalies", f"{len(run.anomalies):,}"))
    return rows


labels = {
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "update_norm": "norm of the update",
    "update_ratio": "update / weights (norms)",
    "scale": "loss scale",
    "seconds_per_step": "time of a step",
    "tokens_per_second": "speed",
    "tokens": "tokens in a step",
}


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:,.4g}"
