"""`python bench/update_norms.py`: what a step that records the norms of updates takes, against one that does not.

Both are taken in turns on W2, by the same optimizer; times are of the process, on all of its threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# The repository comes last on the path: the sources of fusedopt there have no compiled core.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench.workloads import WORKLOADS

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32, float32 state": (torch.float32, {}),
    "float32, 8-bit state": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16 with split24, 8-bit state": (torch.bfloat16, {"state_dtype": "8bit", "master_weights": "split24"}),
    "bfloat16, bfloat16 state": (torch.bfloat16, {"state_dtype": "bfloat16"}),
}


def times(dtype: torch.dtype, options: dict[str, Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of steps without norms and with them, in pairs whose order alternates."""
    optimizer = fusedopt.AdamW(WORKLOADS["W2"].params(dtype), lr=1e-3, **options)
    optimizer.step()
    found = []
    for number in range(rounds):
        took = {}
        for records in (number % 2 == 0, number % 2 == 1):
            optimizer.record_norms(records)
            begin = time.process_time()
            optimizer.step()
            took[records] = time.process_time() - begin
        found.append((took[False], took[True]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="pairs of steps for each row (default: %(default)s)")
    rounds = parser.parse_args().rounds
    table = Table("parameters, state", "plain, ms", "with norms, ms", "ratio, median of pairs", "every tenth")
    for name, (dtype, options) in CASES.items():
        pairs = times(dtype, options, rounds)
        plain, recording = (statistics.median(side) * 1e3 for side in zip(*pairs))
        ratio = statistics.median(with_norms / without for without, with_norms in pairs)
        table.add_row(name, f"{plain:.0f}", f"{recording:.0f}", f"{ratio:.3f}", f"{(ratio - 1) * 10:+.1f} %")
    Console().print(table)


if __name__ == "__main__":
    main()
