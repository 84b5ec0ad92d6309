"""What callbacks of trainers report of an optimizer, whichever trainer it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine.optimizer import FusedOptimizer

_KEEPS = 0.98  # of the running average, in each step


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of the wrappers that trainers put around it."""
    while not isinstance(optimizer, FusedOptimizer) and isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


class Watch:
    """Follows an optimizer's steps without waiting for the device, and says at intervals what it saw.

    Args:
        spike: A gradient norm this many times its running average is reported; > 1, or None.
        health: Whether the last step before each report also counts what goes wrong quietly (`health_report`).

    Attributes:
        average: Running average of the gradient norm: 0.98 of it is kept in each step. None before the first.
    """

    def __init__(self, spike: float | None = 10.0, health: bool = False) -> None:
        if spike is not None and checks.number("spike", spike) <= 1:
            raise ValueError(f"spike={spike!r} would report ordinary steps; pass a number above 1, or None")
        self.spike, self.health = spike, checks.flag("health", health)
        self.average: Tensor | None = None
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._steps = 0
        self._norm: Tensor | None = None
        self._largest: Tensor | None = None
        self._ratio: Tensor | None = None
        self._nonfinite: Tensor | None = None

    def before_step(self, optimizer: FusedOptimizer, is_reported: bool) -> None:
        """Counts this step's health if a report follows it."""
        if self.health and is_reported:
            optimizer.record_health()

    def after_step(self, optimizer: FusedOptimizer) -> None:
        """Takes the gradient norm of the step that was taken."""
        self._steps += 1
        norm = optimizer.last_grad_norm
        if norm is None:
            return
        norm = norm.detach().clone()  # the next step may write to it
        is_finite = torch.isfinite(norm)
        finite = torch.where(is_finite, norm, 0.0)
        if self.average is None:
            self.average = finite.clone()
        average = self.average.to(norm.device)
        ratio = finite / torch.where(average > 0, average, torch.inf)
        self._norm = norm
        self._largest = norm if self._largest is None else torch.maximum(self._largest, norm)
        self._ratio = ratio if self._ratio is None else torch.maximum(self._ratio, ratio)
        bad = (~is_finite).to(torch.float32)
        self._nonfinite = bad if self._nonfinite is None else self._nonfinite + bad
        # A spike moves the average as far as the norm that is no spike yet would.
        capped = finite if self.spike is None else torch.minimum(finite, self.spike * average)
        capped = torch.where(average > 0, capped, finite)
        self.average = torch.where(is_finite, _KEEPS * average + (1 - _KEEPS) * capped, average)

    def report(self, optimizer: FusedOptimizer) -> tuple[dict[str, float], list[str]]:
        """Scalars since the last report, and sentences about what is unusual in them.

        Returns:
            "grad_norm" of the last step, "grad_norm_max" and "nonfinite_steps" of all, and with ``health`` the shares
            "stalled_weights" and "saturated_codes" of the last step; what was not measured is left out.
        """
        scalars: dict[str, float] = {}
        notes: list[str] = []
        if self._norm is not None and self._largest is not None and self._nonfinite is not None:
            scalars = {
                "grad_norm": float(self._norm),
                "grad_norm_max": float(self._largest),
                "nonfinite_steps": float(self._nonfinite),
            }
            if scalars["nonfinite_steps"]:
                notes.append(
                    f"the gradient norm was inf or NaN in {scalars['nonfinite_steps']:.0f} of the last {self._steps} "
                    "steps; record_health() and health_report() say whose gradients"
                )
            ratio = 0.0 if self._ratio is None else float(self._ratio)
            if self.spike is not None and ratio > self.spike:
                notes.append(f"a gradient norm of the last {self._steps} steps was {ratio:.3g} times its average")
        if self.health and optimizer._health is not None:
            health = optimizer.health_report()
            scalars["stalled_weights"] = health.totals["stalled"] / max(1, health.elements)
            scalars["saturated_codes"] = health.totals["saturated_codes"] / max(1, health.totals["codes"])
            worst = health.nonfinite[0] if health.nonfinite else None
            if worst is not None:
                notes.append(f"the gradient of {worst.where} was inf or NaN in {worst.elements:,} elements")
            optimizer.record_health(False)
        self._begin_interval()
        return scalars, notes

    def state(self) -> dict[str, Any]:
        """What a resumed watch needs, as plain numbers."""
        return {"average": None if self.average is None else float(self.average)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        average = state.get("average")
        self.average = None if average is None else torch.tensor(average, dtype=torch.float32, device="cpu")
