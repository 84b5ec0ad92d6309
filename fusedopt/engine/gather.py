"""Gathers the tensors of one step for the backends that take it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import backends
from ..backends import DeviceSession, GroupStep, ParamStep, Scaling, Session
from ..backends.base import Health, Spread, SquareSums
from ..offload.stream import Streamer, can_stream, check_read_on_host, is_streamed, on_device
from ..reference.norm import CHUNK, clip, pairwise_sum, square_sums
from ..storage import masters
from ..storage.allocation import permuted_strides
from ..storage.placement import Place
from ..storage.state import DTYPES, keeps_own_precision
from . import sharding
from .collectives import Agreement, Meshes
from .contract import Contract
from .plain import base, dense, is_plain_memory, nothing
from .sessions import streamer_of


def _chunks_of(grad: Tensor) -> int:
    """How many chunks the sum of squares of a gradient is taken in."""
    return -(-grad.numel() * (2 if grad.is_complex() else 1) // CHUNK)


T = TypeVar("T")

# A param group, a parameter of it, and its gradient.
Listed = tuple[dict[str, Any], Tensor, Tensor]


class Ranks(NamedTuple):
    """Other processes that step the same parameters, or other parts of them."""

    agreement: Agreement
    optimizer: Contract
    meshes: Meshes

    def total(self, sums: dict[tuple[Any, Any], float], found_inf: float) -> tuple[float, float]:
        """See Agreement.total."""
        return self.agreement.total(self.optimizer, self.meshes, sums, found_inf)


class Member(NamedTuple):
    """A parameter's place: in the param groups, and in the GroupSteps. They sort as the param groups list them."""

    group: int
    position: int
    part: int
    entry: int


def clipped(square_sum: float, multiplier: float, scaling: Scaling) -> tuple[float | None, Tensor]:
    """What gradients are multiplied by to have at most a norm, and the norm; None if it is too large for any step."""
    assert scaling.max_grad_norm is not None
    multiplier, norm = clip(square_sum, multiplier, scaling.max_grad_norm)
    skips = scaling.skip_step_above is not None and not norm <= scaling.skip_step_above  # a norm that is NaN, too
    return None if skips else multiplier, torch.tensor(norm, dtype=torch.float32, device="cpu")


def _was_left_out(scaling: Scaling, norm: Tensor | None, sums: SquareSums) -> bool:
    """Whether a device has left a step out; it has told sums of squares of the updates, and so is waited for already.

    The norm is rounded, so one that is close to the limit does not tell. But what has moved was stepped.
    """
    if any(update for update, _ in sums.values()):
        return False
    is_above = scaling.skip_step_above is not None and norm is not None and not float(norm) <= scaling.skip_step_above
    return is_above or (scaling.found_inf is not None and bool(scaling.found_inf.item()))


class Gathered:
    """The tensors of one step, by backend, and the copies to write back.

    Args:
        sessions: Of every backend.
        groups: What is stepped; one or more for a param group.
        positions: Which of its param group's parameters each of them has; None for all.
        takes_sums: Whether gradients are clipped to their norm, whose sum is taken in row-major order.
        spread_of: Where the rest of a param group's parameter is, if rules take sums over whole parameters.
    """

    def __init__(
        self,
        sessions: dict[str, Session],
        groups: list[GroupStep],
        positions: list[list[int] | None],
        *,
        takes_sums: bool,
        spread_of: Callable[[int, Tensor], Spread | None] | None = None,
    ) -> None:
        self._takes_sums = takes_sums
        self._spread_of = spread_of
        self.ranks: Ranks | None = None
        self.sessions = sessions
        self.groups = groups
        self.positions = positions
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._wrappers: list[Tensor] = []
        self._fake: Tensor | None = None
        self.is_taken = False  # the step, unless a device knows better and has not told

    def begin(self) -> None:
        """Forgets the step before."""
        self._copies, self._wrappers, self._fake = [], [], None
        for session in self.sessions.values():
            session.begin(self.groups, self.positions)

    def member(self, part: int, entry: int) -> Member:
        """The place of a parameter that a GroupStep has."""
        positions = self.positions[part]
        return Member(self.groups[part].param_group, entry if positions is None else positions[entry], part, entry)

    def collect(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> list[Member]:
        """Lets each group's first backend take what it can; what is left, in the order of the param groups."""
        self.begin()
        left = []
        for part, (settings, positions) in enumerate(zip(self.groups, self.positions)):
            group = param_groups[settings.param_group]
            params = group["params"]
            if positions is not None and len(positions) < len(params):
                params = [params[i] for i in positions]
            session = self.sessions[backends.first(group["backend"], params).name]
            spread_of = None if self._spread_of is None else partial(self._spread_of, settings.param_group)
            missed = session.collect(part, params, state, spread_of)
            left += [self.member(part, entry) for entry in missed]
        return sorted(left)

    def add(
        self,
        member: Member,
        param: Tensor,
        grad: Tensor,
        held: dict[str, Tensor],
        candidates: Sequence[backends.Backend],
        spread: Spread | None = None,
        place: Place | None = None,
    ) -> None:
        """Hands a checked parameter to the first backend that takes it.

        Args:
            member: Its place in the lists.
            param: The parameter, or what is held here of it.
            grad: Its gradient.
            held: Its state.
            candidates: Backends, the best first.
            spread: Where the rest of it is, if its rule takes sums over all of it.
            place: Where `param` is in the whole, if it does not know that itself.
        """
        local = sharding.local(param)
        if local is not param:
            self._wrappers.append(param)
        if sharding.is_fake(local):
            self._fake = local
            return
        settings = self.groups[member.part]
        kind = masters.kind_of(settings.master, param)
        entry = ParamStep(
            group=member.part,
            position=member.entry,
            param=local,
            grad=sharding.local_grad(grad, param),
            states=tuple(tuple(sharding.local(held[key]) for key in spec.keys_in(held)) for spec in settings.states),
            step=held["step"],
            master=None if kind is None else sharding.local(held[masters.KEYS[kind]]),
            spread=spread,
            **(place or sharding.place(param))._asdict(),
        )
        entry = self._as_it_lies(settings, entry) or self._row_major(entry)
        for backend in candidates:
            if backend.refusal(local) is not None:
                continue
            session = self.sessions[backend.name]
            if is_streamed(entry):
                if isinstance(session, DeviceSession) and can_stream(entry):
                    streamer_of(self.sessions).take(entry, session)
                    return
                entry = on_device(entry, self._copies)
            if session.add(entry):
                return
        names = " or ".join(repr(backend.name) for backend in candidates)
        raise ValueError(
            f"parameter {member.position} of group {member.group}, of shape {tuple(param.shape)}, cannot be stepped by "
            f"backend={names} as it is sharded: its rule takes sums over the whole, or its shards are no evenly spread "
            "runs of elements; use backend='auto'"
        )

    def _as_it_lies(self, settings: GroupStep, entry: ParamStep) -> ParamStep | None:
        """A parameter in another order than row-major, such as channels_last, as a run of memory; None if it is none.

        Its gradient and states lie in the same order then, and nothing depends on an element's place: no sums, no
        random bits, no blocks.
        """
        strides = None if self._takes_sums or settings.takes_sums else permuted_strides(entry.param)
        if strides is None:
            return None
        if entry.param.dtype in masters.SIXTEEN_BIT and settings.rounding != "nearest":
            return None
        for held, rounding in zip(entry.states, settings.roundings):
            if len(held) != 1 or (held[0].dtype in masters.SIXTEEN_BIT and rounding != "nearest"):
                return None
        grad = self._numbers(entry.grad, entry.param)
        tensors = [entry.param, *(held for (held,) in entry.states), *([] if entry.master is None else [entry.master])]
        if any(tensor.stride() != strides or not is_plain_memory(tensor) for tensor in tensors):
            return None
        if grad.stride() != strides or not is_plain_memory(grad):
            grad = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        run = ((entry.param.numel(),), (1,))
        return replace(
            entry,
            param=base(entry.param).as_strided(*run),
            grad=grad.as_strided(*run),
            states=tuple((held.as_strided(*run),) for (held,) in entry.states),
            master=None if entry.master is None else entry.master.as_strided(*run),
        )

    def _row_major(self, entry: ParamStep) -> ParamStep:
        """A parameter whose tensors lie in row-major order, in copies where they do not."""
        return replace(
            entry,
            param=self._plain(entry.param),
            grad=self._numbers(entry.grad, entry.param).contiguous().resolve_neg().resolve_conj(),
            states=tuple(tuple(self._plain(tensor) for tensor in held) for held in entry.states),
            master=None if entry.master is None else self._plain(entry.master),
        )

    def _plain(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is plain and contiguous, else a copy that `write_back` returns."""
        tensor = base(tensor)
        if tensor.is_contiguous() and is_plain_memory(tensor):
            return tensor
        copy = tensor.clone(memory_format=torch.contiguous_format).resolve_neg()
        self._copies.append((tensor, copy))
        return copy

    @staticmethod
    def _numbers(grad: Tensor, param: Tensor) -> Tensor:
        """The gradient with a number for every element, in a dtype that goes with the parameter's."""
        grad = dense(grad.detach())
        return grad if keeps_own_precision(param) or grad.dtype in DTYPES.values() else grad.float()

    def _chunk_sums(self, grads: list[Tensor]) -> list[Tensor]:
        """The sums of squares of local gradients, in list order, before any multiplier: one tensor, or one of each."""
        active = [session for session in self.sessions.values() if len(session) > 0]
        if len(active) == 1 and not (isinstance(active[0], DeviceSession) and active[0].device() is None):
            return [active[0].square_sums()]
        apart = [
            s for s in active if isinstance(s, Streamer) or (isinstance(s, DeviceSession) and s.device() is not None)
        ]
        if active and len(apart) == len(active):
            sums: dict[tuple[int, int], Tensor] = {}
            for session in apart:
                sums |= session.sums_by_place()
            return [torch.cat([sums[place].cpu() for place in sorted(sums)])]
        # List order runs across backends: the reference takes them all.
        return [square_sums(dense(grad)).cpu() for grad in grads]

    def square_sums(self, listed: Iterable[Listed]) -> list[Tensor]:
        """The sums of squares by chunk of each gradient; all of them are here."""
        grads = [sharding.local_grad(grad, param) for _, param, grad in listed]
        sums = self._chunk_sums(grads)
        return list(torch.split(torch.cat(sums) if sums else nothing(), [_chunks_of(grad) for grad in grads]))

    def square_sum(self, listed: Iterable[Listed]) -> float:
        """The sum of squares of gradients that are all here."""
        sums = self._chunk_sums([sharding.local(grad) for _, _, grad in listed])
        return float(pairwise_sum(torch.cat(sums) if sums else nothing()).item())

    def square_sums_by_place(self, meshes: Meshes, listed: Iterable[Listed]) -> dict[tuple[Any, Any], float]:
        """The sums of squares here, by (mesh or None, explicit group or None); of replicas those of one rank."""
        grads: list[Tensor] = []
        places: list[tuple[Any, Any] | None] = []
        for group, param, grad in listed:
            grads.append(sharding.local_grad(grad, param))
            mesh = param.device_mesh if sharding.is_dtensor(param) else None  # type: ignore[attr-defined]
            counts = mesh is None or meshes.counts_here(mesh, param)
            places.append((mesh, group["grad_norm_group"]) if counts else None)
        parts = self._chunk_sums(grads)
        if len(parts) == 1:
            parts = list(torch.split(parts[0], [_chunks_of(grad) for grad in grads]))
        found: dict[tuple[Any, Any], list[Tensor]] = {}
        for place, part in zip(places, parts):
            if place is not None:
                found.setdefault(place, []).append(part)
        return {place: float(pairwise_sum(torch.cat(parts)).item()) for place, parts in found.items()}

    def step(
        self,
        scaling: Scaling,
        listed: Iterable[Listed],
        *,
        counts_health: bool = False,
        square_sums: SquareSums | None = None,
        waits: bool = False,
    ) -> tuple[Health, Tensor | None]:
        """Steps everything, negating gradients where a group maximizes.

        Args:
            scaling: What gradients are multiplied by.
            listed: All that has a gradient, in list order.
            counts_health: Whether to count what goes wrong.
            square_sums: Takes the sums of what was stepped, if it is given.
            waits: Whether to learn from a device if the step is taken, before it is; `is_taken` is sure then.

        Returns:
            What was counted, and the gradient norm if it was clipped to. If gradients were found not to be finite,
            nothing has changed. Fake tensors have no numbers to change: nothing is done then.
        """
        if self._fake is not None:
            if scaling.max_grad_norm is None:
                return {}, None
            return {}, self._fake.new_empty((), dtype=torch.float32, device=self._fake.device)
        active = [session for session in self.sessions.values() if len(session) > 0]
        is_on_one = len(active) == 1 and isinstance(active[0], DeviceSession) and active[0].device() is not None
        if is_on_one and not waits and (self.ranks is None or not self._meets(scaling)):
            # This waits for nothing.
            self.is_taken = True
            sums: SquareSums | None = None if square_sums is None else {}
            counted, norm = active[0].step_scaled(  # type: ignore[attr-defined]
                self._signs(), scaling, counts_health=counts_health, square_sums=sums
            )
            if square_sums is not None and sums:
                self.is_taken = not _was_left_out(scaling, norm, sums)
                square_sums.update(self._by_member(sums) if self.is_taken else {})
            return self._by_member(counted), norm
        multiplier, norm = self.multiplier(scaling, listed)
        if multiplier is None:
            return {}, norm
        return self.step_times(multiplier, counts_health=counts_health, square_sums=square_sums), norm

    def _meets(self, scaling: Scaling) -> bool:
        """Whether ranks have something to tell each other before they step, or will meet within the step."""
        is_summed = self.ranks is not None and self.ranks.optimizer.takes_sums
        return is_summed or scaling.max_grad_norm is not None or scaling.found_inf is not None

    def multiplier(self, scaling: Scaling, listed: Iterable[Listed]) -> tuple[float | None, Tensor | None]:
        """What gradients are multiplied by, and the norm if they are clipped to one; waits for devices, and ranks.

        None instead of a number, and nothing is to be stepped, if gradients were found not to be finite, or their norm
        to be too large.
        """
        check_read_on_host(scaling)
        found_inf = 0.0 if scaling.found_inf is None else float(scaling.found_inf.item())
        square_sum = 0.0
        if self.ranks is not None and self._meets(scaling):
            clips = scaling.max_grad_norm is not None
            sums = self.square_sums_by_place(self.ranks.meshes, listed) if clips else {}
            square_sum, found_inf = self.ranks.total(sums, found_inf)
        if found_inf:
            return None, None
        multiplier = 1.0 if scaling.grad_scale is None else 1.0 / float(scaling.grad_scale.item())
        if scaling.max_grad_norm is None:
            return multiplier, None
        if self.ranks is None:
            square_sum = self.square_sum(listed)
        return clipped(square_sum, multiplier, scaling)

    def step_times(
        self, multiplier: float, *, counts_health: bool = False, square_sums: SquareSums | None = None
    ) -> Health:
        """Steps everything, gradients times a number; returns what was counted. See `step`."""
        self.is_taken = True
        multipliers = [sign * multiplier for sign in self._signs()]
        active = [session for session in self.sessions.values() if len(session) > 0]
        sums: SquareSums | None = None if square_sums is None else {}
        steps = [s.summing_step(multipliers, counts_health=counts_health, square_sums=sums) for s in active]
        found = {place: each for counted in backends.taken(backends.together(steps)) for place, each in counted.items()}
        if square_sums is not None and sums:
            square_sums.update(self._by_member(sums))
        return self._by_member(found)

    def _signs(self) -> list[float]:
        return [-1.0 if group.maximize else 1.0 for group in self.groups]

    def _by_member(self, counted: dict[tuple[int, int], T]) -> dict[tuple[int, int], T]:
        return {self.member(*place)[:2]: counts for place, counts in counted.items()}

    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        if self._wrappers:  # autograd counts their versions apart from those of what they wrap
            torch.autograd.graph.increment_version(self._wrappers)
