"""Gradients stepped and freed as the backward pass makes them, so that a model never has them all at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..backends import Scaling
from ..backends.base import Health
from .clipping import Clipping, Steps, check_clip
from .hooks import Hooks, Listing, check_free
from .passes import Passes, check_reducers, check_shards


class Release:
    """Steps an optimizer's parameters during the backward pass; `release_gradients` makes it.

    It is a context manager, at whose end the usual steps come back.
    """

    def __init__(self, optimizer: Steps, bucket_numel: int, clip: str | None, loss_scale: float) -> None:
        # The optimizer keeps this handle, and is gone, and its hooks with it, as soon as nobody uses it any more.
        self._owner = weakref.ref(optimizer)
        self._bucket_numel = bucket_numel
        self._places = Listing()
        self._clipping = Clipping(optimizer, clip, loss_scale, self._places)
        self._hooks = Hooks()
        self._passes = Passes()
        self._accumulates = False
        self._is_measuring: bool | None = None  # in an exact backward: whether its first pass is on, or its second
        self._is_checked = False  # that nobody else reduces gradients
        self._begin()
        self.attach()
        self._hooks.tie_to(optimizer)

    @property
    def _optimizer(self) -> Steps:
        optimizer = self._owner()
        if optimizer is None:
            raise ValueError(
                "the optimizer whose gradients this handle releases is gone: nothing refers to it any more; keep it "
                "for as long as you train, or call release_gradients with the one that you use"
            )
        return optimizer

    def _begin(self) -> None:
        """Forgets everything of a step."""
        self._passes.clear()
        self._stepped: set[Tensor] = set()
        self._pending: dict[Tensor, None] = {}
        self._pending_numel = 0
        self._clipping.begin()
        self._counts: Health = {}
        self._optimizer._forget_recorded()
        self._settings: list[dict[str, Any]] | None = None
        self._refusal = ""  # why what there is cannot be stepped

    def attach(self) -> None:
        """Hooks the parameters that are listed now, and lets go of those that are not.

        Groups are added, parameters are trained from now on, and frameworks put others in their places, as accelerate
        does with the DTensors of FSDP2.

        Raises:
            ValueError: The gradients of what is listed now cannot be released. Nothing has changed then.
        """
        groups = self._optimizer.param_groups
        places = Listing.of(groups)
        new = [param for param in places if param not in self._places]
        gone = [param for param in self._places if param not in places]
        unhooked = [param for param in places if param.requires_grad and param not in self._hooks]
        check_free(unhooked, self, lambda param: places.where(param, groups))
        if new:
            check_shards(self._optimizer, new)
            self._is_checked = False
        self._places.clear()
        self._places.update(places)
        for param in gone:
            self._stepped.discard(param)
            if param in self._pending:
                del self._pending[param]
                self._pending_numel -= param.numel()
            if param in self._hooks:
                self._hooks.pop(param).remove()
        for param in unhooked:
            self._hooks.add(param, self)

    def gradient_bytes(self) -> int:
        """Bytes of the gradients that there are at one time, at most."""
        largest = max((param.numel() for param in self._hooks), default=0)
        widest = max((param.element_size() for param in self._hooks), default=0)
        return (self._bucket_numel - 1 + largest) * widest

    # ---- a user's side -----------------------------------------------------------------------------

    def remove(self) -> None:
        """Lets the usual steps come back. Gradients that wait to be stepped are stepped by the next one."""
        self._hooks.remove_all()
        optimizer = self._owner()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None

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
        is_removed = self._optimizer._release is not self
        if not is_removed:
            self.attach()
        loss = loss_fn if isinstance(loss_fn, Tensor) else loss_fn()
        if self._clipping.way != "exact" or self._accumulates or is_removed:
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        # Gradients that were accumulated are added to here and cannot be made again: they stay.
        self._kept = {param for param in self._hooks if param.grad is not None}
        try:
            self._is_measuring = True
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self._measure_and_free()
            self._clipping.measure(self._kept)
            self._clipping.end_measuring()
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
        return self._clipping.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self._clipping.load_state_dict(state_dict)

    # ---- during a backward pass --------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        """Called when a parameter's gradient is complete."""
        with self._optimizer._lock:
            if self._accumulates:
                return
            if not self._is_in_place(param):
                self.attach()
                if param not in self._hooks:
                    return  # the optimizer's no more
            self._check_reducers()
            if not self._passes.enter():
                self._begin()
                self._passes.enter()
            self._check_first(param)
            if self._settings is None:
                self._begin_step()
            if self._clipping.way == "exact" and self._is_measuring is None:
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

    def _is_in_place(self, param: Tensor) -> bool:
        """Whether a parameter is still listed where it was."""
        index, position = self._places[param]
        groups = self._optimizer.param_groups
        return (
            index < len(groups)
            and position < len(groups[index]["params"])
            and (groups[index]["params"][position] is param)
        )

    def _where(self, param: Tensor) -> str:
        return self._places.where(param, self._optimizer.param_groups)

    def _listed(self, params: Iterable[Tensor]) -> list[list[int]]:
        """Positions by group, in order."""
        return self._places.positions(params, len(self._optimizer.param_groups))

    def _begin_step(self) -> None:
        """Raises ValueError or TypeError if no step may be taken now, else notes with which options one is."""
        self._optimizer.before_step()
        check_clip(self._optimizer, self._clipping.way)
        self._settings = self._current_settings()

    def _flush(self) -> None:
        """Steps and frees what is pending."""
        params = list(self._pending)
        if not params:
            return
        if self._settings is None:
            self._begin_step()
        numel = sum(param.numel() for param in self._hooks)
        for some, scaling, multiplier in self._clipping.parts(params, numel):
            self._step(some, scaling, multiplier)
        self._free()

    def _step(self, params: list[Tensor], scaling: Scaling, multiplier: float | None) -> None:
        counts, norm = self._optimizer._step_some(self._listed(params), scaling, multiplier)
        self._counts |= counts
        self._stepped.update(params)
        if norm is not None:
            self._clipping.note(norm)

    def _measure_and_free(self) -> None:
        self._clipping.measure(self._pending)
        self._free()

    def _free(self) -> None:
        for param in self._pending:
            param.grad = None
        self._pending.clear()
        self._pending_numel = 0

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
        """The rest of a step: steps what is pending, was accumulated, or came before there was a hook, and counts."""
        self.attach()
        self._check_step()
        if self._settings is None:
            self._optimizer.before_step()
        for param in self._places:
            if param.grad is not None and param not in self._pending:
                self._pending[param] = None
        if self._clipping.way == "exact" and not self._clipping.is_measured() and self._pending:
            self._clipping.measure(self._pending)  # all gradients are here: there was no backward pass that steps
            self._clipping.end_measuring()
        self._flush()
        norm = self._clipping.end()
        if norm is not None or self._clipping.way is None:
            self._optimizer.last_grad_norm = norm
        self._optimizer._count_step(self._counts)
        self._optimizer.after_step()
        self._begin()
