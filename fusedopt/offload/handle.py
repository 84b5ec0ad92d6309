"""Gradients stepped and freed as the backward pass makes them, so that a model never has them all at once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checks
from ..backends import Scaling
from ..backends.base import Health
from ..reference.norm import coefficient, pairwise_sum
from .passes import Passes, check_reducers


class Steps(Protocol):
    """What is asked of an optimizer: to measure and to step some of its parameters, by group and position."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    last_grad_norm: Tensor | None
    _lock: threading.RLock
    _release: Release | None

    def before_step(self) -> None:
        """Raises ValueError if no step may be taken now."""

    def after_step(self) -> None:
        """Changes param groups after a step that was taken."""

    def common_skip_step_above(self) -> float | None:
        """The norm above which a step is not taken."""

    def common_max_grad_norm(self) -> float | None:
        """The norm that all groups clip to; None if they do not."""

    def _square_sums(self, listed: list[list[int]]) -> list[Tensor]:
        """The sums of squares of each of their gradients, by reduction chunk."""

    def _step_some(
        self, listed: list[list[int]], scaling: Scaling, multiplier: float | None = None
    ) -> tuple[Health, Tensor | None]:
        """Steps them, gradients times a multiplier or as `scaling` says; what was counted, and their norm."""

    def _count_step(self, counts: Health) -> None:
        """Notes what a whole step counted."""


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


class Release:
    """Steps an optimizer's parameters during the backward pass; `release_gradients` makes it.

    It is a context manager, at whose end the usual steps come back.
    """

    def __init__(self, optimizer: Steps, bucket_numel: int, clip: str | None, loss_scale: float) -> None:
        self._optimizer = optimizer
        self._bucket_numel = bucket_numel
        self._clip = clip
        scale = None if loss_scale == 1 else torch.tensor(loss_scale, dtype=torch.float32, device="cpu")
        self._scaling = Scaling(grad_scale=scale)
        self._unscaled = 1.0 if scale is None else 1.0 / float(scale)
        self._places: dict[Tensor, tuple[int, int]] = {}  # where each parameter is listed first
        self._hooks: dict[Tensor, Any] = {}
        self._passes = Passes()
        self._accumulates = False
        self._is_measuring: bool | None = None  # in an exact backward: whether its first pass is on, or its second
        self._previous: float | None = None  # the norm that the step before found
        self._before: dict[tuple[int, int], float] = {}  # and what each parameter had in its square
        self._is_checked = False  # that nobody else reduces gradients
        self._begin()
        self.attach()

    def _begin(self) -> None:
        """Forgets everything of a step."""
        self._passes.clear()
        self._stepped: set[Tensor] = set()
        self._pending: dict[Tensor, None] = {}
        self._pending_numel = 0
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._seen = [0.0, 0.0]  # the sums of those that are there, and what the same had in the step before
        self._norms: list[Tensor] = []  # of single parameters
        self._counts: Health = {}
        self._settings: list[dict[str, Any]] | None = None
        self._refusal = ""  # why what there is cannot be stepped
        self._measured: tuple[float, float] | None = None  # of an exact backward: the multiplier and the norm

    def attach(self) -> None:
        """Hooks parameters that have none yet: those of new groups, and those that are trained from now on."""
        for index, group in enumerate(self._optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                self._places.setdefault(param, (index, position))
                if param.requires_grad and param not in self._hooks:
                    self._hooks[param] = param.register_post_accumulate_grad_hook(self._take)

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that there are at one time, at most."""
        largest = max((param.numel() for param in self._hooks), default=0)
        widest = max((param.element_size() for param in self._hooks), default=0)
        return (self._bucket_numel - 1 + largest) * widest

    # ---- a user's side -----------------------------------------------------------------------------

    def remove(self) -> None:
        """Lets the usual steps come back. Gradients that wait to be stepped are stepped by the next one."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None

    def __enter__(self) -> Release:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keeps and adds up the gradients of backward passes in this context; the first pass after it steps them.

        For all micro-batches of a step but the last. These gradients need their memory, as without release.
        """
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def backward(self, loss_fn: Callable[[], Tensor] | Tensor) -> Tensor:
        """A backward pass; with clip="exact" two, the first of which only measures gradients and frees them.

        Args:
            loss_fn: The loss, or a function that returns it. It is called once, so that dropout is the same in both
                passes; what the graph keeps for a backward pass is kept until the second.

        Returns:
            The loss, detached.

        Raises:
            ValueError: A gradient cannot be stepped, as `step` says.
        """
        loss = loss_fn if isinstance(loss_fn, Tensor) else loss_fn()
        if self._clip != "exact" or self._accumulates:
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        # Gradients that were accumulated are added to here and cannot be made again: they stay.
        self._kept = {param for param in self._hooks if param.grad is not None}
        try:
            self._is_measuring = True
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self._measure_and_free()
            self._measure(self._kept)
            self._measured = self._clipped_to(self._norm())
            self._passes.clear()
            self._is_measuring = False
            rest = [param for param in self._hooks if param.requires_grad and param not in self._kept]
            if not self._kept:
                loss.backward()  # type: ignore[no-untyped-call]
            elif rest:
                loss.backward(inputs=rest)  # type: ignore[no-untyped-call]
        finally:
            self._is_measuring = None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What clip="previous" needs to go on: the norm of the step before, and each parameter's part in it."""
        parts = [[*place, part] for place, part in self._before.items()]
        return {"previous_norm": self._previous, "previous_sums": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        norm = state_dict["previous_norm"]
        self._previous = None if norm is None else checks.nonnegative("previous_norm", norm)
        parts = state_dict.get("previous_sums", [])
        self._before = {(group, position): float(part) for group, position, part in parts}

    # ---- during a backward pass --------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Called when a parameter's gradient is complete."""
        with self._optimizer._lock:
            if self._accumulates:
                return
            self._check_reducers()
            if not self._passes.enter():
                self._begin()
                self._passes.enter()
            self._check_first(param)
            if self._settings is None:
                check_clip(self._optimizer, self._clip)
                self._settings = self._current_settings()
            if self._clip == "exact" and self._is_measuring is None:
                raise ValueError(
                    "clip='exact' has to measure all gradients before any of them is stepped; call "
                    "handle.backward(loss) instead of loss.backward(), or choose clip='previous'"
                )
            if self._is_measuring and param in self._kept:
                return
            self._pending[param] = None
            self._pending_numel += param.numel()
            if self._pending_numel >= self._bucket_numel:
                self._measure_and_free() if self._is_measuring else self._flush()

    def _check_first(self, param: Tensor) -> None:
        if param in self._stepped or param in self._pending:
            self._refusal = (
                f"a second gradient came for {self._where(param)} before optimizer.step(), and the first was stepped "
                "and freed, or is about to be: call step() after each backward pass, wrap all but the last in "
                "handle.accumulate(), or, for a parameter in several checkpoints, pass use_reentrant=False to them; "
                "then zero_grad() and go on"
            )
            raise ValueError(self._refusal)

    def _check_reducers(self) -> None:
        if self._is_checked:
            return
        check_reducers(self._places)
        self._is_checked = True

    def _where(self, param: Tensor) -> str:
        index, position = self._places[param]
        names = self._optimizer.param_groups[index].get("param_names")
        return f"parameter {position} of group {index}" + (f" ({names[position]!r})" if names else "")

    def _listed(self, params: Iterable[Tensor]) -> list[list[int]]:
        """Positions by group, in order."""
        listed: list[list[int]] = [[] for _ in self._optimizer.param_groups]
        for index, position in sorted(self._places[param] for param in params):
            listed[index].append(position)
        return listed

    def _flush(self) -> None:
        """Steps and frees what is pending."""
        params = list(self._pending)
        if not params:
            return
        if self._settings is None:
            check_clip(self._optimizer, self._clip)
            self._optimizer.before_step()
            self._settings = self._current_settings()
        max_norm = self._optimizer.common_max_grad_norm()
        if max_norm is None or self._clip is None:
            self._step(params, self._scaling)
        elif self._clip == "exact":
            assert self._measured is not None
            self._step(params, self._scaling, self._measured[0])
        elif self._clip == "previous" and self._previous is not None:
            self._measure(params)
            self._step(params, self._scaling, self._unscaled * coefficient(self._expected_norm(), max_norm))
        else:
            total = sum(param.numel() for param in self._hooks)
            if self._clip == "previous":
                self._measure(params)
            for param in params:
                # Without a norm to go by, each has its share of the whole, which then stays within the limit.
                share = 1.0 if self._clip == "parameter" else math.sqrt(param.numel() / total)
                self._step([param], Scaling(self._scaling.grad_scale, None, max_norm * share))
        self._free()

    def _step(self, params: list[Tensor], scaling: Scaling, multiplier: float | None = None) -> None:
        counts, norm = self._optimizer._step_some(self._listed(params), scaling, multiplier)
        self._counts |= counts
        self._stepped.update(params)
        if norm is not None:
            self._norms.append(norm)

    def _measure(self, params: Iterable[Tensor]) -> None:
        listed = self._listed(params)
        places = [(index, position) for index, positions in enumerate(listed) for position in positions]
        sums = dict(zip(places, self._optimizer._square_sums(listed)))
        if self._clip == "previous":
            sums = {place: found.cpu() for place, found in sums.items()}  # waited for once
            known = sums.keys() & self._before.keys()
            self._seen[0] += sum(float(sums[place].sum()) for place in sorted(known))
            self._seen[1] += sum(self._before[place] for place in sorted(known))
        self._sums |= sums

    def _measure_and_free(self) -> None:
        self._measure(self._pending)
        self._free()

    def _free(self) -> None:
        for param in self._pending:
            param.grad = None
        self._pending.clear()
        self._pending_numel = 0

    def _expected_norm(self) -> float:
        """The norm of the step before, changed as much as that of the gradients that are there."""
        assert self._previous is not None
        now, before = self._seen
        return self._previous * math.sqrt(now / before) if before > 0 else self._previous

    def _norm(self) -> float:
        """The norm of all gradients measured, as a usual step finds it."""
        sums = [self._sums[place].cpu() for place in sorted(self._sums)]
        total = pairwise_sum(torch.cat(sums)) if sums else torch.zeros((), dtype=torch.float64, device="cpu")
        return math.sqrt(float(total)) * self._unscaled

    def _clipped_to(self, norm: float) -> tuple[float, float]:
        max_norm = self._optimizer.common_max_grad_norm()
        return self._unscaled * (1.0 if max_norm is None else coefficient(norm, max_norm)), norm

    # ---- a step ------------------------------------------------------------------------------------

    def _current_settings(self) -> list[dict[str, Any]]:
        """The options of all param groups; of tensors, which they are and how often they were written to."""
        return [
            {
                key: (id(group[key]), group[key]._version) if isinstance(group[key], Tensor) else group[key]
                for key in self._optimizer.defaults
            }
            for group in self._optimizer.param_groups
        ]

    def _check_step(self) -> None:
        """Raises ValueError if what was stepped in the backward pass is not what this step would step."""
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]  # as GradScaler would
            raise ValueError(
                "GradScaler finds out whether a gradient is inf only when all are there, and released gradients are "
                "stepped and gone by then; train in bfloat16, which needs no scaling, or pass a constant loss_scale "
                "to release_gradients"
            )
        for index, (before, now) in enumerate(zip(self._settings or (), self._current_settings())):
            for key in now:
                if before[key] != now[key]:
                    raise ValueError(
                        f"{key} of group {index} has changed since the backward pass, which has stepped parameters "
                        "with what it was; change it after optimizer.step() or before the backward pass"
                    )
        if self._refusal and any(param.grad is not None for param in self._places):
            raise ValueError(self._refusal)

    def finish(self) -> None:
        """The rest of a step: steps what is pending or was accumulated, and counts."""
        self._check_step()
        if self._settings is None:
            self._optimizer.before_step()
        for param in self._places:
            if param.grad is not None and param not in self._pending:
                self._pending[param] = None
        if self._clip == "exact" and self._measured is None and self._pending:
            self._measure(self._pending)  # all gradients are here: there was no backward pass that steps
            self._measured = self._clipped_to(self._norm())
        self._flush()
        norm = self._norm_found()
        if norm is not None:
            self._optimizer.last_grad_norm = norm
        if norm is not None and math.isfinite(norm):
            self._previous = float(norm)
            if self._clip == "previous":
                self._before = {place: float(found.sum()) for place, found in self._sums.items()}
        self._optimizer._count_step(self._counts)
        self._optimizer.after_step()
        self._begin()
        self.attach()

    def _norm_found(self) -> Tensor | None:
        if self._clip == "parameter" and self._norms:
            norms = torch.stack([norm.double().to(self._norms[0].device) for norm in self._norms])
            return norms.square().sum().sqrt().float()
        if not self._sums:
            return None
        norm = self._measured[1] if self._measured is not None else self._norm()
        return torch.tensor(norm, dtype=torch.float32, device="cpu")
