"""A step under torch.compile: one operator that it traces as it is.

The operator takes every tensor as an argument, so a Tensor lr and the step counts are inputs of the graph and
changing them does not recompile. It runs the same sessions as an uncompiled step. What differs between param
groups comes as lists with one element per GroupStep: a list for each field (_COLUMNS), and hyperparameters by name.
`lrs`, `sizes`, `state_keys` and `backends` have one element per param group. Names within an element are joined by
commas, what differs between its parameters by semicolons.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import GroupStep, Scaling, candidates
from ..storage.state import StateSpec
from . import sharding
from .contract import Contract
from .gather import Gathered, Listed, Member, Ranks
from .sessions import all_sessions, let_go, size_buffers, streamer_of
from .shard_sums import shard_sums


class _Column(NamedTuple):
    """How the operator is given one field of every GroupStep: as a list of numbers or of texts."""

    kind: str  # of an element, in the operator's schema
    write: Callable[[Any], Any] = lambda value: value
    read: Callable[[Any], Any] = lambda value: value


def _spec_text(spec: StateSpec) -> str:
    """What backends need of a state: name, sign, and the extent if it is not of every element."""
    extent = "" if spec.extent == "elements" else ("folded " if spec.is_folded else "") + spec.extent
    return spec.name + ("-" if spec.is_signed else "+") + extent


def _spec(text: str) -> StateSpec:
    sign = "-" if "-" in text else "+"
    name, _, extent = text.partition(sign)
    is_folded = extent.startswith("folded ")
    extent = extent.removeprefix("folded ") or "elements"
    return StateSpec(name, is_signed=sign == "-", extent=extent, is_folded=is_folded)


def _specs_text(specs: Sequence[StateSpec]) -> str:
    return ",".join([_spec_text(spec) for spec in specs])


def _specs(text: str) -> tuple[StateSpec, ...]:
    return tuple(_spec(word) for word in _words(text))


def _words(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(",")) if joined else ()


# The fields of a GroupStep, but for its hyperparameters: those are numbers that may change without recompiling.
_COLUMNS = {
    "rule": _Column("str"),
    "states": _Column("str", _specs_text, _specs),
    "roundings": _Column("str", lambda roundings: ",".join(roundings), _words),
    "seed": _Column("int"),
    "maximize": _Column("bool"),
    "rounding": _Column("str"),
    "master": _Column("str", lambda master: master or "", lambda text: text or None),
    "skips_blocks": _Column("bool"),
    "layout": _Column("str"),
    "param_group": _Column("int"),
}

# Optimizers by their keys, for the sessions that they keep: what a captured step reads lives as long as they do.
_OWNERS: weakref.WeakValueDictionary[str, Contract] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def new_key(optimizer: Contract) -> str:
    """What the operator calls an optimizer; a text, because torch.compile takes numbers for what may change."""
    key = str(next(_numbers))
    _OWNERS[key] = optimizer
    return key


_library = torch.library.Library("fusedopt", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "step_(str optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] held, Tensor(c!)[] steps, Tensor[] lrs, "
    "Tensor(d!)? grad_norm, *, int[] sizes, str[] state_keys, str[] backends, str[] hyper_names, float[] hyper_values, "
    f"bool derives_on_device, float? max_grad_norm, float? skip_step_above, "
    f"{', '.join(f'{c.kind}[] {name}' for name, c in _COLUMNS.items())}"
    ") -> ()"
)


def _step(
    optimizer: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    held: Sequence[Tensor],
    steps: Sequence[Tensor],
    lrs: Sequence[Tensor],
    grad_norm: Tensor | None,
    *,
    sizes: Sequence[int],
    state_keys: Sequence[str],
    backends: Sequence[str],
    hyper_names: Sequence[str],
    hyper_values: Sequence[float],
    derives_on_device: bool,
    max_grad_norm: float | None,
    skip_step_above: float | None,
    **columns: Sequence[Any],
) -> None:
    values, tensors_held = iter(hyper_values), iter(held)
    groups = []
    for names, *cells in zip(hyper_names, *(columns[name] for name in _COLUMNS)):
        fields = {name: column.read(cell) for (name, column), cell in zip(_COLUMNS.items(), cells)}
        lr = lrs[fields["param_group"]]
        on_device = derives_on_device and lr.device.type != "cpu"
        hyper = {"lr": 1.0 if on_device else float(lr.item()), **{name: next(values) for name in names.split(",")}}
        groups.append(GroupStep(hyper=hyper, lr=lr if on_device else None, **fields))
    parts = {(group.param_group, group.layout): part for part, group in enumerate(groups)}
    owner = _OWNERS.get(optimizer)
    with nullcontext() if owner is None else owner._lock:  # a graph may outlive its optimizer
        sessions = all_sessions() if owner is None else owner._sessions()
        if owner is not None:
            size_buffers(sessions, owner.param_groups)
        gathered = Gathered(sessions, groups, [None] * len(groups), takes_sums=max_grad_norm is not None)
        try:
            gathered.begin()
            tensors = iter(zip(params, grads, steps))
            listed: list[Listed] = []
            for i, size in enumerate(sizes):
                entries = state_keys[i].split(";")
                for entry in entries[:size]:
                    param, grad, step = next(tensors)
                    layout, keys, position, kind = entry.split(":")
                    state = {**{key: next(tensors_held) for key in _words(keys)}, "step": step}
                    member = Member(i, int(position), parts[i, layout], int(position))
                    group = {} if owner is None else owner.param_groups[i]
                    whole = _whole(group, int(position)) if kind else param
                    spread = shard_sums(owner, group, whole) if kind and owner is not None else None
                    gathered.add(member, param, grad, state, candidates(backends[i]), spread, sharding.place(whole))
                    listed.append((group, whole, grad))
            if owner is not None and (meshes := owner._agreement().meshes(owner)) is not None:
                gathered.ranks = Ranks(owner._agreement(), owner, meshes)
            scaling = Scaling(max_grad_norm=max_grad_norm, skip_step_above=skip_step_above)
            records = {} if owner is None else owner._recorded()
            counts, norm = gathered.step(scaling, listed, **records)
            gathered.write_back()
            streamer_of(sessions).settle()
            if owner is not None and any(each is not None and each is not False for each in records.values()):
                owner._count_step(counts, gathered.is_taken)
        finally:
            let_go(sessions)
    if norm is not None and grad_norm is not None:
        grad_norm.copy_(norm)


def _whole(group: dict[str, Any], position: int) -> Tensor:
    """The DTensor of which a compiled step was given what is held here."""
    if not group:
        raise RuntimeError("the optimizer of this compiled step, which knows where its shards are, no longer exists")
    param: Tensor = group["params"][position]
    return param


_library.impl("step_", _step, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("fusedopt::step_", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: object, **kwargs: object) -> None:
    return None


def _unwrapped(
    keys: str, params: list[Tensor], grads: list[Tensor], states: list[Tensor], steps: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The lists of `_init_group` with what is held here of DTensors; torch.compile traces this.

    The operator has no DTensors for arguments: how it is to be sharded is nothing that torch would have to know.
    """
    local_params, local_grads, local_states, at = [], [], [], 0
    for entry, param, grad in zip(keys.split(";"), params, grads):
        parts = entry.split(":")
        count = len(_words(parts[1]))
        held = states[at : at + count]
        at += count
        if parts[3] != "":
            if grad.placements != param.placements:  # type: ignore[attr-defined]
                grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
            param, grad = param.to_local(), grad.to_local()  # type: ignore[attr-defined]
            held = [state.to_local() for state in held]  # type: ignore[attr-defined]
        local_params.append(param)
        local_grads.append(grad)
        local_states += held
    return local_params, local_grads, local_states, steps


def step(optimizer: Contract) -> None:
    """Takes a step while torch.compile traces."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    steps: list[Tensor] = []
    lrs: list[Tensor] = []
    sizes: list[int] = []
    settings: list[GroupStep] = []
    hyper_values: list[float] = []
    state_keys: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        # _init_group is given empty lists: that is what torch.compile knows how to fill
        lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
        # torch.compile takes a group without parameters for a constant, and would hand over a copy
        keys = optimizer._init_group(group, lists[0], lists[1], lists[2], lists[3]) if group["params"] else ""
        if any([entry.split(":")[-1] != "" for entry in keys.split(";")]):  # a DTensor
            lists = _unwrapped(keys, *lists)
        params += lists[0]
        grads += lists[1]
        states += lists[2]
        steps += lists[3]
        sizes.append(len(lists[0]))
        state_keys.append(keys)
        lr = group["lr"]
        # None where the optimizer has a learning rate of its own
        if not isinstance(lr, Tensor):
            lr = torch.tensor(0.0 if lr is None else lr, dtype=torch.float64, device="cpu")
        lrs.append(lr)
        fixed = {**group, "lr": None if group["lr"] is None else 1.0}
        for layout in optimizer.layouts(fixed):
            setting = optimizer.group_step(fixed, layout, index)
            hyper_values += [value for name, value in setting.hyper.items() if name != "lr"]
            settings.append(setting)
    if not params:
        return
    torch.ops.fusedopt.step_(
        optimizer.key,
        params,
        grads,
        states,
        steps,
        lrs,
        optimizer.last_grad_norm if optimizer.common_max_grad_norm() is not None else None,
        sizes=sizes,
        state_keys=state_keys,
        backends=[group["backend"] for group in optimizer.param_groups],
        hyper_names=[",".join([name for name in setting.hyper if name != "lr"]) for setting in settings],
        hyper_values=hyper_values,
        derives_on_device=optimizer.derives_on_device,
        max_grad_norm=optimizer.common_max_grad_norm(),
        skip_step_above=optimizer.common_skip_step_above(),
        **{name: [column.write(getattr(s, name)) for s in settings] for name, column in _COLUMNS.items()},
    )
