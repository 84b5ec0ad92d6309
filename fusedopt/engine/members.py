"""What a step needs of each parameter: that it can be stepped at all, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..backends import GroupStep
from ..offload import homes
from ..offload.homes import Wanted, place
from ..storage import masters
from ..storage.quantization import encode
from ..storage.state import Slot, StateSpec, keeps_own_precision, requested_format, slots_of
from . import checkpoint, collectives, reports, sharding
from .contract import Contract
from .edits import settle
from .plain import has_no_memory, shares_elements


def parts(
    optimizer: Contract, listed: Sequence[list[int]] | None = None
) -> tuple[list[GroupStep], list[list[int] | None]]:
    """A step's settings by param group and layout, and which of the group's parameters each is for; None for all.

    `listed` has the positions of those that are to be stepped, by param group; without it they all are.
    """
    groups: list[GroupStep] = []
    positions: list[list[int] | None] = []
    for index, group in enumerate(optimizer.param_groups):
        layouts = optimizer.layouts(group)
        groups += [optimizer.group_step(group, layout, index) for layout in layouts]
        if len(layouts) == 1:  # nothing is asked of each parameter then
            positions.append(None if listed is None else listed[index])
        else:
            found: dict[str, list[int]] = {layout: [] for layout in layouts}
            layout_of = optimizer.layout_of  # looked up once: there may be thousands of parameters
            params = group["params"]
            for i in range(len(params)) if listed is None else listed[index]:
                found[layout_of(group, params[i])].append(i)
            positions += found.values()
    return groups, positions


def rounds(param_groups: list[dict[str, Any]], listed: Sequence[list[int]] | None = None) -> list[list[list[int]]]:
    """Positions by round and param group: round k has the k-th listing of each parameter, and the first has them all.

    A group that lists a parameter twice steps it twice, as in torch, and backends step what they are given at once.
    With `listed`, only of the parameters at these positions.
    """
    found: list[list[list[int]]] = []
    for index, group in enumerate(param_groups):
        params = group["params"]
        wanted = None if listed is None else {params[i] for i in listed[index]}
        times: dict[Tensor, int] = {}
        for position, param in enumerate(params):
            if wanted is not None and param not in wanted:
                continue
            times[param] = times.get(param, 0) + 1
            if times[param] > len(found):
                found.append([[] for _ in param_groups])
            found[times[param] - 1][index].append(position)
    return found


def with_gradients(param_groups: list[dict[str, Any]]) -> list[list[int]]:
    """Positions by param group of what has a gradient, each parameter where its group lists it first."""
    found: list[list[int]] = []
    for group in param_groups:
        seen: set[Tensor] = set()
        places = []
        for position, param in enumerate(group["params"]):
            if param.grad is not None and param not in seen:
                seen.add(param)
                places.append(position)
        found.append(places)
    return found


def repeats(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a group lists a parameter more than once."""
    return any(len(set(group["params"])) < len(group["params"]) for group in param_groups)


def unstepped(param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> set[Tensor]:
    """The parameters that no step has been taken of."""
    params = (param for group in param_groups for param in group["params"])
    return {param for param in params if float(state.get(param, {}).get("step", 0)) == 0}


def begin_anew(optimizer: Contract, listed: Sequence[list[int]], new: set[Tensor]) -> None:
    """Makes the states of those parameters in a round that are new what they were before their first step."""
    for group, positions in zip(optimizer.param_groups, listed):
        for param in (group["params"][position] for position in positions):
            held = optimizer.state.get(param, {})
            keys = [key for spec in optimizer.states_of(group, param) for key in spec.keys_in(held)]
            for key in [*keys, "step"] if keys and param in new else ():
                held[key].zero_()


def check_param(optimizer: Contract, group_index: int, position: int) -> None:
    """Raises ValueError if a parameter cannot be stepped, with the gradient that it has, if it has one."""
    group = optimizer.param_groups[group_index]
    param = group["params"][position]
    where = f"parameter {position} of group {group_index}"
    if "param_names" in group:
        where += f" ({group['param_names'][position]!r})"
    where += f", of shape {tuple(param.shape)},"
    grad = param.grad
    if param.device.type == "meta":
        raise ValueError(f"{where} is on the meta device and has no values; materialize the model before stepping")
    if param.layout != torch.strided:
        raise ValueError(f"{where} is of layout {param.layout}, which cannot be stepped; make it dense with to_dense()")
    if grad is not None:
        _check_grad(optimizer, group, param, grad, where)
    reason = sharding.refusal(param) or sharding.wrapper_refusal(param, param if grad is None else grad)
    if reason is not None:
        raise ValueError(f"{where} cannot be stepped: {reason}")
    refusals = [
        (backend.name, backend.refusal(sharding.local(param))) for backend in optimizer.backends_of(group_index)
    ]
    if all(reason is not None for _, reason in refusals):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
        raise ValueError(
            f"{where} cannot be stepped by backend={group['backend']!r} ({reasons}); "
            "use backend='auto' or convert the parameter to float32, bfloat16 or float16"
        )
    is_part = sharding.is_dtensor(param)
    reason = homes.refusal(group, sharding.local(param), is_part)
    reason = reason or masters.refusal(group, param) or optimizer.refusal(group, param)
    if reason is not None:
        raise ValueError(f"{where} cannot be stepped: {reason}")
    for spec in optimizer.states_of(group, param):
        if keeps_own_precision(param) and requested_format(spec, group["state_dtype"]) != "float32":
            raise ValueError(
                f"{where} has state_dtype={group['state_dtype']!r} but its dtype is {param.dtype}, "
                "whose state is kept in the same precision; leave state_dtype='float32' in its group"
            )
    held = optimizer.state.get(param, {})
    for key in [key for key, value in held.items() if value is None and key in checkpoint.STATE_KEYS]:
        del held[key]  # torch says so that there is no momentum yet
    checkpoint.check_state(optimizer, group, param, held, where)
    _check_memory(param, where)
    for key in checkpoint.state_keys(optimizer, group, param, held):
        if key in held:
            _check_memory(held[key], f"{where} has a state {key!r} and")


def _check_memory(tensor: Tensor, where: str) -> None:
    local = sharding.local(tensor)
    if has_no_memory(local):
        raise ValueError(
            f"{where} cannot be stepped: its memory has been freed, as libraries do that gather or offload parameters "
            "between passes; step the parameters that such a library holds meanwhile, or bring this one back first"
        )
    if shares_elements(local):
        raise ValueError(
            f"{where} cannot be stepped: some of its elements are the same place in memory, as expand() makes them; "
            "give each its own with clone(memory_format=torch.contiguous_format)"
        )


def _check_grad(optimizer: Contract, group: dict[str, Any], param: Tensor, grad: Tensor, where: str) -> None:
    reason = None if grad.layout == torch.strided else optimizer.sparse_refusal(group)
    if reason is not None or grad.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(
            f"{where} has a gradient of layout {grad.layout}, which cannot be stepped"
            f"{'' if reason is None else ': ' + reason}; "
            "use sparse=False or one of the sparse optimizers of torch.optim"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{where} has a gradient of shape {tuple(grad.shape)}; clear it with zero_grad() after reshaping"
        )
    if sharding.is_dtensor(param) != sharding.is_dtensor(grad):
        raise ValueError(
            f"{where} is a {type(param).__name__} and its gradient a {type(grad).__name__}; both or neither must be "
            "DTensors: distribute the gradient as the parameter is"
        )
    if grad.device != param.device or grad.is_complex() != param.is_complex():
        raise ValueError(
            f"{where} is {param.dtype} on {param.device} but its gradient {grad.dtype} on {grad.device}; clear it"
        )
    if has_no_memory(sharding.local(grad)):
        raise ValueError(f"{where} has a gradient whose memory has been freed; clear it with zero_grad()")


def init_state(optimizer: Contract, is_wanted: Callable[[Tensor], bool]) -> None:
    """Makes what is missing of the states of those parameters, all of which are checked first."""
    settle(optimizer)
    wanted = []
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if is_wanted(param):
                check_param(optimizer, index, position)
                wanted.append((index, param))
    make_state(optimizer, wanted)


def only_wants_state(optimizer: Contract) -> bool:
    """Whether a step is asked for as torch.distributed.checkpoint does to have state: the first, lr and gradients 0.

    A step that counted would leave `step` at 1 in an optimizer that has seen no gradient. torch asks with a learning
    rate of 0 on the CPU; one on another device is not waited for.
    """

    def is_zero(lr: Any) -> bool:
        if isinstance(lr, Tensor):
            return lr.device.type == "cpu" and not lr.any()
        return isinstance(lr, Real) and lr == 0

    if any(optimizer.state.values()) or not all(is_zero(group["lr"]) for group in optimizer.param_groups):
        return False
    has_grads = any(param.grad is not None for group in optimizer.param_groups for param in group["params"])
    return has_grads and not collectives.any_nonzero(optimizer.param_groups)


def make_state(optimizer: Contract, members: Iterable[tuple[int, Tensor]]) -> bool:
    """Allocates the states that (group index, parameter) pairs lack; whether there were any."""
    wanted: list[tuple[Tensor, Slot, Tensor | float | None]] = []
    groups: list[dict[str, Any]] = []  # of each of them
    begun: list[Tensor] = []  # step counts of what begins anew
    for group_index, param in members:
        group = optimizer.param_groups[group_index]
        held = optimizer.state.get(param, {})
        step = held.get("step")
        missing = [spec for spec in optimizer.states_of(group, param) if not spec.keys_in(held)]
        begins = bool(missing) and optimizer.begins_in_first_step
        if not isinstance(step, Tensor):  # a number, as a user may set it, becomes one
            count = None if step is None or begins else float(step)
            wanted.append((param, Slot("step", torch.Size(), torch.Size(), torch.float32), count))
        elif begins:
            begun.append(step)
        for spec in missing:
            wanted += _wanted(optimizer, spec, group, param)
        slot = masters.slot_of(group, param, sharding.local(param))
        if slot is not None and slot.key not in held:
            wanted.append((param, slot, masters.first_value(group, sharding.local(param))))
        groups += [group] * (len(wanted) - len(groups))
    tensors = place(Wanted(group, sharding.local(p), s) for group, (p, s, _) in zip(groups, wanted))
    for (param, slot, first), tensor in zip(wanted, tensors):
        if first is not None:
            _begin(tensor, first)
        is_step = slot.key == "step"
        optimizer.state[param][slot.key] = (
            tensor if is_step else sharding.like_param(tensor, param, slot.global_shape, slot.dims)
        )
    for step in begun:
        step.zero_()
    if wanted:
        reports.warn_if_nothing_is_quantized(optimizer)
    return bool(wanted)


def _begin(tensor: Tensor, first: Tensor | float) -> None:
    if isinstance(first, Tensor):
        tensor.copy_(first)
    else:  # of complex numbers both parts, as torch
        tensor.fill_(complex(first, first) if tensor.is_complex() else first)


def _wanted(
    optimizer: Contract, spec: StateSpec, group: dict[str, Any], param: Tensor
) -> Iterator[tuple[Tensor, Slot, Tensor | float | None]]:
    """The tensors of a state that a parameter lacks, and what they begin with where that is not zero."""
    local = sharding.local(param)
    slots = slots_of(spec, group, param, local)
    first = optimizer.first_value(spec, group)
    if first == 0.0:
        yield from ((param, slot, None) for slot in slots)
    elif len(slots) == 1:
        yield param, slots[0], first
    else:
        whole = torch.full(slots[0].shape, first, dtype=torch.float32, device=local.device)
        yield from ((param, s, part) for s, part in zip(slots, encode(whole, is_signed=spec.is_signed)))
