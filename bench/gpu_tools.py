"""What other programs say of the kernels here: `fusedopt check`, and Nsight Compute on two of them.

    python -m bench.gpu_tools check
    python -m bench.gpu_tools ncu

Exit status 77 means that the program is not there; the last line of the output then says why.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu_record import ABSENT, Results, tail

KEPT_CHARACTERS = 200_000  # of what `fusedopt check` reports
# The kernels: what is stepped, and with what state.
PROFILED = {"AdamW, float32": ("float32", None), "AdamW, bfloat16, 8-bit state": ("bfloat16", "8bit")}
KEPT_METRICS = re.compile(
    r"(dram__throughput|sm__throughput|issue_stalled.*per_issue_active|gpu__time_duration\.sum|dram__bytes\.sum"
    r"|registers_per_thread$|warps_active\.avg\.pct|inst_executed\.sum$|issue_active\.avg\.pct)"
)


def check() -> int:
    """Runs `fusedopt check --json`, if this version has it."""
    spec = importlib.util.find_spec("fusedopt")  # which imports nothing, as looking for what is inside would
    folder = Path(spec.origin).with_name("cli") if spec is not None and spec.origin is not None else Path(os.devnull)
    if not any((folder / name).exists() for name in ("__main__.py", "check.py")):
        print("this version has no `fusedopt check`")
        return ABSENT
    run = ["-m", "fusedopt.cli"] if (folder / "__main__.py").exists() else ["-c", "import fusedopt.cli as c; c.main()"]
    command = [sys.executable, *run, "check", "--json"]
    if os.environ.get("FUSEDOPT_GPU_DRY") == "1":
        command += ["--rules", "adamw"]  # all of them take a while, and there is nothing of a GPU to find out
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-KEPT_CHARACTERS:], done.stderr[-KEPT_CHARACTERS:], sep="\n")
    for pattern in (r"No such command.*", r"the fusedopt command needs.*"):
        if (found := re.search(pattern, done.stderr)) is not None:
            print(found.group())
            return ABSENT
    found = parsed(done.stdout)
    Results.of_environment().add("check", status=done.returncode, report=found, said=tail(done.stderr))
    return done.returncode


def parsed(text: str) -> Any:
    """The JSON of an output: all of it, or that of each line; the text itself if there is none."""
    text = text[-KEPT_CHARACTERS:]
    try:
        return json.loads(text)
    except ValueError:
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found or text


def ncu() -> int:
    """Profiles a step of each of two kernels: stall reasons, and the share of the memory's bandwidth."""
    program = shutil.which("ncu")
    if program is None:
        print("ncu is not on the PATH")
        return ABSENT
    # The clocks are as they are: measurements of other stages were taken with them.
    options = ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name", "regex:step", "--csv"]
    options += ["--page", "raw", "--print-units", "base", "--launch-count", str(len(PROFILED))]
    for section in ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"):
        options += ["--section", section]
    results, failed = Results.of_environment(), 0
    for name, (dtype, state) in PROFILED.items():
        command = [program, *options, sys.executable, "-m", "bench.gpu_tools", "step", dtype, state or ""]
        done = subprocess.run(command, capture_output=True, text=True)
        kernels = metrics_of(done.stdout)
        print(name, done.stdout[-20_000:], done.stderr[-5_000:], sep="\n", flush=True)
        if not kernels:
            failed = 1
            results.add("ncu", kernel=name, error=tail(done.stdout + done.stderr, 20))
        for found in kernels:
            results.add("ncu", kernel=name, **found)
    return failed


def metrics_of(output: str) -> list[dict[str, Any]]:
    """What the raw page says of each kernel, as CSV: a line of names, one of units, and one for each launch."""
    lines = output.splitlines()
    first = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    names, units, *rows = csv.reader(lines[first:])
    found = []
    for row in rows:
        values = dict(zip(names, row))
        if len(row) != len(names):
            continue
        metrics = {
            f"{name} ({unit})" if unit else name: _number(values[name])
            for name, unit in zip(names, units)
            if KEPT_METRICS.search(name)
        }
        found.append({"function": values.get("Kernel Name", ""), "metrics": metrics})
    return found


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def step(dtype: str, state: str) -> int:
    """What is profiled: the second step of four matrices of 4096 x 4096."""
    import torch

    from fusedopt import AdamW

    shape = (4096, 4096)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=getattr(torch, dtype))) for _ in range(4)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = AdamW(params, lr=1e-4, backend="cuda", **({"state_dtype": state} if state else {}))
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    return 0


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    sys.exit({"check": check, "ncu": ncu, "step": step}[what](*given))
