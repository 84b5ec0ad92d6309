"""Loading state dicts without losing formats.

torch's load_state_dict casts every state to its parameter's dtype, which would turn the float32 state of
a bfloat16 parameter into bfloat16, and codes into floats. So the tensors are wrapped while it runs and
converted afterwards to what the param group asks for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..offload.homes import Wanted, place
from ..storage import masters
from ..storage.placement import why_blocks_are_cut
from ..storage.quantization import BLOCK, decode, encode, scales_shape
from ..storage.state import DTYPES, Slot, StateSpec, slots_of
from . import callers, sharding
from .contract import Contract
from .options import OWN_DEFAULTS

# Which machine a run is on, with which others it runs, and where its states are, is not part of the run.
_NOT_RESTORED = (
    "backend",
    "grad_norm_group",
    "state_device",
    "stream_bytes",
    "reserve_bytes",
    "step_device",
    "host_threads",
)

_MASTER_DTYPES = {
    "compensation": tuple(DTYPES.values()),
    "master_low": (torch.int8,),
    "master_low16": (torch.bfloat16,),
    "master": (torch.float32,),
}

# The keys of every optimizer's states; subclasses fill it as they are defined.
STATE_KEYS: set[str] = set()


class _Kept:
    """What goes through torch's load_state_dict, which looks into tensors, dicts and iterables, as it is."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: object) -> _Kept:
        return self


class _Group(_Kept):
    """A process group, which copies of an optimizer share. It is part of this process, and not of what is pickled."""

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with a grad_norm_group cannot be pickled, because the group is part of this process; save "
            "optimizer.state_dict(), and pass the group to the optimizer that loads it"
        )


@contextmanager
def hooked(register: Callable[..., Any], hook: Callable[..., Any], **kwargs: Any) -> Iterator[None]:
    """Registers a hook of ours for as long as the context is."""
    handle = register(hook, **kwargs)
    try:
        yield
    finally:
        handle.remove()


def state_keys(optimizer: Contract, group: dict[str, Any], param: Tensor, held: dict[str, Any]) -> list[str]:
    """The keys of the tensors that a step of a parameter reads and writes, `step` excepted."""
    keys = [key for spec in optimizer.states_of(group, param) for key in spec.keys_in(held)]
    master = masters.kind_of(group["master_weights"], param)
    return keys if master is None else [*keys, masters.KEYS[master]]


# ---- checks ------------------------------------------------------------------------------------------


def a_dict(state_dict: Any) -> dict[str, Any]:
    """The mapping that was passed. A user's own hooks may make a state dict of it, so nothing else is asked yet."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; pass what an optimizer's state_dict() gave")
    return state_dict  # type: ignore[return-value]


def check_form(state_dict: Any) -> None:
    """Raises an error that says what was passed instead of a state dict, such as what holds the model's beside it."""
    a_dict(state_dict)
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            there = f"what is there: {', '.join(map(repr, state_dict))}" if state_dict else "it is empty"
            raise ValueError(
                f"state_dict has no {key!r} of an optimizer ({there}); pass what an optimizer's state_dict() gave"
            )


def check_groups(optimizer: Contract, state_dict: Any) -> None:
    """Raises an error if something is no state dict, or has other param groups than an optimizer."""
    check_form(state_dict)
    saved_sizes = [len(group.get("params", ())) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has param groups of {saved_sizes} parameters and the optimizer of {sizes}; "
            "build the optimizer with the groups that it was saved with"
        )


def check_state(
    optimizer: Contract,
    group: dict[str, Any],
    param: Tensor,
    held: dict[str, Any],
    where: str,
    *,
    is_cast: bool = False,
) -> None:
    """Raises ValueError if a state that `param` has, or with `is_cast` gets a cast copy of, does not fit it."""
    dtypes = (*DTYPES.values(), param.dtype)
    if is_cast:
        dtypes += (torch.float64, *((torch.complex64, torch.complex128) if param.is_complex() else ()))
    for spec in optimizer.states_of(group, param):
        if spec.name in held:
            _check_tensor(held, spec.name, spec.shape_for(param.shape), dtypes, where)
        for key, other in ((spec.codes, spec.scales), (spec.scales, spec.codes)):
            if key not in held:
                continue
            if spec.name in held or other not in held:
                found = f"without {other!r}; load a state dict as it was saved"
                if spec.name in held:  # as set_optimizer_state_dict of torch adds what is here to what it is given
                    found = (
                        f"together with {spec.name!r}, which is the same in another format; load a state dict into an "
                        "optimizer of the state_dtype that it was saved with, and convert it then (docs/guide/fsdp.md)"
                    )
                raise ValueError(f"{where} has a state {key!r} {found}")
            if param.dim() < 1 or spec.extent != "elements":
                raise ValueError(f"{where} has 8-bit codes {key!r}, but its shape is {tuple(param.shape)}")
            shape = param.shape if key == spec.codes else scales_shape(param.shape)
            _check_tensor(held, key, shape, (torch.uint8,), where)
    for key, dtypes in _MASTER_DTYPES.items():
        if key in held:
            _check_tensor(held, key, param.shape, dtypes, where)
    slot = masters.slot_of(group, param, sharding.local(param))
    if slot is not None and slot.key in held and held[slot.key].dtype != slot.dtype:
        raise ValueError(
            f"{where} has a state {slot.key!r} of dtype {held[slot.key].dtype}, but its group has master_weights="
            f"{group['master_weights']!r}, which keeps {slot.dtype}; load weights through load_fp32_parameters instead"
        )
    step = held.get("step", 0)
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"{where} has a state 'step' of shape {tuple(step.shape)}; it must have one element")
    if not isinstance(step, Tensor):
        checks.nonnegative(f"{where} state['step']", step)


def _check_complete(
    optimizer: Contract, group: dict[str, Any], param: Tensor, held: dict[str, Any], where: str
) -> None:
    """Raises ValueError if a saved state has some of what an optimizer saves, but not what this one needs.

    Moments that begin at zero beside a step count that does not would be corrected for a bias that they do not have.
    """
    steps = float(held.get("step", 0))
    # Before the first step, a key that no optimizer has for a state is somebody's note.
    found = [key for key in held if key in STATE_KEYS or (steps > 0 and key not in _MASTER_DTYPES)]
    missing = [spec.name for spec in optimizer.states_of(group, param) if not spec.keys_in(held)]
    if found and missing:
        raise ValueError(
            f"{where} has {_listed(found)} but lacks {_listed(missing)}, which {type(optimizer).__name__} needs: "
            "another optimizer has saved it; load what this one has saved, or begin without a state dict"
        )


def _listed(names: list[str]) -> str:
    return " and ".join(repr(name) for name in names)


def _check_tensor(
    held: dict[str, Any], key: str, shape: torch.Size, dtypes: tuple[torch.dtype, ...], where: str
) -> None:
    value = held[key]
    if not isinstance(value, Tensor) or value.shape != shape:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"{where} has a state {key!r} of {found}; it must be a tensor of shape {tuple(shape)}: "
            "load a state dict of the same model"
        )
    if value.dtype not in dtypes:
        names = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        remedy = "; optimizer.load_state_dict(optimizer.state_dict()) casts it" if value.dtype == torch.float64 else ""
        raise ValueError(f"{where} has a state {key!r} of dtype {value.dtype}; it must be one of {names}{remedy}")


def _renamed_masters(held: dict[str, Any]) -> dict[str, Any]:
    """What split32 kept as int16, under the name of split24's, as it is kept now."""
    low = held.get("master_low")
    if not isinstance(low, Tensor) or low.dtype != torch.int16:
        return held
    rest = {key: value for key, value in held.items() if key != "master_low"}
    return {**rest, "master_low16": sharding.with_dtype(low, torch.bfloat16)}


# ---- saving ------------------------------------------------------------------------------------------


def without_defaults(optimizer: Contract, packed: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups lack options that are ours alone and that were never set to anything else."""
    if _is_flattened():
        groups = [{k: None if k == "grad_norm_group" else v for k, v in g.items()} for g in packed["param_groups"]]
        return {**packed, "param_groups": groups}
    unset = {key for key, value in OWN_DEFAULTS.items() if optimizer.defaults[key] == value}

    def is_told(key: str, value: Any) -> bool:
        return key != "grad_norm_group" and (key not in unset or value != OWN_DEFAULTS[key])

    groups = [{key: value for key, value in group.items() if is_told(key, value)} for group in packed["param_groups"]]
    return {**packed, "param_groups": groups}


def _is_flattened() -> bool:
    """Whether torch.distributed.checkpoint asks for a state dict that it will flatten.

    It looks for every key of param_groups in what it is to load then, and fails if one is missing.
    """
    found = callers.locals_in("torch.distributed.checkpoint.state_dict")
    return found is not None and bool(getattr(found.get("info"), "flatten_optimizer_state_dict", False))


# ---- copies ------------------------------------------------------------------------------------------


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """What copies and pickles of an optimizer are made of."""

    def kept(group: dict[str, Any]) -> dict[str, Any]:
        ranks = group.get("grad_norm_group")
        return group if ranks is None else {**group, "grad_norm_group": _Group(ranks)}

    return {**state, "defaults": kept(state["defaults"]), "param_groups": [kept(g) for g in state["param_groups"]]}


def take_over(optimizer: Any, take: Callable[[dict[str, Any]], None], state: dict[str, Any]) -> None:
    """Makes an optimizer what a copy or a state dict says; `take` does what torch does."""
    held = ("state", "param_groups", "_repeats")
    before: dict[str, Any] = {key: optimizer.__dict__[key] for key in held if key in optimizer.__dict__}
    take(state)
    try:
        for group in (optimizer.defaults, *optimizer.param_groups):
            for key, value in optimizer.defaults.items():
                group.setdefault(key, value)
            if isinstance(group.get("grad_norm_group"), _Kept):
                group["grad_norm_group"] = group["grad_norm_group"].tensor
        restore(optimizer)
    except BaseException:  # a disk is full, or a device: what was there is as it was
        optimizer.__dict__.update(before)
        raise


# ---- loading -----------------------------------------------------------------------------------------


def prepare(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A load_state_dict pre-hook: checks a state dict, fills its groups and wraps its tensors."""
    check_groups(optimizer, state_dict)
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    filled = []
    for group, saved in zip(groups, saved_groups):
        merged = {**{key: group[key] for key in optimizer.defaults}, **saved}
        merged.update({key: group[key] for key in _NOT_RESTORED})
        checked = optimizer.checked_group(optimizer.translated_group(merged))
        filled.append({**checked, "grad_norm_group": _Kept(checked["grad_norm_group"])})
    members = chain.from_iterable(((new, p) for p in group["params"]) for group, new in zip(groups, filled))
    ids = chain.from_iterable(group["params"] for group in saved_groups)
    state = dict(state_dict["state"])
    for saved_id, (group, param) in zip(ids, members):
        if saved_id not in state:
            continue
        # Not from `state`, in which a parameter that is listed twice is wrapped already.
        found = state_dict["state"][saved_id]
        if not isinstance(found, Mapping):
            raise ValueError(
                f"state_dict: parameter {saved_id} has a {type(found).__name__} in the place of its states; "
                "load a state dict as it was saved"
            )
        held = {key: value for key, value in found.items() if value is not None}
        held = _renamed_masters(optimizer.translated(group, param, held))
        check_state(optimizer, group, param, held, f"state_dict: parameter {saved_id}", is_cast=True)
        _check_complete(optimizer, group, param, held, f"state_dict: parameter {saved_id}")
        if any(spec.keys_in(held) for spec in optimizer.states_of(group, param)):
            held.setdefault("step", 1)  # some of torch's count no steps, but had a first one
        state[saved_id] = {k: _Kept(v) if isinstance(v, Tensor) else v for k, v in held.items()}
    return {**state_dict, "state": state, "param_groups": filled}


def restore(optimizer: Contract) -> None:
    """Unwraps what `prepare` wrapped and copies it into fresh memory of the stored format."""
    targets: list[tuple[dict[str, Any], Tensor, Slot, Tensor]] = []
    groups: list[dict[str, Any]] = []  # of each of them
    for group in optimizer.param_groups:
        for param in group["params"]:
            held = optimizer.state.get(param)
            if held is None:
                continue
            if "step" in held and not isinstance(held["step"], (_Kept, Tensor)):
                held["step"] = _Kept(torch.tensor(float(held["step"]), dtype=torch.float32, device="cpu"))
            kept = {key: value.tensor for key, value in held.items() if isinstance(value, _Kept)}
            # What is no state of this optimizer stays for whoever put it there; it is not the state dict's.
            own = {"step", *_MASTER_DTYPES, *(key for s in optimizer.all_states(group) for key in s.keys_in(kept))}
            held.update({key: value if key in own else value.clone() for key, value in kept.items()})
            if "step" in kept:
                slot = Slot("step", torch.Size(), torch.Size(), torch.float32)
                targets.append((held, param, slot, kept["step"].reshape(())))
            for spec in optimizer.all_states(group):
                keys = spec.keys_in(kept)
                if not keys:
                    continue
                sources = _held_here(spec, param, [kept[key] for key in keys])
                for key in keys:
                    del held[key]
                slots = slots_of(spec, group, param, sharding.local(param))
                targets += [(held, param, *pair) for pair in zip(slots, _converted(spec, slots, sources))]
            targets += _masters(group, param, held, kept)
            groups += [group] * (len(targets) - len(groups))
    wanted = [Wanted(group, sharding.local(param), slot) for group, (_, param, slot, _) in zip(groups, targets)]
    for (held, param, slot, source), tensor in zip(targets, place(wanted)):
        tensor.copy_(source)
        is_step = slot.key == "step"
        held[slot.key] = tensor if is_step else sharding.like_param(tensor, param, slot.global_shape, slot.dims)


def _held_here(spec: StateSpec, param: Tensor, whole: list[Tensor]) -> list[Tensor]:
    """What of a state goes with what is held here of a parameter."""
    if len(whole) == 2 and why_blocks_are_cut(param, scales_shape(param.shape), BLOCK):
        # Codes are nothing without the scale of their block, which may be another rank's: they are read before the cut.
        codes, scales = map(sharding.gathered, whole)
        whole = [decode(codes, scales, is_signed=spec.is_signed).contiguous()]
    return [sharding.part_held_here(tensor, param, spec.dims_for(param.dim())) for tensor in whole]


def _converted(spec: StateSpec, slots: list[Slot], sources: list[Tensor]) -> list[Tensor]:
    """A state's tensors as its slots want them, up to a cast."""
    if len(slots) == len(sources):
        return sources
    if len(sources) == 2:
        return [decode(sources[0], sources[1], is_signed=spec.is_signed)]
    return list(encode(sources[0].float(), is_signed=spec.is_signed))


def _masters(
    group: dict[str, Any], param: Tensor, held: dict[str, Any], kept: dict[str, Tensor]
) -> list[tuple[dict[str, Any], Tensor, Slot, Tensor]]:
    """What a parameter keeps beside it, if it is to be kept here, too."""
    found = [key for key in _MASTER_DTYPES if key in kept]
    if not found:
        return []
    slot = masters.slot_of(group, param, sharding.local(param))
    if slot is not None and slot.key in found:
        return [(held, param, slot, sharding.part_held_here(kept[slot.key], param))]
    for key in found:
        del held[key]
    warnings.warn(
        f"the state dict has {found[0]!r} for a parameter that is {param.dtype} here, in a group with master_weights="
        f"{group['master_weights']!r}; it is dropped: save and load full-precision weights with fp32_parameters",
        stacklevel=checks.callers_level(),
    )
    return []
