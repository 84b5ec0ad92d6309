"""Steps on a device beside bits: graphs, streams, no waiting, loss scales, size, memory that runs out, launches."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, assert_same_bits, assert_same_run, params_of, set_grads, train
from gpu import DEVICE, DRY, UNUSUAL_GRADS, assert_same_norm, gpu, needs_cuda, pair, params_on

from fusedopt import AdamW
from fusedopt.backends import ParamStep
from fusedopt.backends.cpu import CpuSession

pytestmark = gpu

SHAPES = [(300,), (7, 65), (64, 128)]


def make(device: torch.device | str, backend: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> AdamW:
    return AdamW(params_on(device, SHAPES, dtype), backend=backend, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whoever waits for the device in here fails; in a dry run nobody can."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"max_grad_norm": 0.5},
        {"state_dtype": "8bit", "min_quantized_numel": 1},
        {"state_dtype": "bfloat16", "rounding": "stochastic", "master_weights": "split24"},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(how: dict[str, Any]) -> None:
    """With the learning rate on the device, the loss scale and what was found not to be finite."""
    runs = []
    for device, backend in ((DEVICE, "cuda"), ("cpu", "cpu")):
        lr = torch.tensor(1e-2, device=device)
        optimizer = train(make(device, backend, torch.bfloat16, lr=lr, **how), 1)
        for step in range(1, 4):
            set_grads(params_of(optimizer), step, scale=64.0)
            optimizer.grad_scale = torch.tensor([64.0], device=device)
            optimizer.found_inf = torch.tensor([float(step == 2)], device=device)
            if device == DEVICE:
                with no_waiting():
                    optimizer.step()
            else:
                optimizer.step()
            lr.mul_(0.5)
        runs.append(optimizer)
    assert_same_run(*runs)
    if "max_grad_norm" in how:
        assert_same_norm(*runs)


@pytest.mark.parametrize("grads", UNUSUAL_GRADS)
@pytest.mark.parametrize("how", [{}, {"state_dtype": "8bit", "min_quantized_numel": 1, "max_grad_norm": 0.5}], ids=str)
def test_a_step_with_gradients_of_zeros_or_in_a_bucket_waits_for_nothing(how: dict[str, Any], grads: str) -> None:
    runs = []
    for device, backend in ((DEVICE, "cuda"), ("cpu", "cpu")):
        optimizer = train(make(device, backend, torch.bfloat16, **how), 1, grads=UNUSUAL_GRADS[grads])
        for step in range(1, 3):
            UNUSUAL_GRADS[grads](params_of(optimizer), step)
            if device == DEVICE:
                with no_waiting():
                    optimizer.step()
            else:
                optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)


@needs_cuda
@pytest.mark.parametrize("case", [c for c in CASES if not c.ours.changes_groups], ids=lambda case: case.name)
@pytest.mark.parametrize("how", [{}, {"state_dtype": "8bit", "min_quantized_numel": 1, "max_grad_norm": 0.5}], ids=str)
def test_graphs(case: Any, how: dict[str, Any]) -> None:
    """A captured step, replayed, is the next step: counts go on, and the learning rate is what it is by then."""
    rates = [1e-2, 1e-2, 3e-3, 1e-3, 2e-3]

    def built() -> tuple[torch.Tensor, Any]:
        lr = torch.tensor(rates[0], device=DEVICE)
        optimizer = case.ours(params_on(DEVICE, SHAPES, torch.bfloat16), **{**case.kwargs, **how, "lr": lr})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            train(optimizer, 1)
        torch.cuda.current_stream().wait_stream(stream)
        return lr, optimizer

    lr, captured = built()
    grads = [param.grad for param in params_of(captured)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    norms = []
    for step, rate in list(enumerate(rates))[1:]:
        set_grads(params_of(captured), step)
        for param, grad in zip(params_of(captured), grads):
            grad.copy_(param.grad)
            param.grad = grad
        lr.fill_(rate)
        graph.replay()
        norms.append(None if captured.last_grad_norm is None else captured.last_grad_norm.clone())

    lr, eager = built()
    for step, rate in list(enumerate(rates))[1:]:
        lr.fill_(rate)
        train(eager, 1, first=step)
        if norms[step - 1] is not None:
            assert_same_bits(eager.last_grad_norm, norms[step - 1], f"the norm of step {step}")
    assert_same_run(captured, eager)
    assert {eager.state[param]["step"].item() for param in params_of(eager)} == {float(len(rates))}


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"state_dtype": "bfloat16", "rounding": "stochastic"}),
        (torch.bfloat16, {"state_dtype": "8bit", "min_quantized_numel": 1, "master_weights": "split24"}),
    ],
    ids=str,
)
def test_norms_of_updates(dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Taken on the way of a step, which usual formats then take with the kernels for any."""
    runs = [train(make(device, backend, dtype, **how), 1) for device, backend in ((DEVICE, "cuda"), ("cpu", "eager"))]
    for optimizer in runs:
        optimizer.record_norms()
        train(optimizer, 1, first=1)
    assert runs[0].norms_report() == runs[1].norms_report()
    assert_same_run(*runs)


@needs_cuda
def test_streams() -> None:
    """A step runs in the current stream: behind what makes its gradients there."""

    def stepped(stream: torch.cuda.Stream) -> AdamW:
        optimizer = make(DEVICE, "cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for step in range(3):
                set_grads(params_of(optimizer), step)
                for param in params_of(optimizer):
                    param.grad.mul_(0.0)
                torch.cuda._sleep(20_000_000)  # some 10 ms, in which a step elsewhere would find zeros
                for i, param in enumerate(params_of(optimizer)):
                    param.grad.add_(1.0 / (i + 1 + step))
                optimizer.step()
        stream.synchronize()
        return optimizer

    assert_same_run(stepped(torch.cuda.Stream()), stepped(torch.cuda.current_stream()))


@needs_cuda
def test_grad_scaler() -> None:
    """Real infinities are skipped without being looked at by the host, and do not count as steps."""
    optimizer = make(DEVICE, "cuda", max_grad_norm=1.0)
    twin = make("cpu", "cpu", max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    for step in range(4):
        is_lost = step == 1
        scale = scaler.get_scale()
        set_grads(params_of(optimizer), step, scale=scale)
        if is_lost:
            params_of(optimizer)[2].grad[3, 5] = math.inf
        scaler.scale(torch.zeros(1, device=DEVICE))  # makes its tensors
        scaler.step(optimizer)
        scaler.update()
        if not is_lost:
            set_grads(params_of(twin), step, scale=scale)
            twin.grad_scale = torch.tensor([scale])
            twin.step()
    assert scaler.get_scale() == 2.0**9
    assert_same_run(optimizer, twin)
    assert_same_norm(optimizer, twin)


def test_mixed_devices_and_groups() -> None:
    """Groups on both devices, one going up, are clipped by one norm."""

    def mixed(device: torch.device | str, backend: str) -> AdamW:
        first, second = params_on(device, SHAPES, torch.float32), params_on("cpu", SHAPES, torch.bfloat16)
        third = params_on(device, SHAPES[:2], torch.float16)
        groups = [
            {"params": first, "lr": 1e-2},
            {"params": second, "backend": "cpu", "weight_decay": 0.3},
            {"params": third, "maximize": True, "state_dtype": "bfloat16"},
        ]
        return AdamW(groups, lr=1e-3, max_grad_norm=0.7, backend=backend)

    runs = pair(mixed, 3)
    assert_same_run(*runs)
    assert_same_norm(*runs)


def test_more_elements_than_32_bits_count() -> None:
    """Rows at the beginning, around 2^31 and 2^32 and at the end equal steps on the CPU, told where they lie."""
    row = 64 if DRY else 1024
    rows = 80 if DRY else 2**32 // row + 64
    if not DRY:
        free = torch.cuda.mem_get_info()[0]
        if free < 30e9:
            rows = 2**31 // row + 64
        if free < 15e9:
            pytest.skip(f"needs 15 GB of free memory on the device, which has {free / 1e9:.1f} GB")
    param = torch.nn.Parameter(torch.zeros(rows, row, dtype=torch.bfloat16, device=DEVICE).normal_())
    optimizer = AdamW([param], state_dtype="8bit", min_quantized_numel=1, rounding="stochastic", backend="cuda")
    param.grad = torch.zeros_like(param).normal_()
    optimizer.step()
    state = optimizer.state[param]
    boundaries = [0, 2**31 // row, 2**32 // row, rows] if not DRY else [0, 40, rows]
    slices = [slice(max(at - 4, 0), min(at + 4, rows)) for at in boundaries if at <= rows]
    names = [f"{name}_{part}" for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")]
    twins = []
    for piece in slices:
        held = tuple(state[name][piece].cpu().contiguous() for name in names)
        twins.append((param.detach()[piece].cpu().contiguous(), held, state["step"].cpu().clone()))
    optimizer.step()
    group = optimizer.group_step(optimizer.param_groups[0])
    for piece, (weights, held, step) in zip(slices, twins):
        session = CpuSession()
        session.begin([group], [None])
        grad = param.grad[piece].cpu().contiguous()
        assert session.add(ParamStep(0, 0, weights, grad, (held[:2], held[2:]), step, None, piece.start * row))
        session.step([1.0])
        assert_same_bits(param.detach()[piece].cpu(), weights, f"rows {piece}")
        for name, tensor in zip(names, held):
            assert_same_bits(state[name][piece].cpu(), tensor, f"{name} of rows {piece}")


@needs_cuda
def test_memory_that_runs_out_changes_nothing() -> None:
    numel = 2**26
    params = [torch.nn.Parameter(torch.ones(numel, device=DEVICE)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdamW(params, backend="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5 * 4 * numel) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(not optimizer.state[param] for param in params)
    assert all(bool((param == 1.0).all()) for param in params)
    optimizer.step()
    assert all(optimizer.state[param]["step"].item() == 1.0 for param in params)


@needs_cuda
@pytest.mark.parametrize("how", [{}, {"state_dtype": "8bit"}], ids=str)
def test_launches(how: dict[str, Any]) -> None:
    """A step of GPT-2 small is three launches at most."""
    from torch.profiler import ProfilerActivity, profile

    width = 64
    shapes = [(50257, width), (1024, width)]
    shapes += 12 * [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    shapes += 12 * [(width, 4 * width), (4 * width,), (4 * width, width), (width,)] + 2 * [(width,)]
    params = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in shapes]
    optimizer = train(AdamW(params, backend="cuda", **how), 1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    work = [name for name in on_device if "Optimizer.step" not in name]  # which is a range, not a kernel
    assert 0 < len(work) <= 3, work


SMALL = """
import torch, fusedopt
shapes = ((3, 257), (64, 64), (5,))
params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(torch.bfloat16)) for shape in shapes]
for how in ({}, {"state_dtype": "8bit", "min_quantized_numel": 1, "master_weights": "split24"}):
    optimizer = fusedopt.AdamW(params, backend="cuda", max_grad_norm=1.0, **how)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
torch.cuda.synchronize()
"""


@needs_cuda
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    # Each tensor in memory of its own, so that its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SMALL], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
