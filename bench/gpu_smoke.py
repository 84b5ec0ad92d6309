"""Four steps in each usual format have the bits of the CPU backend. Needs no pytest.

    python -m bench.gpu_smoke

Each comparison is a line of the results, and so is the error of one that failed. FUSEDOPT_GPU_SHARD=i/n takes every
n-th of them, so that several processes compile Triton's kernels side by side. FUSEDOPT_GPU_DRY=1 runs on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from bench.gpu import emulate
from bench.gpu_record import Results, share
from bench.gpu_timing import DEVICE, DRY, device_is_broken
from bench.gradients import in_a_bucket
from fusedopt import Adafactor, AdamW, FusedOptimizer, Lion

STEPS = 2 if DRY else 4
# Whole blocks and ragged ones, vectors, rows longer than a chunk, several dimensions.
SHAPES = [(8, 64), (7, 65), (30,)] if DRY else [(512, 512), (700, 100), (7, 257), (3, 70_000), (3, 4, 400), (1025,)]


@dataclass(frozen=True)
class Format:
    """An optimizer whose bits are compared.

    Attributes:
        name: In results.
        optimizer: Its class.
        dtype: Of parameters and gradients.
        options: Its arguments.
        gradients: "random", "zero", or "bucket": at odd offsets of one tensor, so that nothing is aligned.
    """

    name: str
    optimizer: type[FusedOptimizer]
    dtype: torch.dtype
    options: dict[str, Any]
    gradients: str = "random"


EIGHT_BIT: dict[str, Any] = {"state_dtype": "8bit", "min_quantized_numel": 1}
FORMATS = (
    Format("AdamW, float32", AdamW, torch.float32, {"weight_decay": 0.1}),
    Format("AdamW, bfloat16, 8-bit state", AdamW, torch.bfloat16, EIGHT_BIT),
    Format("Lion, float32", Lion, torch.float32, {"weight_decay": 0.1}),
    Format("AdamW, float32, clipped", AdamW, torch.float32, {"max_grad_norm": 0.5}),
    Format("Adafactor, float32", Adafactor, torch.float32, {}),
    Format("AdamW, bfloat16, 8-bit state, split24", AdamW, torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24"}),
    Format("AdamW, bfloat16, bfloat16 state", AdamW, torch.bfloat16, {"state_dtype": "bfloat16"}),
    Format("AdamW, float32, gradients in a bucket", AdamW, torch.float32, {}, "bucket"),
    Format("AdamW, bfloat16, 8-bit state, in a bucket", AdamW, torch.bfloat16, EIGHT_BIT, "bucket"),
    Format("AdamW, float32, gradients of zeros", AdamW, torch.float32, {}, "zero"),
    Format("AdamW, bfloat16, 8-bit state, zeros", AdamW, torch.bfloat16, EIGHT_BIT, "zero"),
    Format("Adafactor, float32, zeros", Adafactor, torch.float32, {}, "zero"),
    Format("Lion, bfloat16, 8-bit state", Lion, torch.bfloat16, EIGHT_BIT),
)
# Interpreted, Triton's kernels take their time.
QUICK = ("AdamW, float32, gradients in a bucket", "AdamW, bfloat16, 8-bit state, zeros")


def stepped(how: Format, device: torch.device | str, backend: str) -> dict[str, torch.Tensor]:
    """What a run leaves, by name, on the CPU: numbers come from the CPU, so they are the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=generator).to(how.dtype).to(device)) for s in SHAPES]
    optimizer = how.optimizer(params, **how.options, backend=backend)
    for _ in range(STEPS):
        grads = [torch.randn(s, generator=generator).to(how.dtype).to(device) for s in SHAPES]
        if how.gradients == "zero":
            grads = [torch.zeros_like(grad) for grad in grads]
        if how.gradients == "bucket":
            grads = in_a_bucket(grads)
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.step()
    found = {}
    for i, param in enumerate(params):
        found[f"parameter {i} of shape {tuple(param.shape)}"] = param.detach().cpu()
        for name, value in optimizer.state[param].items():
            found[f"{name} of parameter {i} of shape {tuple(param.shape)}"] = value.detach().cpu()
    if optimizer.last_grad_norm is not None:
        found["the norm"] = optimizer.last_grad_norm.detach().cpu()
    return found


def compared(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many tensors and elements have other bits, and which tensor is the first."""
    if ours.keys() != theirs.keys():
        return {"equal": False, "first": f"different tensors: {sorted(ours.keys() ^ theirs.keys())}"}
    differing, elements, first = 0, 0, None
    for name, tensor in ours.items():
        twin = theirs[name]
        raw = [each.contiguous().view(-1).view(torch.uint8) for each in (tensor, twin)]
        if torch.equal(*raw):
            continue
        differing += 1
        rows = [each.view(tensor.numel(), tensor.element_size()) for each in raw]
        count = int((rows[0] != rows[1]).any(dim=1).sum())
        elements += count
        first = first or f"{name}: {count} of {tensor.numel()} elements"
    return {"equal": differing == 0, "tensors": len(ours), "differing": differing, "elements": elements, "first": first}


def main() -> int:
    """Runs the command line; 1 if anything differs or fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description="Compares bits with the CPU's.")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the comparison to begin with")
    parser.add_argument("--kernels", default="present", help="what the kernels are called in results")
    arguments = parser.parse_args()
    if DRY:
        emulate()
    results = Results.of_environment()
    number, count = share()
    failed = arguments.first > 0  # it begins later because another process broke the device
    backends = ["cuda"] + (["triton"] if importlib.util.find_spec("triton") is not None else [])
    if "triton" not in backends and number == 0:
        results.add("smoke", backend="triton", unavailable="triton is not installed")
    planned = [(backend, how) for backend in backends for how in FORMATS]
    if DRY:
        planned = [(backend, how) for backend, how in planned if backend == "cuda" or how.name in QUICK]
    for at, (backend, how) in enumerate(planned):
        if at < arguments.first or at % count != number:
            continue
        begun = time.monotonic()
        try:
            found = compared(stepped(how, DEVICE, backend), stepped(how, "cpu", "cpu"))
        except Exception:
            found = {"equal": False, "error": traceback.format_exc()}
        seconds = round(time.monotonic() - begun, 2)
        kernels = arguments.kernels if backend == "cuda" else "Triton"
        results.add("smoke", format=how.name, backend=backend, kernels=kernels, seconds=seconds, **found)
        said = "same bits" if found["equal"] else found.get("first") or found["error"]
        print(f"{kernels}, {how.name}: {said}, {seconds} s", flush=True)
        failed |= not found["equal"]
        if "error" in found and device_is_broken():
            options = ["--from", str(at + 1), "--kernels", arguments.kernels]
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu_smoke", *options])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
