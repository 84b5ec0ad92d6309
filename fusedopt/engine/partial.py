"""Steps of some parameters at a time: as gradients come, on the host, and as states on a disk are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import Scaling
from ..backends.base import Health
from ..backends.cpu import CpuSession
from ..offload import homes, host
from ..offload.disk import read_ahead, windows
from ..offload.host import HostSide, Inner
from ..offload.runtime import check_not_captured
from ..offload.stream import Streamer
from ..reference.norm import pairwise_sum
from . import members, sharding
from .edits import settle
from .gather import Gathered, Listed, Ranks, clipped
from .reporting import Reporting, is_captured
from .sessions import let_go, streamer_of

_STEPPED_BY_A_THREAD = (
    "step_device='cpu' steps in a thread of the host, which a CUDA graph cannot record; step outside of the graph, or "
    "pass state_device='cpu'"
)


class Partial(Reporting):
    """An optimizer that can step some of its parameters."""

    _repeats = False  # whether a group lists a parameter more than once; kept where param groups change
    _is_taken = False  # whether the last step was, as far as is known without waiting for a device

    def _gather(self, listed: Sequence[list[int]] | None = None) -> Gathered:
        """Everything that a step of what is at these positions of each group touches, checked."""
        raise NotImplementedError

    def _streamer(self) -> Streamer:
        """What streams states that are on the host."""
        return streamer_of(self._sessions())

    @property
    def state(self) -> Any:
        """Each parameter's states; what is still stepped on the host, or copied there, is waited for."""
        if "_host_side" in self.__dict__:
            self._host_side.settle()
        if "_session_cache" in self.__dict__:
            self._streamer().wait()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def _count_step(self, counts: Health, is_taken: bool = True) -> None:
        """Notes what a whole step counted; of one that was left out there are no norms."""
        if "_host_side" in self.__dict__:
            counts |= self._host_side.join()
        self._streamer().settle()
        if self._health is not None:
            self._health.add(counts)
        if not is_taken:
            self._forget_recorded()
        elif self._norms is not None and not is_captured():
            self._norms.end()

    def before_step(self) -> None:
        """Raises ValueError or TypeError if no step may be taken now, or not with the options that were set since."""
        settle(self)
        super().before_step()

    def _before_some(self) -> None:
        """Called before parameters are stepped, their gradients at hand."""

    # ---- some parameters -------------------------------------------------------------------------

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
            return self._step_with_host(list(listed), scaling, multiplier)
        return self._step_here(listed, scaling, multiplier, ranks)

    def _step_here(
        self,
        listed: Sequence[list[int]] | None,
        scaling: Scaling,
        multiplier: float | None = None,
        ranks: Ranks | None = None,
    ) -> tuple[Health, Tensor | None]:
        """See `_step_some`; where the parameters are."""
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
                    waits = self.changes_groups and scaling.may_forbid
                    found, norm = gathered.step(scaling, self._listed(places), waits=waits, **self._recorded())
                    self._is_taken |= gathered.is_taken
                else:
                    if multiplier is None:  # once: a gradient counts once in the norm, however often it is listed
                        multiplier, norm = gathered.multiplier(scaling, self._listed(places))
                    if multiplier is None:
                        break
                    self._is_taken = True
                    found = gathered.step_times(multiplier, **self._recorded())
                counts |= found
                gathered.write_back()
        finally:
            let_go(self._sessions())
        return counts, norm

    def _square_sums(self, listed: Sequence[list[int]]) -> list[Tensor]:
        """The sums of squares of the gradients at these positions of each group, by reduction chunk."""
        if not self._uses_host():
            return self._square_sums_here(listed)
        with self._on_host(listed) as (side, inner, on_host, here):
            found = dict(zip(self._places(on_host), side.square_sums(inner, self._params(on_host), on_host)))
        if any(here):
            found |= dict(zip(self._places(here), self._square_sums_here(here)))
        return [found[place].cpu() for place in sorted(found)]

    def _square_sums_here(self, listed: Sequence[list[int]]) -> list[Tensor]:
        try:
            return self._gather(listed).square_sums(self._listed(listed))
        finally:
            let_go(self._sessions())

    def _params(self, listed: Sequence[list[int]]) -> list[Tensor]:
        return [group["params"][i] for group, places in zip(self.param_groups, listed) for i in places]

    def _places(self, listed: Sequence[list[int]]) -> list[tuple[int, int]]:
        """Where what has a gradient at these positions is listed."""
        groups = enumerate(zip(self.param_groups, listed))
        return [(k, i) for k, (group, places) in groups for i in places if group["params"][i].grad is not None]

    def _listed(self, listed: Sequence[list[int]] | None) -> Iterator[Listed]:
        """What has a gradient at these positions, or anywhere, in list order."""
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            chosen = params if listed is None else (params[i] for i in listed[index])
            yield from ((group, param, param.grad) for param in chosen if param.grad is not None)

    def _multiplier(self, listed: Sequence[list[int]], scaling: Scaling) -> tuple[float | None, Tensor | None]:
        """What the gradients at these positions are multiplied by, and their norm if they are clipped to it.

        None, and nothing is to be stepped, if gradients were found not to be finite, or their norm to be too large.
        """
        if scaling.found_inf is not None and scaling.found_inf.item():
            return None, None
        multiplier = 1.0 if scaling.grad_scale is None else 1.0 / float(scaling.grad_scale.item())
        if scaling.max_grad_norm is None:
            return multiplier, None
        sums = self._square_sums(listed)
        total = float(pairwise_sum(torch.cat(sums))) if sums else 0.0
        return clipped(total, multiplier, scaling)

    # ---- on the host -----------------------------------------------------------------------------

    def _is_traceable(self) -> bool:
        """Whether torch.compile can trace a step: nothing steps on the host, during a backward pass or repeatedly."""
        if getattr(self, "found_inf", None) is not None or self._repeats or self._release is not None:
            return False
        return not self.changes_groups and all(group["step_device"] is None for group in self.param_groups)

    def _uses_host(self) -> bool:
        """Whether some parameters are stepped on the host, though they are on a device."""
        return any(
            group["step_device"] is not None
            and any(homes.is_stepped_on_host(group, sharding.local(param)) for param in group["params"])
            for group in self.param_groups
        )

    @contextmanager
    def _on_host(
        self, listed: Sequence[list[int]]
    ) -> Iterator[tuple[HostSide, Inner, list[list[int]], list[list[int]]]]:
        """What steps parameters of a device on the host, the optimizer that it does so with, and which of those listed.

        The rest of them is the last of the four. The host does not see whether gradients are sparse, so that is checked
        here. Whatever is refused, here or in the context, the next step goes by the options of then.
        """
        params = (sharding.local(param) for group in self.param_groups for param in group["params"])
        check_not_captured(params, _STEPPED_BY_A_THREAD)
        if "_host_side" not in self.__dict__:
            self._host_side = HostSide(partial(_twin_of, type(self), self.defaults))
        side = self._host_side
        try:
            inner = side.mirror(self.param_groups, self.__dict__["state"])
            inner._health, inner._norms = self._health, self._norms  # counted there, added up here
            inner._repeats = self._repeats
            on_host, here = side.split(self.param_groups, listed)
            for index, position in self._places(on_host):
                if self.param_groups[index]["params"][position].grad.layout != torch.strided:
                    members.check_param(self, index, position)
            yield side, inner, on_host, here
        except BaseException:
            side.forget_options()
            raise

    def _step_all_with_host(self, scaling: Scaling, ranks: Ranks | None) -> tuple[Health, Tensor | None]:
        """A whole step, of which the host takes the parameters whose groups ask for it."""
        if ranks is not None:
            raise ValueError(
                "step_device='cpu' steps parameters that are on one device as a whole, and this optimizer has DTensors "
                "or a grad_norm_group; pass step_device=None, or let FSDP2's CPUOffloadPolicy keep parameters on the "
                "CPU, where they are stepped in any case"
            )
        listed = members.with_gradients(self.param_groups)
        with self._on_host(listed) as (side, inner, on_host, here):
            try:
                side.check(inner, self._params(on_host), on_host)
                self._gather(here)  # checks these, too, before anything changes
            finally:
                let_go(self._sessions())
        try:
            counts, norm = self._step_with_host(listed, scaling, None)
        finally:
            late = side.join()
        return counts | late, norm

    def _step_with_host(
        self, listed: list[list[int]], scaling: Scaling, multiplier: float | None
    ) -> tuple[Health, Tensor | None]:
        """See `_step_some`; the host steps its part while this goes on, until `join`."""
        norm = None
        if multiplier is None:
            multiplier, norm = self._multiplier(listed, scaling)
        if multiplier is None:
            return {}, norm
        self._is_taken = True
        with self._on_host(listed) as (side, inner, on_host, here):
            for some in host.windows(self.param_groups, on_host):
                side.step_some(inner, self._params(some), some, multiplier)
            counts = self._step_here(here, scaling, multiplier)[0] if any(here) else {}
        return counts, norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, as torch.optim; weights that come back from the host are waited for.

        They are on their way if a backward pass that released gradients has raised, and there was no step after it.
        """
        if "_host_side" in self.__dict__:
            with self._lock:
                self._host_side.join()
        super().zero_grad(set_to_none)

    # ---- on a disk -------------------------------------------------------------------------------

    def _reads_in_place(self) -> bool:
        """Whether states of some parameters are stepped as they lie in files."""
        return any(
            homes.uses_disk(group)
            and any(homes.is_read_in_place(group, sharding.local(param)) for param in group["params"])
            for group in self.param_groups
        )

    def _step_in_windows(self, scaling: Scaling) -> tuple[Health, Tensor | None]:
        """Steps some parameters after the others, so that states on a disk are read ahead and go again."""
        try:
            self._gather()  # checks everything, and makes states
        finally:
            let_go(self._sessions())
        listed = members.with_gradients(self.param_groups)
        multiplier, norm = self._multiplier(listed, scaling)
        if multiplier is None:
            return {}, norm
        counts: Health = {}
        in_place: list[list[int]] = []
        for group, places in zip(self.param_groups, listed):
            params = group["params"]
            in_place.append([i for i in places if homes.is_read_in_place(group, sharding.local(params[i]))])
        others = [sorted(set(places) - set(mine)) for places, mine in zip(listed, in_place)]
        for window in read_ahead(self.param_groups, self.state, windows(self.param_groups, self.state, in_place)):
            counts |= self._step_here(window, scaling, multiplier)[0]
        if any(others):  # those of a device stream theirs
            counts |= self._step_here(others, scaling, multiplier)[0]
        return counts, norm


def _twin_of(cls: type[Partial], defaults: dict[str, Any], param_groups: list[dict[str, Any]]) -> Inner:
    """An optimizer of the same kind, as unpickling makes one."""
    inner: Any = cls.__new__(cls)
    inner.__setstate__({"defaults": defaults, "state": defaultdict(dict), "param_groups": param_groups})
    session = inner._sessions()["cpu"]
    assert isinstance(session, CpuSession)
    session.threads = max((group["host_threads"] or 0 for group in param_groups), default=0) or None
    found: Inner = inner
    return found
