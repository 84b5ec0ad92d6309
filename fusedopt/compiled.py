"""A step under torch.compile: one operator that it traces as it is.

The operator takes every tensor as an argument, so a Tensor lr and the step counts are inputs of the graph and
changing them does not recompile. It runs the same sessions as an uncompiled step. What differs between param
groups comes as lists with one element per GroupStep; `lrs`, `sizes`, `state_keys` and `backends` have one per param
group. Names within an element are joined by commas, what differs between its parameters by semicolons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends import BACKENDS, GroupStep, Scaling, candidates
from .gather import Gathered, Member
from .state import StateSpec

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_library = torch.library.Library("fusedopt", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, Tensor[] lrs, "
    "Tensor(d!)? grad_norm, *, int[] sizes, int[] param_groups, str[] rules, str[] layouts, str[] hyper_names, "
    "float[] hyper_values, str[] specs, str[] state_keys, str[] roundings, int[] seeds, bool[] maximize, "
    "str[] param_roundings, str[] masters, str[] backends, bool derives_on_device, float? max_grad_norm) -> ()"
)


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    steps: Sequence[Tensor],
    lrs: Sequence[Tensor],
    grad_norm: Tensor | None,
    *,
    sizes: Sequence[int],
    param_groups: Sequence[int],
    rules: Sequence[str],
    layouts: Sequence[str],
    hyper_names: Sequence[str],
    hyper_values: Sequence[float],
    specs: Sequence[str],
    state_keys: Sequence[str],
    roundings: Sequence[str],
    seeds: Sequence[int],
    maximize: Sequence[bool],
    param_roundings: Sequence[str],
    masters: Sequence[str],
    backends: Sequence[str],
    derives_on_device: bool,
    max_grad_norm: float | None,
) -> None:
    values, held = iter(hyper_values), iter(states)
    groups = []
    for i, rule in enumerate(rules):
        lr = lrs[param_groups[i]]
        on_device = derives_on_device and lr.device.type != "cpu"
        hyper = {
            "lr": 1.0 if on_device else float(lr.item()),
            **{name: next(values) for name in hyper_names[i].split(",")},
        }
        groups.append(
            GroupStep(
                rule=rule,
                hyper=hyper,
                states=tuple(_spec(text) for text in _words(specs[i])),
                roundings=_words(roundings[i]),
                seed=seeds[i],
                maximize=maximize[i],
                rounding=param_roundings[i],
                master=masters[i] or None,
                layout=layouts[i],
                param_group=param_groups[i],
                lr=lr if on_device else None,
            )
        )
    parts = {(group.param_group, group.layout): part for part, group in enumerate(groups)}
    gathered = Gathered({name: backend.session() for name, backend in BACKENDS.items()}, groups, [None] * len(groups))
    gathered.begin()
    tensors = iter(zip(params, grads, steps))
    for i, size in enumerate(sizes):
        entries = state_keys[i].split(";")
        for position in range(size):
            param, grad, step = next(tensors)
            layout, _, keys = entries[position].partition(":")
            state = {**{key: next(held) for key in _words(keys)}, "step": step}
            member = Member(i, position, parts[i, layout], position)
            gathered.add(member, param, grad, state, candidates(backends[i]))
    _, norm = gathered.step(Scaling(max_grad_norm=max_grad_norm), grads)
    gathered.write_back()
    if norm is not None and grad_norm is not None:
        grad_norm.copy_(norm)


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


def _words(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(",")) if joined else ()


_library.impl("step_", _step, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("fusedopt::step_", lib=_library)  # type: ignore[untyped-decorator]
def _(*args: object, **kwargs: object) -> None:
    return None


def step(optimizer: FusedOptimizer) -> None:
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
        keys = optimizer._init_group(group, lists[0], lists[1], lists[2], lists[3])
        params += lists[0]
        grads += lists[1]
        states += lists[2]
        steps += lists[3]
        sizes.append(len(lists[0]))
        state_keys.append(keys)
        lr = group["lr"]
        # None where the optimizer has a learning rate of its own
        lrs.append(lr if isinstance(lr, Tensor) else torch.tensor(0.0 if lr is None else lr, dtype=torch.float64))
        fixed = {**group, "lr": None if lr is None else 1.0}
        for layout in optimizer.layouts(fixed):
            setting = optimizer.group_step(fixed, layout, index)
            hyper_values += [value for name, value in setting.hyper.items() if name != "lr"]
            settings.append(setting)
    if not params:
        return
    torch.ops.fusedopt.step_(
        params,
        grads,
        states,
        steps,
        lrs,
        optimizer.last_grad_norm if optimizer._max_grad_norm() is not None else None,
        sizes=sizes,
        param_groups=[setting.param_group for setting in settings],
        rules=[setting.rule for setting in settings],
        layouts=[setting.layout for setting in settings],
        hyper_names=[",".join([name for name in setting.hyper if name != "lr"]) for setting in settings],
        hyper_values=hyper_values,
        specs=[",".join([_spec_text(spec) for spec in setting.states]) for setting in settings],
        state_keys=state_keys,
        roundings=[",".join(setting.roundings) for setting in settings],
        seeds=[setting.seed for setting in settings],
        maximize=[setting.maximize for setting in settings],
        param_roundings=[setting.rounding for setting in settings],
        masters=[setting.master or "" for setting in settings],
        backends=[group["backend"] for group in optimizer.param_groups],
        derives_on_device=optimizer.derives_on_device,
        max_grad_norm=optimizer._max_grad_norm(),
    )
