"""What states elsewhere and gradient release save and cost: `python -m bench.offload WHAT`.

- release: peak memory with and without it, each run in a process of its own, as Linux counts it; the time of backward
  and step, in turns.
- clipping: the final loss of the demo's GPT, narrowed, with clip="previous", paired with that of clip="exact".
- disk: memory of a run whose states are in files, under a limit that states in memory do not fit into; the time of a
  step with states in files and in memory, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusedopt

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from gpt import GPT, Config, Training, batches, load_text

from .workloads import WORKLOADS

_CONFIG = Config(steps=1000, batch=1, context=128, width=768, depth=14, heads=12)
_FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16 split24 8bit": (torch.bfloat16, {"state_dtype": "8bit", "master_weights": "split24"}),
}


def _memory(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class _Run:
    """The demo's GPT with about 100 million parameters."""

    def __init__(self, released: bool, name: str, context: int) -> None:
        config = dataclasses.replace(_CONFIG, context=context)
        torch.manual_seed(0)
        dtype, options = _FORMATS[name]
        self.model = GPT(config).to(dtype)
        self.optimizer = fusedopt.AdamW(self.model.parameters(), lr=1e-4, **options)
        if released:
            fusedopt.release_gradients(self.optimizer)
        self.batches = batches(load_text()[0], config)

    def step(self) -> tuple[float, float, float]:
        """Trains on a batch; seconds of backward and step, those of processors, and the loss."""
        x, y = next(self.batches)
        loss = self.model.loss(x, y)
        begin, begin_processors = time.perf_counter(), time.process_time()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin, time.process_time() - begin_processors, loss.item()


def _peak(released: bool, name: str) -> dict[str, float]:
    run = _Run(released, name, context=16)  # so that activations are few beside gradients
    losses = [run.step()[2]]
    _forget_peak()
    losses += [run.step()[2] for _ in range(2)]
    numel = sum(param.numel() for param in run.model.parameters())
    return {"peak": _memory("VmHWM"), "numel": numel, "loss": losses[-1]}


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.offload", *arguments]
    # So that glibc gives back what is freed, and the peak is of what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _stored(released: bool) -> dict[str, float]:
    """W2 in bf16 with split24 and 8-bit states: resident bytes at the peak, and after a step."""
    workload = WORKLOADS["W2"]
    _train([torch.nn.Parameter(torch.zeros(300, 300, dtype=torch.bfloat16))], released)  # loads what code there is
    base = _memory("VmRSS")
    params = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).fill_(0.02)) for shape in workload.shapes()]
    optimizer = _train(params, released)
    peak, held = _memory("VmHWM") - base, _memory("VmRSS") - base
    return {"peak": peak, "held": held, "numel": workload.numel, "tensors": len(optimizer.state)}


def _train(params: list[torch.nn.Parameter], released: bool) -> fusedopt.AdamW:
    optimizer = fusedopt.AdamW(params, **_FORMATS["bf16 split24 8bit"][1])
    if released:
        fusedopt.release_gradients(optimizer)
    for step in range(3):
        if step == 1:
            _forget_peak()
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _release(repeats: int) -> Iterator[str]:
    for name, (dtype, _) in _FORMATS.items():
        usual, released = _child("--peak", "0", name), _child("--peak", "1", name)
        saved, gradients = usual["peak"] - released["peak"], usual["numel"] * dtype.itemsize
        yield (
            f"{name}: {usual['numel'] / 1e6:.1f} M parameters, peak {usual['peak'] / 1e6:.0f} MB, with release "
            f"{released['peak'] / 1e6:.0f} MB: {saved / gradients:.1%} of the gradients' {gradients / 1e6:.0f} MB; "
            f"losses {usual['loss']!r} and {released['loss']!r}"
        )
    usual, released = _child("--stored", "0"), _child("--stored", "1")
    peaks = [run["peak"] / run["numel"] for run in (usual, released)]
    yield (
        f"W2, bf16 with split24 and 8-bit states: {peaks[0]:.2f} bytes per parameter at the peak, {peaks[1]:.2f} with "
        f"release, {released['held'] / released['numel']:.2f} after the step"
    )
    runs = {released: _Run(released, "fp32", context=128) for released in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    processors: dict[bool, list[float]] = {False: [], True: []}  # other programs hardly change these
    for number in range(repeats + 1):
        for released, run in sorted(runs.items(), reverse=bool(number % 2)):
            taken, of_processors, _ = run.step()
            if number > 0:
                seconds[released].append(taken)
                processors[released].append(of_processors)
    ratio, of_processors = (
        statistics.median(b / a for a, b in zip(each[False], each[True])) for each in (seconds, processors)
    )
    yield (
        f"backward and step: {1e3 * statistics.median(seconds[False]):.0f} ms, with release "
        f"{1e3 * statistics.median(seconds[True]):.0f} ms, ratio {ratio:.3f}, of processor time {of_processors:.3f}"
    )


# ---- clipping by the norm of the step before ---------------------------------------------------------------


_NARROW = Config(steps=400, batch=8, context=64, width=128, heads=4)


def _clipped(clip: str, config: Config, max_grad_norm: float) -> tuple[float, float]:
    """The final loss, and the share of steps whose gradients were clipped."""
    training = Training(lambda groups, c: fusedopt.AdamW(groups, lr=c.lr, max_grad_norm=max_grad_norm), config)
    # The usual step has the bits of clip="exact", and needs one backward pass.
    if clip == "previous":
        fusedopt.release_gradients(training.optimizer, clip=clip)
    clipped = 0
    for _ in range(config.steps):
        training.step()
        clipped += int(float(training.optimizer.last_grad_norm) > max_grad_norm)
    return training.validation_loss(), clipped / config.steps


def _clipping(config: Config, seeds: int, max_grad_norm: float) -> Iterator[str]:
    differences = []
    for seed in range(seeds):
        config = dataclasses.replace(config, seed=seed)
        (exact, share), (previous, _) = (_clipped(clip, config, max_grad_norm) for clip in ("exact", "previous"))
        differences.append(previous - exact)
        yield f"seed {seed}: exact {exact:.5f} ({share:.0%} of steps clipped), previous {differences[-1]:+.5f}"
    yield f"mean difference {statistics.fmean(differences):+.5f}"


# ---- states in files ---------------------------------------------------------------------------------------

_NUMEL = 1 << 22  # of a parameter
_LIMIT = 300 << 20
_DISK: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {  # with the bytes of states per parameter
    "fp32": (torch.float32, {}, 8.0),
    "bf16 8bit": (torch.bfloat16, {"state_dtype": "8bit"}, 2 + 2 / 32),
}


def _params(name: str, state_bytes: float) -> list[torch.nn.Parameter]:
    """Parameters with so many bytes of states. All have one gradient, so that it does not count."""
    dtype, _, per_parameter = _DISK[name]
    grad = torch.randn(2048, _NUMEL // 2048).to(dtype)
    count = round(state_bytes / per_parameter / _NUMEL)
    params = [torch.nn.Parameter(torch.full_like(grad, 0.02)) for _ in range(count)]
    for param in params:
        param.grad = grad
    return params


def _resident(name: str, state_bytes: float, folder: str) -> dict[str, float]:
    """What a run takes beyond its parameters, without pages of files; folder "" has its states in memory."""
    dtype, options, _ = _DISK[name]
    warm = torch.nn.Parameter(torch.zeros(300, 300, dtype=dtype))  # loads what code there is
    warm.grad = torch.zeros_like(warm)
    fusedopt.AdamW([warm], **options).step()
    base = _memory("RssAnon")
    params = _params(name, state_bytes)
    held = sum(param.numel() * param.element_size() for param in params)
    # Private memory of the process, which mapped files are not.
    limit = _memory("VmData") + _LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    optimizer = fusedopt.AdamW(params, **options, state_device=f"disk:{folder}" if folder else None)
    most = 0
    try:
        for _ in range(3):
            optimizer.step()
            most = max(most, _memory("RssAnon") + _memory("RssShmem") - base - held)
    except (MemoryError, RuntimeError):
        return {"fits": 0}
    report = optimizer.memory_report()
    return {"fits": 1, "beyond": most, "parameters": held, "states": report.state_bytes}


def _disk(state_bytes: float, folder: str, repeats: int) -> Iterator[str]:
    for name, (_, options, _) in _DISK.items():
        usual = _child("--resident", name, str(state_bytes), "")
        found = _child("--resident", name, str(state_bytes), folder)
        yield (
            f"{name}: {found['states'] / 1e9:.2f} GB of states in files, {found['parameters'] / 1e9:.2f} GB of "
            f"parameters, and {found['beyond'] / 1e6:.0f} MB of memory beside them; with {_LIMIT >> 20} MiB beside "
            f"them states in memory {'fit' if usual['fits'] else 'do not fit'}"
        )
        params = _params(name, state_bytes)
        places = (None, f"disk:{folder}")
        optimizers = [fusedopt.AdamW(params, **options, state_device=place) for place in places]
        seconds: list[list[float]] = [[], []]
        for number in range(repeats + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                begin = time.perf_counter()
                optimizers[which].step()
                if number > 0:
                    seconds[which].append(time.perf_counter() - begin)
        ratio = statistics.median(b / a for a, b in zip(*seconds))
        yield (
            f"{name}: a step takes {statistics.median(seconds[0]):.2f} s with states in memory, "
            f"{statistics.median(seconds[1]):.2f} s with states in files, ratio {ratio:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("release", "clipping", "disk"), default="release")
    parser.add_argument("--repeats", type=int, default=12, help="steps that are timed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--wide", action="store_true", help="clipping: the demo's GPT as it is, and not narrowed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for states in files")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of states in files")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--stored", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resident", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(_peak(arguments.peak[0] == "1", arguments.peak[1])))
        return
    if arguments.stored is not None:
        print(json.dumps(_stored(bool(arguments.stored))))
        return
    if arguments.resident:
        name, state_bytes, folder = arguments.resident
        print(json.dumps(_resident(name, float(state_bytes), folder)))
        return
    lines = {
        "release": lambda: _release(arguments.repeats),
        "clipping": lambda: _clipping(
            Config() if arguments.wide else _NARROW, arguments.seeds, arguments.max_grad_norm
        ),
        "disk": lambda: _disk(1e9 * arguments.gigabytes, str(arguments.folder.resolve()), arguments.repeats),
    }
    for line in lines[arguments.what]():
        print(line, flush=True)


if __name__ == "__main__":
    main()
