"""What tests with a GPU share. Such a test steps on the device and on the CPU, and compares bits.

FUSEDOPT_GPU_DRY=1 runs them without a GPU: the device is then the CPU and the kernels are those for it
(tests/emulated.py). What needs CUDA itself is skipped. It shows that the tests run, not that the kernels are right.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_run, make_params, params_of, shifted, train
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


def pair(make: Callable[[torch.device | str, str], torch.optim.Optimizer], steps: int) -> list[Any]:
    """What `make(device, backend)` makes, trained on the device and on the CPU."""
    return [train(make(device, backend), steps) for device, backend in ((DEVICE, "cuda"), ("cpu", "cpu"))]


def assert_device_agrees(
    make: Callable[[torch.device | str, str], torch.optim.Optimizer], steps: int, powers_of: str = ""
) -> None:
    """Bit for bit.

    Args:
        make: Makes an optimizer, given a device and a backend.
        steps: How many to take.
        powers_of: What is raised to powers that are no whole numbers, if anything. CUDA's `pow`, `exp` and `log` of
            doubles are within two units of the last place of what the host's give, so that the float32 derived from
            it may be a neighbour: once in 2^28, if fate wills it. Then no bits are compared, and float32 numbers differ
            by that neighbour's share.
    """
    ours, theirs = pair(make, steps)
    try:
        assert_same_run(ours, theirs)
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
