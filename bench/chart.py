"""Draws a results file: time of a step as a ratio to torch's fused AdamW (`python -m bench.chart JSON PNG`)."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from .contenders import BASELINE, CONTENDERS, OURS, PEER, TORCH

_COLOURS = {OURS: "#0a7ea4", TORCH: "#8c959f", PEER: "#c4cad1"}
_FAMILY_NAMES = {OURS: "fusedopt", TORCH: "torch", PEER: "other packages"}
_INK, _FAINT, _GRID = "#1f2328", "#656d76", "#e6e9ec"

# Inches. At 900 pixels for the width of the figure, as in a README, a point is 1.4 pixels.
_WIDTH, _BAR, _HEADER, _FOOTER, _BETWEEN = 9.0, 0.235, 0.86, 0.5, 0.5
_NAMES = 2.25  # room for the names of the contenders
_LABEL = 0.42  # room for a figure beside a bar
_DPI = 200

_TITLE = "Time of an optimizer step, as a multiple of torch's fused AdamW"
_SUBTITLE = "lower is better; the line at 1 is torch.optim.AdamW(fused=True), timed in turns with the others"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: a column per workload, a row per dtype, a bar per contender.

    Bars start at 0, or, when the ratios span more than a factor of ten, at the baseline on a logarithmic
    axis: to the left is faster. A contender without a figure for one case has a dash there.
    """
    cases = {(case["dtype"], case["workload"]): case for case in results["cases"]}
    dtypes = list(dict.fromkeys(dtype for dtype, _ in cases))
    workloads = list(dict.fromkeys(workload for _, workload in cases))
    ratios = [row["ratio"] for case in cases.values() for row in case["rows"]]
    logarithmic = max(ratios) > 10 * min(ratios)

    names = {dtype: _names([case for key, case in cases.items() if key[0] == dtype]) for dtype in dtypes}
    panels = [_BAR * max(1, len(names[dtype])) for dtype in dtypes]
    height = _HEADER + sum(panels) + _BETWEEN * (len(dtypes) - 1) + _FOOTER
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    gap = 0.14
    column = (_WIDTH - _NAMES - 0.12 - gap * (len(workloads) - 1)) / len(workloads)
    top = height - _HEADER
    for dtype, panel in zip(dtypes, panels):
        for i, workload in enumerate(workloads):
            left = _NAMES + i * (column + gap)
            box = (left / _WIDTH, (top - panel) / height, column / _WIDTH, panel / height)
            axes = figure.add_axes(box)
            _limits(axes, ratios, logarithmic, column)
            _panel(axes, cases.get((dtype, workload)), names[dtype], column, show_names=i == 0)
        top -= panel + _BETWEEN

    _at(figure, 0.12, height - 0.26, _TITLE, height, size=11.5, weight="bold")
    _at(figure, 0.12, height - 0.46, _SUBTITLE, height, size=8, color=_FAINT)
    _at(figure, 0.12, 0.12, _caption(results), height, size=7, color=_FAINT)
    families = [f for f in _COLOURS if any(row["family"] == f for case in cases.values() for row in case["rows"])]
    figure.legend(
        handles=[Patch(color=_COLOURS[f], label=_FAMILY_NAMES[f]) for f in families],
        loc="upper right",
        bbox_to_anchor=(1 - 0.06 / _WIDTH, 1 - 0.1 / height),
        ncols=len(families),
        frameon=False,
        fontsize=8,
        labelcolor=_INK,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.2,
    )
    figure.savefig(path)


def _names(cases: list[dict[str, Any]]) -> list[str]:
    """Contenders measured in any of some cases, top down; the baseline is the line, not a bar."""
    measured = {row["name"] for case in cases for row in case["rows"]} - {BASELINE.name}
    order = [contender.name for contender in CONTENDERS]
    return sorted(measured, key=lambda name: order.index(name) if name in order else len(order))


def _limits(axes: Axes, ratios: list[float], logarithmic: bool, inches: float) -> None:
    """One scale for all panels, with room beside the bars for their figures."""
    if not logarithmic:
        axes.set_xlim(0, max(1.05, max(ratios)) / (1 - _LABEL / inches))
        return
    low, high = min(min(ratios), 0.5), max(max(ratios), 2.0)
    room = (high / low) ** (_LABEL / (inches - 2 * _LABEL))
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    decade = inches / math.log10(high / low * room * room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decade > 1.2 else (1,)))


def _panel(axes: Axes, case: dict[str, Any] | None, names: list[str], inches: float, *, show_names: bool) -> None:
    rows = {row["name"]: row for row in case["rows"]} if case else {}
    if case:
        title = f"{case['workload']}  {case['title']}, {case['dtype']}"
        axes.set_title(title, loc="left", pad=5, fontsize=8, fontweight="bold", color=_INK)
    logarithmic = axes.get_xscale() == "log"
    start = 1.0 if logarithmic else 0.0
    # On a linear axis a figure that would lie on the baseline moves to its right.
    covers_line = 1.0 - _LABEL / inches * axes.get_xlim()[1]
    for y, name in enumerate(names):
        if name not in rows:
            axes.annotate("-", (start, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=_FAINT)
            continue
        ratio, family = rows[name]["ratio"], rows[name]["family"]
        axes.barh(y, ratio - start, left=start, height=0.66, color=_COLOURS[family], zorder=2)
        leftwards = logarithmic and ratio < 1
        anchor = 1.0 if not logarithmic and covers_line < ratio < 1 else ratio
        axes.annotate(
            _figure(ratio),
            (anchor, y),
            (-3 if leftwards else 3, 0),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="center",
            fontsize=7.5,
            color=_COLOURS[OURS] if family == OURS else _INK,
            fontweight="bold" if family == OURS else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # over the grid's lines
        )
    axes.axvline(1.0, color=_INK, linewidth=0.9, zorder=3)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names if show_names else [], fontsize=8, color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.minorticks_off()
    axes.tick_params(length=0, pad=3)
    axes.tick_params(axis="x", labelsize=7, labelcolor=_FAINT)
    axes.grid(axis="x", color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _figure(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def _at(figure: Figure, x: float, y: float, text: str, height: float, *, size: float, **style: Any) -> None:
    """Text at a place in inches from the lower left."""
    figure.text(x / _WIDTH, y / height, text, fontsize=size, **{"color": _INK, **style})


def _caption(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    processes = f" in each of {settings['processes']} processes" if settings["processes"] > 1 else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, instruction set {machine['isa']}; torch {machine['torch']}, "
        f"fusedopt {machine['fusedopt']}; medians of {settings['rounds']} steps{processes}; {machine['date']}"
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
