"""Times optimizer steps on a GPU against torch's and copying memory, in turns; prints a table and writes JSON.

    python bench/gpu.py --out out/gpu

Needs no packages beside torch. FUSEDOPT_GPU_DRY=1 runs it on the CPU with tiny tensors and kernels compiled for the CPU
(FUSEDOPT_EMULATED says where they are), to see that it works; its figures then mean nothing, and none are written.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The installed package comes before the sources, which have no compiled core.
sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "bench")]
sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch.nn import Parameter  # noqa: E402
from torch.optim import Optimizer  # noqa: E402

from bench.gpu_cases import CASES, MAX_GRAD_NORM, Case, Contender  # noqa: E402
from fusedopt.backends.info import info  # noqa: E402

DRY = os.environ.get("FUSEDOPT_GPU_DRY", "0") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
COPY = "copy"
COPY_BYTES = 2**16 if DRY else 2**30
# Device clock cycles before a timed step, about a millisecond: launches then wait for the device and not the other way
# round, as after a backward pass. The time that the host takes is reported beside it.
AHEAD = 2_000_000
STEPS_OF_A_ROUND = 2 if DRY else 20  # timed by the wall clock


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def params_of(case: Case) -> list[Parameter]:
    """Parameters, and gradients with a global norm of one half, which is below the norm that is clipped to."""
    shapes = case.tiny if DRY else case.shapes
    generator = torch.Generator(DEVICE).manual_seed(0)
    std = 0.5 / math.sqrt(sum(math.prod(shape) for shape in shapes))

    def numbers(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=case.dtype).mul_(scale)

    params = []
    for shape in shapes:
        param = Parameter(numbers(shape, 0.02))
        param.grad = numbers(shape, std)
        params.append(param)
    return params


def step_of(contender: Contender, optimizer: Optimizer, params: list[Parameter]) -> Callable[[], object]:
    if not contender.clips:
        return optimizer.step

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def moved_bytes(contender: Contender, optimizer: Optimizer, params: list[Parameter]) -> float | None:
    """What a step must read and write, in bytes per parameter: weights and state both ways, and the gradient reads.

    Temporaries do not count, so a contender that writes some shows a lower bandwidth.
    """
    if contender.gradient_reads is None:
        return None
    held = [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    numel = sum(param.numel() for param in params)
    return (2 + contender.gradient_reads) * params[0].element_size() + 2 * state_bytes / numel


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds that the device takes, and those until the host is free again."""
    if DRY:
        begun = time.perf_counter()
        step()
        return (time.perf_counter() - begun) * 1e3, (time.perf_counter() - begun) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    begin.record()
    begun = time.perf_counter()
    step()
    host = (time.perf_counter() - begun) * 1e3
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


def timed_on_the_wall(step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds per step, of many steps: until all are done, and until the host is."""
    synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS_OF_A_ROUND):
        step()
    host = time.perf_counter() - begun
    synchronize()
    return (time.perf_counter() - begun) * 1e3 / STEPS_OF_A_ROUND, host * 1e3 / STEPS_OF_A_ROUND


def kernels_of(step: Callable[[], object]) -> int | None:
    """Kernels and copies of a step; None where they cannot be counted."""
    if DRY:
        return None
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len([name for name in on_device if "Optimizer.step" not in name])  # which is a range, not a kernel


def measure(case: Case, rounds: int, warmup: int) -> dict[str, Any]:
    """All contenders step in turns, and copying memory takes turns with them."""
    params = params_of(case)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    steps: dict[str, Callable[[], object]] = {}
    moved: dict[str, float | None] = {}
    unavailable = {}
    for contender in case.contenders:
        try:
            optimizer = contender.build(params)
        except ImportError as error:
            unavailable[contender.name] = str(error)
            continue
        steps[contender.name] = step_of(contender, optimizer, params)
        steps[contender.name]()
        moved[contender.name] = moved_bytes(contender, optimizer, params)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*steps, COPY)}
    order = list(times)
    for number in range(warmup + rounds):
        for name in order:
            if name == COPY:
                found = timed(lambda: target.copy_(source))
            else:
                found = timed_on_the_wall(steps[name]) if case.waits_for_host else timed(steps[name])
            if number >= warmup:
                times[name].append(found)
        order = order[1:] + order[:1]  # sooner or later, each follows every other
    numel = sum(param.numel() for param in params)
    finite = all(bool(param.isfinite().all()) for param in params)
    launches = {name: kernels_of(step) for name, step in steps.items()} if case.counts_launches else {}
    copy_ms = statistics.median(ms for ms, _ in times[COPY])
    copied = 2 * COPY_BYTES / copy_ms / 1e6
    rows = []
    baseline = next(iter(steps))
    baseline_ms = statistics.median(ms for ms, _ in times[baseline])
    for contender in case.contenders:
        if contender.name not in steps:
            continue
        device = [ms for ms, _ in times[contender.name]]
        ms = statistics.median(device)
        speed_up = baseline_ms / ms
        each = moved[contender.name]
        rows.append(
            {
                "name": contender.name,
                "ms": ms,
                "ms_quartiles": _quartiles(device),
                "host_ms": statistics.median(host for _, host in times[contender.name]),
                "moved_bytes_per_parameter": each,
                "fraction_of_copy": None if each is None else each * numel / ms / 1e6 / copied,
                "fraction_aimed_at": contender.fraction_aimed_at,
                "speed_up": speed_up,
                "speed_up_aimed_at": contender.speed_up_aimed_at,
                "launches": launches.get(contender.name),
            }
        )
    return {
        "case": case.name,
        "title": case.title,
        "parameters": numel,
        "timed_by": "wall" if case.waits_for_host else "events",
        "rounds": rounds,
        "baseline": baseline,
        "copy_gb_per_s": copied,
        "copy_ms_quartiles": _quartiles([ms for ms, _ in times[COPY]]),
        "finite": finite,
        "rows": rows,
        "unavailable": unavailable,
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def render(case: dict[str, Any]) -> str:
    """A measured case as plain text."""
    headings = ("step", "ms", "quartiles", "host ms", "B/param", "of copy", "aim", "speed-up", "aim", "kernels")
    lines = [headings]
    for row in case["rows"]:
        low, high = row["ms_quartiles"]
        lines.append(
            (
                row["name"],
                f"{row['ms']:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{row['host_ms']:.3f}",
                _or_nothing(row["moved_bytes_per_parameter"], "{:.2f}"),
                _or_nothing(row["fraction_of_copy"], "{:.0%}"),
                _or_nothing(row["fraction_aimed_at"], "{:.0%}"),
                f"{row['speed_up']:.2f}",
                _or_nothing(row["speed_up_aimed_at"], "{:g}"),
                _or_nothing(row["launches"], "{}"),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    text = [
        f"{case['case']}: {case['title']}, {case['parameters']:,} parameters",
        *(
            "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ),
        f"copy: {case['copy_gb_per_s']:.0f} GB/s; speed-up to {case['baseline']}; by {case['timed_by']}",
    ]
    text += [f"unavailable: {name}: {reason}" for name, reason in case["unavailable"].items()]
    if not case["finite"]:
        text.append("parameters are no longer finite: something is wrong with a step")
    return "\n".join(text)


def _or_nothing(value: Any, how: str) -> str:
    return "" if value is None else how.format(value)


def describe() -> dict[str, Any]:
    """What was measured, and on what."""
    found = info()
    device = {"name": "none: a dry run on the CPU"}
    if not DRY:
        properties = torch.cuda.get_device_properties(DEVICE)
        device = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return {"device": device, "driver": _driver(), **{key: found[key] for key in ("fusedopt", "torch", "cuda")}}


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or [""])[0] or None


def _emulate() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # nobody has imported triton yet
    sys.path.append(str(ROOT / "tests"))
    from emulated import EmulatedBackend

    from fusedopt import backends

    backends.BACKENDS["cuda"] = EmulatedBackend()


def main() -> None:
    """Runs the command line."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description="Times optimizer steps on a GPU.")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="what to step")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each contender")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json and gpu.txt")
    arguments = parser.parse_args()
    if DRY:
        print("A dry run: tiny tensors on the CPU. The figures say nothing but that it runs.\n")
        _emulate()
    elif not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device: there is nothing to measure on")
    results: dict[str, Any] = {**describe(), "cases": []}
    texts = []
    if not DRY:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if case.name not in arguments.cases:
            continue
        results["cases"].append(measure(case, arguments.rounds, arguments.warmup))
        texts.append(render(results["cases"][-1]))
        print(texts[-1], end="\n\n", flush=True)
        if not DRY:  # after every case, so that it is kept
            (arguments.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "gpu.txt").write_text("\n\n".join(texts) + "\n")
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
