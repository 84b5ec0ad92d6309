"""Hooks on parameters that live no longer than the optimizer that they step with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Taker(Protocol):
    """What takes gradients as they come."""

    def _take(self, param: Tensor) -> None:
        """Called when a parameter's gradient is complete."""


class _Hook:
    """Tells a release of a parameter's gradient, without keeping it alive."""

    def __init__(self, taker: Taker) -> None:
        self.taker = weakref.ref(taker)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, param: Tensor) -> None:
        taker = self.taker()
        if taker is not None:
            taker._take(param)


class Hooks(dict[Tensor, Any]):
    """What was registered on each of an optimizer's parameters.

    Parameters outlive optimizers. If one that is gone were still told of gradients, it would go on stepping beside the
    next one.
    """

    _tie: weakref.finalize[Any, Any] | None = None

    def tie_to(self, optimizer: object) -> None:
        """Has all hooks removed when an optimizer is gone."""
        self._tie = weakref.finalize(optimizer, self.remove_all)
        self._tie.atexit = False

    def add(self, param: Tensor, taker: Taker) -> None:
        """Hooks a parameter."""
        self[param] = param.register_post_accumulate_grad_hook(_Hook(taker))  # type: ignore[no-untyped-call]

    def remove_all(self) -> None:
        """Removes all of them."""
        if self._tie is not None:
            self._tie.detach()
        while self:
            self.popitem()[1].remove()


class Listing(dict[Tensor, tuple[int, int]]):
    """Where each parameter of an optimizer is listed first: its param group, and its position there."""

    @classmethod
    def of(cls, param_groups: list[dict[str, Any]]) -> Listing:
        """That of param groups as they are now."""
        found = cls()
        for index, group in enumerate(param_groups):
            for position, param in enumerate(group["params"]):
                found.setdefault(param, (index, position))
        return found

    def positions(self, params: Iterable[Tensor], groups: int) -> list[list[int]]:
        """Positions by group, in order, of some parameters."""
        listed: list[list[int]] = [[] for _ in range(groups)]
        for index, position in sorted(self[param] for param in params):
            listed[index].append(position)
        return listed

    def where(self, param: Tensor, param_groups: list[dict[str, Any]]) -> str:
        """Names a parameter."""
        index, position = self[param]
        names = param_groups[index].get("param_names")
        return f"parameter {position} of group {index}" + (f" ({names[position]!r})" if names else "")


def check_free(params: Iterable[Tensor], taker: Taker, where: Callable[[Tensor], str]) -> None:
    """Raises ValueError if somebody else takes the gradients of one of these parameters as they come.

    Args:
        params: That are to be hooked.
        taker: Whose hooks may be there already.
        where: Names a parameter.
    """
    for param in params:
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        others = [hook.taker() for hook in hooks.values() if isinstance(hook, _Hook)]
        if any(other is not None and other is not taker for other in others):
            raise ValueError(
                f"the gradient of {where(param)} is stepped and freed by another optimizer already, which releases "
                "gradients; call remove() of its handle (release_handle of that optimizer) first"
            )
