"""State dicts of bitsandbytes, both ways; which of its numbered states holds which of ours follows from their signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..engine import sharding
from ..engine.optimizer import FusedOptimizer
from ..storage.state import StateSpec
from .shared import checked_tensor, imported, plain, read, written

# Without betas with us, there is one state there, whose decay is the first of betas all the same; the second,
# whatever the constructor called it, is not applied by their step.
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")
_ONE_STATE_SETTINGS = ("lr", "eps", "weight_decay")
_DECAYS = ("alpha", "momentum")
_LACKS = ("maximize", "nesterov", "dampening", "lr_decay")
_BLOCKS = (256, 2048)  # now, and before release 0.44


@torch.no_grad()
def from_bitsandbytes(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from a state dict of bitsandbytes' optimizer of the same equation.

    8-bit blockwise states are decoded exactly, float32 ones copied; bitsandbytes is not needed. It numbers its
    states: a single one is `state1`; of several, those with a sign are `state1`, stacked in the order of STATES if
    they are more than one, and the one without is `state2`. Settings that both have are taken over; in a group
    without betas, the first of theirs is our alpha or momentum. Settings that they do not have stay as they are
    here: with betas, for one, their weight decay is always decoupled.

    Args:
        optimizer: The optimizer that is to go on; nothing in it changes.
        state_dict: A state dict of theirs, for whole (unsharded) parameters of the same shapes in the same groups.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: new float32 tensor of the parameter's shape}},
        "param_groups": groups}.

    Raises:
        ValueError: The state dict has other groups, states or shapes, or this optimizer has states that
            bitsandbytes does not keep.
        TypeError: It is no dict.
    """
    has_betas = "betas" in optimizer.defaults
    decay = _one_state_decay(optimizer)

    def settings(saved: dict[str, Any], where: str) -> dict[str, Any]:
        shared = _SETTINGS if has_betas else _ONE_STATE_SETTINGS
        dropped = {key for key in _SETTINGS if key not in shared or key not in optimizer.defaults}
        taken = {key: value for key, value in saved.items() if key not in dropped}
        if decay is not None and "betas" in saved:
            taken[decay] = saved["betas"][0]
        return taken

    def states(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any], where: str) -> dict[str, Any]:
        # In newer releases the tensors are in a dict in the dict, where FSDP does not see them.
        flat = {**held, **{k: v for inner in held.values() if isinstance(inner, dict) for k, v in inner.items()}}
        taken: dict[str, Any] = {}
        for number, members in _numbered(specs, has_betas, where):
            values = _values(flat, number, len(members), param.shape, where)
            taken.update({spec.name: value.reshape(param.shape) for spec, value in zip(members, values)})
        return taken

    return read(optimizer, state_dict, settings, states)


@torch.no_grad()
def to_bitsandbytes(optimizer: FusedOptimizer, *, min_8bit_size: int = 4096) -> dict[str, Any]:
    """A state dict that bitsandbytes' optimizer of the same equation loads; `from_bitsandbytes` says how.

    Args:
        optimizer: An optimizer that bitsandbytes has, too.
        min_8bit_size: As in their constructors: states of parameters with fewer elements are given in float32, the
            others as the nearest 8-bit codes. Their step goes by what it finds, so a number larger than any
            parameter, for their 32-bit optimizers, loses nothing.

    Returns:
        {"state": {index: {"step": int, "state1": uint8 codes of the parameter's shape, or (2, *shape) for two
        stacked states, "qmap1": (256,), "absmax1": (blocks of 256,) or (2, blocks), and the same with 2}},
        "param_groups": groups}; float32 states have neither qmap nor absmax. All tensors are new.

    Raises:
        ImportError: bitsandbytes, whose code maps are needed, is not installed.
        ValueError: A parameter, a state or a setting is one that bitsandbytes does not have.
    """
    checks.whole("min_8bit_size", min_8bit_size)
    create_map = imported("bitsandbytes.functional", "bitsandbytes").create_dynamic_map
    maps = {"1": create_map(signed=True), "2": create_map(signed=False)}  # a lone state has a sign there in any case
    has_betas = "betas" in optimizer.defaults
    decay = _one_state_decay(optimizer)

    def settings(group: dict[str, Any], where: str) -> dict[str, Any]:
        lost = [f"{key}={group[key]!r}" for key in _LACKS if group.get(key)]
        if not group.get("decoupled_weight_decay", True) and float(group["weight_decay"]) != 0:
            lost.append("an L2 penalty for weight_decay")
        if lost:
            raise ValueError(f"{where} has {', '.join(lost)}, which bitsandbytes has not; switch it off in the group")
        _numbered(optimizer.states(group), has_betas, where)
        known = plain(group, _SETTINGS if has_betas else _ONE_STATE_SETTINGS)
        # Their step reads betas and eps in any case.
        betas = (0.0 if decay is None else float(group[decay]), 0.0)
        return {"betas": betas, "eps": 0.0, **known}

    def states(specs: Sequence[StateSpec], param: Tensor, dense: dict[str, Any], where: str) -> dict[str, Any]:
        if sharding.is_dtensor(param):
            raise ValueError(f"{where} is a DTensor, and bitsandbytes' blocks are the whole's; gather it first")
        held: dict[str, Any] = {"step": int(dense["step"])}
        for number, members in _numbered(specs, has_betas, where):
            values = torch.stack([dense[spec.name] for spec in members])
            stored = {f"state{number}": values}
            if param.numel() >= min_8bit_size:
                maps[number] = maps[number].to(values.device)
                stored = dict(zip((f"state{number}", f"absmax{number}"), _codes(values, maps[number])))
                held[f"qmap{number}"] = maps[number]
            held.update(stored if len(members) > 1 else {key: value[0] for key, value in stored.items()})
        return held

    return written(optimizer, "bitsandbytes", settings, states)


def _numbered(specs: Sequence[StateSpec], has_betas: bool, where: str) -> list[tuple[str, tuple[StateSpec, ...]]]:
    """Which of our states are bitsandbytes' state1 and state2. Raises ValueError if it keeps others."""
    signed = tuple(spec for spec in specs if spec.is_signed)
    unsigned = tuple(spec for spec in specs if not spec.is_signed)
    if len(specs) == 1:
        return [("1", tuple(specs))]
    # Optimizers without betas have one state there, and would take another's state1 for theirs.
    if has_betas and signed and len(unsigned) == 1:
        return [("1", signed), ("2", unsigned)]
    raise ValueError(
        f"{where} has the states {', '.join(spec.name for spec in specs) or 'none'} here; bitsandbytes keeps one, or "
        "with betas one without a sign beside those with one: set what adds or removes a state (momentum, centered, "
        "amsgrad) in the group as it was there, or is to be"
    )


def _one_state_decay(optimizer: FusedOptimizer) -> str | None:
    """What we call the first of bitsandbytes' betas where we have none; None if nothing decays or we have."""
    named = [] if "betas" in optimizer.defaults else [key for key in _DECAYS if key in optimizer.defaults]
    return named[0] if named else None


def _values(held: dict[str, Any], number: str, count: int, shape: torch.Size, where: str) -> Tensor:
    """One of their numbered states, which holds `count` of ours: new float32 values of shape (count, numel)."""
    codes = checked_tensor(held, f"state{number}", torch.Size((count, *shape)) if count > 1 else shape, where)
    numel = shape.numel()
    if codes.dtype != torch.uint8:
        return codes.to(torch.float32, copy=True).reshape(count, numel)
    qmap = checked_tensor(held, f"qmap{number}", torch.Size((256,)), where).to(codes.device, torch.float32)
    absmax = held.get(f"absmax{number}")
    numels = {} if not isinstance(absmax, Tensor) else {count * -(-numel // block): block for block in _BLOCKS[::-1]}
    if not isinstance(absmax, Tensor) or absmax.numel() not in numels:
        found = f"of shape {tuple(absmax.shape)}" if isinstance(absmax, Tensor) else "missing"
        raise ValueError(
            f"{where} has 8-bit codes 'state{number}' of {count} x {numel} elements, and their 'absmax{number}' is "
            f"{found}; only blockwise codes, in blocks of {_BLOCKS[0]}, can be read: load what was saved"
        )
    block = numels[absmax.numel()]
    absmax = absmax.to(codes.device, torch.float32).reshape(count, -1, 1)
    missing = absmax.shape[1] * block - numel
    values = torch.nn.functional.pad(qmap[codes.reshape(count, numel).int()], (0, missing))
    return (values.reshape(count, -1, block) * absmax).flatten(1)[:, :numel]


def _codes(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of float32 values (count, *shape), in that shape, and their absmax (count, blocks)."""
    count, numel, block = len(values), values.shape[1:].numel(), _BLOCKS[0]
    padded = torch.nn.functional.pad(values.reshape(count, numel), (0, -numel % block)).reshape(count, -1, block)
    absmax = padded.abs().amax(dim=-1)
    unit = padded / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
    codes = torch.bucketize(unit, (qmap[1:] + qmap[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, :numel].reshape(values.shape), absmax
