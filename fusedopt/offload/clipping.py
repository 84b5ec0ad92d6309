"""What released gradients are multiplied by: a norm that is known before all of them are there."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checks
from ..backends import Scaling
from ..backends.base import Health
from ..reference.norm import clip, coefficient, pairwise_sum
from .hooks import Listing

Places = dict[tuple[int, int], Tensor]  # of each parameter, by where it is listed


class Steps(Protocol):
    """What is asked of an optimizer: to measure and to step some of its parameters, by group and position."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    last_grad_norm: Tensor | None
    _lock: threading.RLock
    _release: Any

    def before_step(self) -> None:
        """Raises ValueError if no step may be taken now."""

    def after_step(self) -> None:
        """Changes param groups after a step that was taken."""

    def common_skip_step_above(self) -> float | None:
        """The norm above which a step is not taken."""

    def common_max_grad_norm(self) -> float | None:
        """The norm that all groups clip to; None if they do not."""

    def _square_sums(self, listed: list[list[int]]) -> list[Tensor]:
        """The sums of squares of each of their gradients, by reduction chunk, of what is here."""

    def _sums_over_ranks(self, sums: Places) -> Places | None:
        """The sums of squares of whole gradients, of which `sums` are what is here; None if all of each is here."""

    def _step_some(
        self, listed: list[list[int]], scaling: Scaling, multiplier: float | None = None
    ) -> tuple[Health, Tensor | None]:
        """Steps them, gradients times a multiplier or as `scaling` says; what was counted, and their norm."""

    def _count_step(self, counts: Health) -> None:
        """Notes what a whole step counted."""

    def _forget_recorded(self) -> None:
        """Forgets what was measured of a step that did not come to its end."""


def check_clip(optimizer: Steps, clip: str | None) -> None:
    """Raises ValueError if gradients cannot be clipped in a way, or are to be and nobody says how."""
    most = optimizer.common_skip_step_above()
    if most is not None:
        raise ValueError(
            f"skip_step_above={most!r} needs the norm of all gradients before the first is stepped, and released ones "
            "are stepped before the last is there; leave it out, or step without releasing gradients"
        )
    max_norm = optimizer.common_max_grad_norm()
    if max_norm is not None and clip is None:
        raise ValueError(
            f"max_grad_norm={max_norm!r} needs the norm of all gradients, which released ones are not there for; pass "
            "clip='exact' (a second backward pass), 'previous' (the norm of the step before) or 'parameter' to "
            "release_gradients"
        )
    if max_norm is None and clip is not None:
        raise ValueError(f"clip={clip!r} has no norm to clip to; make the optimizer with max_grad_norm")
    if clip in ("exact", "previous") and any(group["grad_norm_group"] is not None for group in optimizer.param_groups):
        raise ValueError(
            f"clip={clip!r} would take the norm of this process's gradients alone, and a param group has a "
            "grad_norm_group; clip without releasing gradients, or with clip='parameter'"
        )


def _places(listed: list[list[int]]) -> list[tuple[int, int]]:
    return [(index, position) for index, positions in enumerate(listed) for position in positions]


class Clipping:
    """The norms of an optimizer's released gradients, of this step and the one before, and what follows from them.

    Args:
        optimizer: Whose gradients they are.
        way: "exact", "previous" or "parameter"; None if they are not clipped.
        loss_scale: What gradients are divided by first.
        listing: Where its parameters are listed.
    """

    def __init__(
        self,
        optimizer: Steps,
        way: str | None,
        loss_scale: float,
        listing: Listing,
    ) -> None:
        self.way = way
        self._owner = weakref.ref(optimizer)  # which keeps this
        self._listing = listing
        scale = None if loss_scale == 1 else torch.tensor(loss_scale, dtype=torch.float32, device="cpu")
        self._scaling = Scaling(grad_scale=scale)
        self._unscaled = 1.0 if scale is None else 1.0 / float(scale)
        self._previous: float | None = None  # the norm that the step before found
        self._before: dict[tuple[int, int], float] = {}  # and what each parameter had in its square
        self.begin()

    @property
    def _optimizer(self) -> Steps:
        optimizer = self._owner()
        assert optimizer is not None
        return optimizer

    def _listed(self, params: Iterable[Tensor]) -> list[list[int]]:
        return self._listing.positions(params, len(self._optimizer.param_groups))

    def begin(self) -> None:
        """Forgets everything of a step."""
        self._sums: Places = {}
        self._seen = [0.0, 0.0]  # the sums of those that are there, and what the same had in the step before
        self._norms: list[Tensor] = []  # of single parameters
        self._measured: tuple[float, float] | None = None  # of all gradients: the multiplier and the norm

    def state_dict(self) -> dict[str, Any]:
        """The norm of the step before, and each parameter's part in it."""
        parts = [[*place, part] for place, part in self._before.items()]
        return {"previous_norm": self._previous, "previous_sums": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        norm = state_dict["previous_norm"]
        self._previous = None if norm is None else checks.nonnegative("previous_norm", norm)
        parts = state_dict.get("previous_sums", [])
        self._before = {(group, position): float(part) for group, position, part in parts}

    # ---- during a backward pass --------------------------------------------------------------------

    def measure(self, params: Iterable[Tensor]) -> None:
        """Takes the sums of squares of gradients; with "exact" of what is here, and ranks meet for all at once."""
        listed = self._listed(params)
        sums = dict(zip(_places(listed), self._optimizer._square_sums(listed)))
        if self.way != "exact":
            sums = self._optimizer._sums_over_ranks(sums) or sums
        if self.way == "previous":
            sums = {place: found.cpu() for place, found in sums.items()}  # waited for once
            known = sums.keys() & self._before.keys()
            self._seen[0] += sum(float(sums[place].sum()) for place in sorted(known))
            self._seen[1] += sum(self._before[place] for place in sorted(known))
        self._sums |= sums

    def end_measuring(self) -> None:
        """Finds the norm of all gradients, which were measured, and what it makes of them."""
        self._sums = self._optimizer._sums_over_ranks(self._sums) or self._sums
        max_norm = self._optimizer.common_max_grad_norm()
        total = self._total()
        norm = math.sqrt(total) * self._unscaled
        self._measured = (self._unscaled, norm) if max_norm is None else clip(total, self._unscaled, max_norm)

    def is_measured(self) -> bool:
        """Whether the norm of all gradients of this step is known."""
        return self._measured is not None

    def parts(self, params: list[Tensor], numel: int) -> Iterator[tuple[list[Tensor], Scaling, float | None]]:
        """What is stepped together, and what gradients are multiplied by: as a scaling says, or the number with it.

        Args:
            params: Whose gradients are there.
            numel: Elements of all parameters.
        """
        max_norm = self._optimizer.common_max_grad_norm()
        if max_norm is None or self.way is None:
            yield params, self._scaling, None
        elif self.way == "exact":
            assert self._measured is not None
            yield params, self._scaling, self._measured[0]
        elif self.way == "previous" and self._previous is not None:
            self.measure(params)
            yield params, self._scaling, self._unscaled * coefficient(self._expected_norm(), max_norm)
        else:
            is_spread = self._optimizer._sums_over_ranks({}) is not None
            if self.way == "previous" or is_spread:
                self.measure(params)
            for param in params:
                # Without a norm to go by, each has its share of the whole, which then stays within the limit.
                most = max_norm * (1.0 if self.way == "parameter" else math.sqrt(param.numel() / numel))
                if is_spread:  # a step knows the norm of what is here alone
                    (place,) = _places(self._listed([param]))
                    multiplier, norm = clip(float(pairwise_sum(self._sums[place])), self._unscaled, most)
                    self.note(torch.tensor(norm, dtype=torch.float32, device="cpu"))
                    yield [param], self._scaling, multiplier
                else:
                    yield [param], Scaling(self._scaling.grad_scale, None, most), None

    def note(self, norm: Tensor) -> None:
        """Notes the norm that some parameters were clipped to by themselves."""
        self._norms.append(norm)

    def _expected_norm(self) -> float:
        """The norm of the step before, changed as much as that of the gradients that are there."""
        assert self._previous is not None
        now, before = self._seen
        return self._previous * math.sqrt(now / before) if before > 0 else self._previous

    def _total(self) -> float:
        """The sum of squares of all gradients measured, as a usual step finds it."""
        sums = [self._sums[place].cpu() for place in sorted(self._sums)]
        return float(pairwise_sum(torch.cat(sums))) if sums else 0.0

    # ---- a step ------------------------------------------------------------------------------------

    def end(self) -> Tensor | None:
        """The norm of all gradients of the step, if they were clipped; the next step goes by it."""
        norm = self._norm()
        if norm is not None and math.isfinite(norm):
            self._previous = float(norm)
            if self.way == "previous":
                self._before = {place: float(found.sum()) for place, found in self._sums.items()}
        return norm

    def _norm(self) -> Tensor | None:
        if self.way == "parameter" and self._norms:
            norms = torch.stack([norm.double().to(self._norms[0].device) for norm in self._norms])
            return norms.square().sum().sqrt().float()
        if not self._sums:
            return None
        norm = self._measured[1] if self._measured is not None else math.sqrt(self._total()) * self._unscaled
        return torch.tensor(norm, dtype=torch.float32, device="cpu")
