"""Steps of some parameters at a time: as gradients come, and as states on a disk are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import Scaling
from ..backends.base import Health
from ..backends.cpu import CpuSession
from ..offload.disk import read_ahead, windows
from ..offload.host import HostSide, Inner
from ..offload.host import windows as windows_of
from ..offload.stream import Streamer
from ..reference.norm import clip, pairwise_sum
from . import members, reports
from .contract import Contract
from .gather import STREAMED, Gathered, Listed, Ranks, let_go


class Partial(Contract):
    """An optimizer that can step some of its parameters."""

    _health: reports.HealthRecord | None = None
    _repeats = False  # whether a group lists a parameter more than once; kept where param groups change

    def _gather(self, listed: Sequence[list[int]] | None = None) -> Gathered:
        """Everything that a step of what is at these positions of each group touches, checked."""
        raise NotImplementedError

    def _streamer(self) -> Streamer:
        """What streams states that are on the host."""
        streamer = self._sessions()[STREAMED]
        assert isinstance(streamer, Streamer)
        return streamer

    @property
    def state(self) -> Any:
        """Each parameter's states; what steps still copy to the host is waited for."""
        if "_session_cache" in self.__dict__:
            self._streamer().wait()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def _uses_host(self) -> bool:
        """Whether some parameters are stepped on the host, though they are on a device."""
        return any(group["step_device"] is not None for group in self.param_groups)

    def _on_host(self) -> tuple[HostSide, Inner]:
        """What steps parameters of a device on the host, and the optimizer that it does so with."""
        if "_host_side" not in self.__dict__:
            self._host_side = HostSide(self._inner)
        inner = self._host_side.mirror(self.param_groups, self.__dict__["state"])
        inner._health = self._health  # counted there, added up here
        inner._repeats = self._repeats
        return self._host_side, inner

    def _inner(self, param_groups: list[dict[str, Any]]) -> Inner:
        """An optimizer of the same kind, as unpickling makes one."""
        inner = type(self).__new__(type(self))
        inner.__setstate__({"defaults": self.defaults, "state": defaultdict(dict), "param_groups": param_groups})
        session = inner._sessions()["cpu"]
        assert isinstance(session, CpuSession)
        session.threads = max((group["host_threads"] or 0 for group in param_groups), default=0) or None
        return inner

    def _step_on_host(self, scaling: Scaling) -> tuple[Health, Tensor | None]:
        """Steps everything on the host, some parameters while others are copied."""
        side, inner = self._on_host()
        parts = windows_of(self.param_groups)
        counts: Health = {}
        norm = None
        try:
            side.check(inner, [param for params, _ in parts for param in params])
            if scaling.max_grad_norm is not None or scaling.found_inf is not None:
                params = [param for some, _ in parts for param in some]
                listed = [[i for _, places in parts for i in places[index]] for index in range(len(self.param_groups))]
                parts = [(params, listed)] if params else []
            for params, listed in parts:
                is_one = len(parts) == 1
                found, norm = side.step_some(inner, params, listed, scaling, None, later=not is_one)
                counts |= found
        finally:
            counts |= side.join()
        return counts, norm

    def _step_in_windows(self, scaling: Scaling) -> tuple[Health, Tensor | None]:
        """Steps some parameters after the others, so that states on a disk are read ahead and go again."""
        try:
            self._gather()  # checks everything, and makes states
        finally:
            let_go(self._sessions())
        listed = windows(self.param_groups, self.state)
        if scaling.found_inf is not None and scaling.found_inf.item():
            return {}, None
        multiplier = 1.0 if scaling.grad_scale is None else 1.0 / float(scaling.grad_scale.item())
        norm = None
        if scaling.max_grad_norm is not None:
            sums = [part for window in listed for part in self._square_sums(window)]
            total = float(pairwise_sum(torch.cat(sums))) if sums else 0.0
            multiplier, found = clip(total, multiplier, scaling.max_grad_norm)
            norm = torch.tensor(found, dtype=torch.float32, device="cpu")
        counts: Health = {}
        for window in read_ahead(self.param_groups, self.state, listed):
            counts |= self._step_some(window, scaling, multiplier)[0]
        return counts, norm

    def _count_step(self, counts: Health) -> None:
        """Notes what a whole step counted."""
        if self._uses_host():
            counts |= self._on_host()[0].join()
        if self._health is not None:
            self._health.add(counts)

    def _before_some(self) -> None:
        """Called before parameters are stepped, their gradients at hand."""

    def _step_some(
        self,
        listed: Sequence[list[int]] | None,
        scaling: Scaling,
        multiplier: float | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[Health, Tensor | None]:
        """Steps all parameters, or those that are listed first at these positions of each group.

        Args:
            listed: Positions by group; None for all.
            scaling: What gradients are multiplied by.
            multiplier: What they are multiplied by instead.
            ranks: Other processes that step the same parameters, or other parts of them.

        Returns:
            What was counted, and the norm of their gradients if they were clipped to it.
        """
        if listed is not None and self._uses_host():
            side, inner = self._on_host()
            params, later = self._params(listed), scaling.max_grad_norm is None
            return side.step_some(inner, params, list(listed), scaling, multiplier, later=later)
        self._before_some()
        rounds = members.rounds(self.param_groups, listed) if self._repeats else [listed]
        counts: Health = {}
        norm = None
        new = members.unstepped(self.param_groups, self.state) if self._repeats and self.begins_in_first_step else set()
        try:
            for number, places in enumerate(rounds):
                if number > 0 and places is not None:
                    members.begin_anew(self, places, new)
                gathered = self._gather(places)
                gathered.ranks = ranks if number == 0 else None
                if len(rounds) == 1 and multiplier is None:
                    found, norm = gathered.step(scaling, self._listed(places), counts_health=self._health is not None)
                else:
                    if multiplier is None:  # once: a gradient counts once in the norm, however often it is listed
                        multiplier, norm = gathered.multiplier(scaling, self._listed(places))
                    if multiplier is None:
                        break
                    found = gathered.step_times(multiplier, counts_health=self._health is not None)
                counts |= found
                gathered.write_back()
        finally:
            let_go(self._sessions())
        return counts, norm

    def _square_sums(self, listed: Sequence[list[int]]) -> list[Tensor]:
        """The sums of squares of the gradients at these positions of each group, by reduction chunk."""
        if self._uses_host():
            side, inner = self._on_host()
            return side.square_sums(inner, self._params(listed), list(listed))
        try:
            return self._gather(listed).square_sums(self._listed(listed))
        finally:
            let_go(self._sessions())

    def _params(self, listed: Sequence[list[int]]) -> list[Tensor]:
        return [group["params"][i] for group, places in zip(self.param_groups, listed) for i in places]

    def _listed(self, listed: Sequence[list[int]] | None) -> Iterator[Listed]:
        """What has a gradient at these positions, or anywhere, in list order."""
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            chosen = params if listed is None else (params[i] for i in listed[index])
            yield from ((group, param, param.grad) for param in chosen if param.grad is not None)
