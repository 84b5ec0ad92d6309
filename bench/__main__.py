"""`python -m bench`: measures, prints tables, writes JSON and a chart."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import chart, machine
from .contenders import BASELINE, HYPER, OURS
from .harness import Settings, measure
from .workloads import DTYPES, WORKLOADS


def _at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return whole_number


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times optimizer steps against torch.optim.AdamW(fused=True) and other packages.",
        epilog="; ".join(f"{w.name}: {w.title}, {w.numel:,} parameters" for w in WORKLOADS.values()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="what to step")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="of parameters and gradients"
    )
    parser.add_argument("--rounds", type=_at_least(1), default=defaults.rounds, help="timed steps of each contender")
    parser.add_argument("--warmup", type=_at_least(0), default=defaults.warmup, help="rounds before those")
    parser.add_argument(
        "--processes", type=_at_least(1), default=defaults.processes, help="fresh processes to take the median over"
    )
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=defaults.peers, help="measure other packages too"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts of the names of contenders to measure; default: all",
    )
    parser.add_argument(
        "--first-step-limit",
        type=float,
        default=defaults.first_step_limit,
        metavar="SECONDS",
        help="longest first step of a peer, since some compile; 0 is no limit",
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON and the chart")
    parser.add_argument("--name", default="bench", help="their file name")
    return parser.parse_args()


def table(case: dict[str, Any]) -> Table:
    """A measured case, for a terminal."""
    baseline = case["rows"][0]
    result = Table(
        title=f"{case['workload']}: {case['title']}, {case['parameters']:,} parameters, {case['dtype']}",
        caption=f"copy: {baseline['copy_gb_per_s']:.1f} GB/s; ratios are to the {BASELINE.name} of the same rounds",
        title_justify="left",
        caption_justify="left",
    )
    result.add_column("step", no_wrap=True)
    headings = (
        "ratio",
        "ms",
        "quartiles",
        "ns/param",
        "GB/s",
        "of copy",
        "B/param\nmoved",
        "B/param\nstate",
        "first\nstep s",
    )
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in case["rows"]:
        low, high = row["ms_quartiles"]
        result.add_row(
            row["name"],
            f"{row['ratio']:.2f}",
            _short(row["ms"]),
            f"{_short(low)} - {_short(high)}",
            _short(row["ns_per_parameter"]),
            f"{row['gb_per_s']:.1f}",
            f"{row['fraction_of_copy']:.0%}",
            f"{row['moved_bytes_per_parameter']:.1f}",
            f"{row['state_bytes_per_parameter']:.1f}",
            _short(row["first_step_s"]),
            style="bold" if row["family"] == OURS else None,
        )
    return result


def _short(value: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _print(console: Console, case: dict[str, Any]) -> None:
    console.print(table(case))
    for entry in case["unavailable"]:
        line = f"  unavailable: {entry['name']}: {entry['reason']}"
        console.print(line, style="dim", highlight=False, markup=False)
    busy = case["cores_busy_elsewhere"]
    if busy is not None and busy > machine.QUIET_CORES:
        line = f"  other programs used {busy:.1f} cores meanwhile; measure again on a quiet machine"
        console.print(line, style="yellow", highlight=False)


def main() -> None:
    """Runs the command line."""
    arguments = _arguments()
    settings = Settings(
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        processes=arguments.processes,
        peers=arguments.peers,
        first_step_limit=arguments.first_step_limit,
        only=tuple(arguments.only),
    )
    console = Console()
    if not console.is_terminal:  # a log: wide enough for the tables
        console = Console(width=130)
    results: dict[str, Any] = {"machine": machine.describe(), "settings": asdict(settings), "hyper": HYPER, "cases": []}
    console.print(
        ", ".join(f"{key} {value}" for key, value in results["machine"].items()), style="dim", highlight=False
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    written = arguments.out / f"{arguments.name}.json"
    for workload in arguments.workloads:
        for dtype in arguments.dtypes:
            case = measure(workload, dtype, settings)
            _print(console, case)
            results["cases"].append(case)
            # After every case, because a run takes long and what has been measured should be kept.
            written.write_text(json.dumps(results, indent=1) + "\n")
    picture = arguments.out / f"{arguments.name}.png"
    chart.draw(results, picture)
    console.print(f"wrote {written} and {picture}", highlight=False)


if __name__ == "__main__":
    main()
