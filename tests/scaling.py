"""What kernels on a device are asked about loss scales: that they read them, and the host does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import assert_same_run, set_grads, train


class Unread(torch.Tensor):
    """On another device than the CPU, as far as the optimizer looks; reading it on the host fails."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def item(self) -> float:  # type: ignore[override]
        raise AssertionError("the host waited for a device")


def assert_scaling_is_read_by_kernels(
    backend: str, found: float, steps: int, make: Callable[[str], torch.optim.Optimizer]
) -> None:
    """The loss scale and whether a gradient is not finite, in the step after `steps` others: the bits of the CPU's."""
    runs = []
    for name in (backend, "cpu"):
        optimizer = train(make(name), steps)
        params = optimizer.param_groups[0]["params"]
        set_grads(params, steps, scale=8.0)
        if found:
            params[1].grad[1, 3] = float("inf")
        optimizer.grad_scale = torch.tensor([64.0])
        optimizer.found_inf = Unread(torch.tensor([found])) if name == backend else torch.tensor([found])
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == steps + 1 - found
        runs.append(optimizer)
    assert_same_run(*runs)
