"""What tests with a GPU share. Such a test steps on the device and on the CPU, and compares bits.

FUSEDOPT_GPU_DRY=1 runs them without a GPU: the device is then the CPU and the kernels are those for it
(tests/emulated.py). What needs CUDA itself is skipped. It shows that the tests run, not that the kernels are right.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_run, make_params, params_of, set_grads, shifted, train
from emulated import FOLDER, EmulatedBackend

from fusedopt import backends

DRY = os.environ.get("FUSEDOPT_GPU_DRY", "0") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
REASON = "" if DRY or torch.cuda.is_available() else "needs a CUDA device; `make gpu-check` runs it where there is one"

gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.usefixtures("kernels_at_hand")]
needs_cuda = pytest.mark.skipif(DRY, reason="a dry run has no CUDA")


@pytest.fixture
def kernels_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters on DEVICE are stepped by backend="cuda"."""
    if DRY:
        if not FOLDER:
            pytest.skip("FUSEDOPT_EMULATED does not say where the kernels for the CPU are; `make test` builds them")
        monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedBackend())
    elif backends.BACKENDS["cuda"].module() is None:  # type: ignore[attr-defined]
        pytest.fail("there is a CUDA device, but fusedopt was built without CUDA kernels")


def params_on(device: torch.device | str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Any]:
    """Each shape twice: aligned, and one element behind an aligned address; the same numbers on every device."""
    params = []
    for param in make_params(shapes, dtype):
        moved = param.detach().to(device)
        params += [torch.nn.Parameter(moved), shifted(moved)]
    return params


def from_bench(name: str) -> ModuleType:
    """A module of bench/, which is on no path here: beside it are the sources, which have no compiled core."""
    path = Path(__file__).resolve().parents[1] / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


in_a_bucket = from_bench("gradients").in_a_bucket


def zero_grads(params: list[Any], step: int) -> None:
    """Nothing but zeros for a third of the parameters, others in each step, and zeros of both signs in the rest."""
    set_grads(params, step)
    for i, param in enumerate(params):
        if (i + step) % 3 == 0:
            param.grad.zero_()
        else:
            param.grad.flatten()[::2] *= 0.0


def bucketed_grads(params: list[Any], step: int) -> None:
    """Views of one tensor for each dtype and device, at odd offsets."""
    set_grads(params, step)
    kinds: dict[Any, list[Any]] = {}
    for param in params:
        kinds.setdefault((param.dtype, param.device), []).append(param)
    for alike in kinds.values():
        for param, grad in zip(alike, in_a_bucket([param.grad for param in alike])):
            assert grad.storage_offset() % 2 == 1
            param.grad = grad


UNUSUAL_GRADS = {"zero": zero_grads, "bucket": bucketed_grads}


def pair(
    make: Callable[[torch.device | str, str], torch.optim.Optimizer],
    steps: int,
    backend: str = "cuda",
    grads: Callable[..., None] = set_grads,
) -> list[Any]:
    """What `make(device, backend)` makes, trained on the device and on the CPU."""
    return [train(make(device, name), steps, grads=grads) for device, name in ((DEVICE, backend), ("cpu", "cpu"))]


def assert_device_agrees(
    make: Callable[[torch.device | str, str], torch.optim.Optimizer],
    steps: int,
    powers_of: str = "",
    backend: str = "cuda",
    grads: Callable[..., None] = set_grads,
) -> None:
    """Bit for bit, and the norm if there is one.

    Args:
        make: Makes an optimizer, given a device and a backend.
        steps: How many to take.
        powers_of: What is raised to powers that are no whole numbers, if anything. CUDA's `pow`, `exp` and `log` of
            doubles are within two units of the last place of what the host's give, so that the float32 derived from
            it may be a neighbour: once in 2^28, if fate wills it. Then no bits are compared, and float32 numbers differ
            by that neighbour's share.
        backend: Of the device.
        grads: Sets the gradients of a step.
    """
    ours, theirs = pair(make, steps, backend, grads)
    try:
        assert_same_run(ours, theirs)
        if ours.last_grad_norm is not None:
            assert_same_norm(ours, theirs)
    except AssertionError:
        numbers = [(a, b) for a, b in zip(_tensors(ours), _tensors(theirs)) if a.numel() > 0]
        if not powers_of or any(a.dtype != torch.float32 for a, _ in numbers):
            raise
        worst = max((a - b).abs().max().item() / b.abs().max().clamp_min(1e-30).item() for a, b in numbers)
        # One unit in 2^24 of a scalar, in every step; the sum of two numbers of opposite signs may show it eightfold.
        assert worst <= steps * 8 * 2.0**-24, f"{worst:.3g} of the largest number apart"
        pytest.skip(f"float32 derived from {powers_of} rounds to a neighbour here: {worst:.3g} apart, as may be")


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    params = params_of(optimizer)
    held = [state for param in params for state in optimizer.state[param].values()]
    return [tensor.detach().cpu() for tensor in [*params, *held]]


def assert_same_norm(ours: Any, theirs: Any) -> None:
    assert_same_bits(ours.last_grad_norm.cpu(), theirs.last_grad_norm.cpu(), "the norm")
