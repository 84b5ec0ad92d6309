"""State dicts of others: decoded for torch.optim, and the 8-bit ones of bitsandbytes and torchao, both ways.

Nothing here knows an optimizer by name. Which of bitsandbytes' numbered states holds which of ours follows from
the states that an optimizer declares (`_numbered`); torchao's have torch's names, as ours have. What is read
becomes dense float32 states, which `load_state_dict` stores as each group asks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint, checks, masters, sharding
from .options import Options, TorchFlags
from .quantization import decode
from .state import StateSpec, keeps_own_precision

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

_OWN_SETTINGS = {*Options.__annotations__, "compensation_buffer_dtype"} - {*TorchFlags.__annotations__}

# Without betas with us, there is one state there, whose decay is the first of betas all the same; the second,
# whatever the constructor called it, is not applied by their step.
_BNB_SETTINGS = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")
_BNB_ONE_STATE_SETTINGS = ("lr", "eps", "weight_decay")
_BNB_DECAYS = ("alpha", "momentum")
_BNB_LACKS = ("maximize", "nesterov", "dampening", "lr_decay")
_BNB_BLOCKS = (256, 2048)  # now, and before release 0.44

_TORCHAO_SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad")
_TORCHAO_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_TORCHAO_BLOCK = 256
_TORCHAO_MIN_NUMEL = 4096

_Settings = Callable[[dict[str, Any], str], dict[str, Any]]  # of a group, and what errors call it
_States = Callable[[Sequence[StateSpec], Tensor, dict[str, Any], str], dict[str, Any]]  # of a parameter


# ---- torch -------------------------------------------------------------------------------------------


@torch.no_grad()
def to_torch_state_dict(optimizer: FusedOptimizer) -> dict[str, Any]:
    """The state dict with every state dense, for torch.optim's class of the same name or any reader of its kind.

    8-bit states are decoded and 16-bit ones widened, both exactly. What is kept of master weights is left out: it
    belongs to weights, and `fp32_parameters` gives those. `optimizer.load_state_dict` takes the result back.

    Args:
        optimizer: Any optimizer of this package.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: float32 tensor of the parameter's shape}}, "param_groups":
        groups without the settings that are this package's own}. Double and complex states keep their dtype. All
        tensors are new, DTensors where the parameter is one. Parameters that were never stepped have no state.

    Raises:
        ValueError: A state does not fit its parameter.
    """
    packed = optimizer.state_dict()
    state = {}
    for index, group, param in _members(packed["param_groups"], optimizer.param_groups):
        held = packed["state"].get(index)
        if held is None:
            continue
        checkpoint.check_state(optimizer, group, param, held, f"parameter {index}")
        specs = optimizer.all_states(group)
        converted = {*masters.KEYS.values(), *(key for spec in specs for key in spec.keys_in(held))}
        others = {key: deepcopy(value) for key, value in held.items() if key not in converted}
        state[index] = {**others, **_dense(specs, param, held)}
    groups = [
        {key: deepcopy(value) for key, value in group.items() if key not in _OWN_SETTINGS}
        for group in packed["param_groups"]
    ]
    return {**packed, "state": state, "param_groups": groups}


# ---- bitsandbytes ------------------------------------------------------------------------------------


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
    """
    has_betas = "betas" in optimizer.defaults
    decay = _one_state_decay(optimizer)

    def settings(saved: dict[str, Any], where: str) -> dict[str, Any]:
        shared = _BNB_SETTINGS if has_betas else _BNB_ONE_STATE_SETTINGS
        dropped = {key for key in _BNB_SETTINGS if key not in shared or key not in optimizer.defaults}
        taken = {key: value for key, value in saved.items() if key not in dropped}
        if decay is not None and "betas" in saved:
            taken[decay] = saved["betas"][0]
        return taken

    def states(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any], where: str) -> dict[str, Any]:
        # In newer releases the tensors are in a dict in the dict, where FSDP does not see them.
        flat = {**held, **{k: v for inner in held.values() if isinstance(inner, dict) for k, v in inner.items()}}
        taken: dict[str, Any] = {}
        for number, members in _numbered(specs, has_betas, where):
            values = _bnb_values(flat, number, len(members), param.shape, where)
            taken.update({spec.name: value.reshape(param.shape) for spec, value in zip(members, values)})
        return taken

    return _read(optimizer, state_dict, settings, states)


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
    create_map = _imported("bitsandbytes.functional", "bitsandbytes").create_dynamic_map
    maps = {"1": create_map(signed=True), "2": create_map(signed=False)}  # a lone state has a sign there in any case
    has_betas = "betas" in optimizer.defaults
    decay = _one_state_decay(optimizer)

    def settings(group: dict[str, Any], where: str) -> dict[str, Any]:
        lost = [f"{key}={group[key]!r}" for key in _BNB_LACKS if group.get(key)]
        if not group.get("decoupled_weight_decay", True) and float(group["weight_decay"]) != 0:
            lost.append("an L2 penalty for weight_decay")
        if lost:
            raise ValueError(f"{where} has {', '.join(lost)}, which bitsandbytes has not; switch it off in the group")
        _numbered(optimizer.states(group), has_betas, where)
        known = _plain(group, _BNB_SETTINGS if has_betas else _BNB_ONE_STATE_SETTINGS)
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
                stored = dict(zip((f"state{number}", f"absmax{number}"), _bnb_codes(values, maps[number])))
                held[f"qmap{number}"] = maps[number]
            held.update(stored if len(members) > 1 else {key: value[0] for key, value in stored.items()})
        return held

    return _written(optimizer, "bitsandbytes", settings, states)


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
    named = [] if "betas" in optimizer.defaults else [key for key in _BNB_DECAYS if key in optimizer.defaults]
    return named[0] if named else None


def _bnb_values(held: dict[str, Any], number: str, count: int, shape: torch.Size, where: str) -> Tensor:
    """One of their numbered states, which holds `count` of ours: new float32 values of shape (count, numel)."""
    codes = _checked_tensor(held, f"state{number}", torch.Size((count, *shape)) if count > 1 else shape, where)
    numel = shape.numel()
    if codes.dtype != torch.uint8:
        return codes.to(torch.float32, copy=True).reshape(count, numel)
    qmap = _checked_tensor(held, f"qmap{number}", torch.Size((256,)), where).to(codes.device, torch.float32)
    absmax = held.get(f"absmax{number}")
    numels = (
        {} if not isinstance(absmax, Tensor) else {count * -(-numel // block): block for block in _BNB_BLOCKS[::-1]}
    )
    if not isinstance(absmax, Tensor) or absmax.numel() not in numels:
        found = f"of shape {tuple(absmax.shape)}" if isinstance(absmax, Tensor) else "missing"
        raise ValueError(
            f"{where} has 8-bit codes 'state{number}' of {count} x {numel} elements, and their 'absmax{number}' is "
            f"{found}; only blockwise codes, in blocks of {_BNB_BLOCKS[0]}, can be read: load what was saved"
        )
    block = numels[absmax.numel()]
    absmax = absmax.to(codes.device, torch.float32).reshape(count, -1, 1)
    missing = absmax.shape[1] * block - numel
    values = torch.nn.functional.pad(qmap[codes.reshape(count, numel).int()], (0, missing))
    return (values.reshape(count, -1, block) * absmax).flatten(1)[:, :numel]


def _bnb_codes(values: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of float32 values (count, *shape), in that shape, and their absmax (count, blocks)."""
    count, numel, block = len(values), values.shape[1:].numel(), _BNB_BLOCKS[0]
    padded = torch.nn.functional.pad(values.reshape(count, numel), (0, -numel % block)).reshape(count, -1, block)
    absmax = padded.abs().amax(dim=-1)
    unit = padded / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
    codes = torch.bucketize(unit, (qmap[1:] + qmap[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, :numel].reshape(values.shape), absmax


# ---- torchao -----------------------------------------------------------------------------------------


@torch.no_grad()
def from_torchao(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes, from a state dict of torchao's 8-bit, 4-bit or fp8 optimizers.

    A state is read through its dequantize(), whatever its tensor subclass, or copied if it is plain. torchao is
    needed to load its state dicts from a file, but not here. Settings that both have are taken over, lr as a number.

    Args:
        optimizer: The optimizer that is to go on; nothing in it changes.
        state_dict: A state dict of theirs, for parameters of the same shapes in the same groups.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: new float32 tensor of the parameter's shape}},
        "param_groups": groups}; DTensors where theirs are.

    Raises:
        ValueError: The state dict has other groups, states or shapes.
    """

    def settings(saved: dict[str, Any], where: str) -> dict[str, Any]:
        keys = [key for key in saved if key in optimizer.defaults or key not in _TORCHAO_SETTINGS]
        return {**{key: saved[key] for key in keys}, **_plain(saved, ("lr",))}

    def states(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any], where: str) -> dict[str, Any]:
        taken = {}
        for spec in specs:
            value = _checked_tensor(held, spec.name, param.shape, where)
            local = sharding.local(value)
            if type(local).dequantize is not Tensor.dequantize:  # every tensor has one, for torch's own formats
                local = local.dequantize()
            taken[spec.name] = sharding.like_param(local.to(torch.float32, copy=True), value, value.shape)
        return taken

    return _read(optimizer, state_dict, settings, states)


@torch.no_grad()
def to_torchao(optimizer: FusedOptimizer) -> dict[str, Any]:
    """A state dict that torchao's 8-bit optimizer of the same equation loads.

    States of parameters (of shards) of at least 4096 elements, in whole blocks of 256, are quantized, by torchao,
    as its own would be; but not a running maximum, which its step could not read. The others are float32, and so
    is everything in what `to_torch_state_dict` gives.

    Args:
        optimizer: An optimizer whose states are exp_avg, exp_avg_sq and at most max_exp_avg_sq.

    Returns:
        {"state": {index: {"step": 0-d tensor, state: OptimState8bit or float32 tensor of the parameter's shape}},
        "param_groups": groups, lr a tensor}. All tensors are new, DTensors where the parameter is one.

    Raises:
        ImportError: torchao is not installed.
        ValueError: A parameter, a state or a setting is one that torchao does not have.
    """
    quantized = _imported("torchao.optim.subclass_8bit", "torchao").OptimState8bit

    def settings(group: dict[str, Any], where: str) -> dict[str, Any]:
        names = [spec.name for spec in optimizer.states(group)]
        if len(names) < 2 or names != list(_TORCHAO_STATES[: len(names)]):
            raise ValueError(
                f"{where} has the states {', '.join(names) or 'none'}, and torchao's optimizers "
                f"{', '.join(_TORCHAO_STATES)}; none of them reads it: use to_torch_state_dict"
            )
        if group["maximize"]:
            raise ValueError(f"{where} has maximize=True, which torchao has not; minimize the negative loss instead")
        known = _plain(group, _TORCHAO_SETTINGS)
        # Their step refuses a number, and their load_state_dict does not make it a tensor.
        return {**known, "lr": torch.tensor(known["lr"], dtype=torch.float32)}

    def states(specs: Sequence[StateSpec], param: Tensor, dense: dict[str, Any], where: str) -> dict[str, Any]:
        held: dict[str, Any] = {"step": dense["step"].clone()}
        for spec in specs:
            value = sharding.local(dense[spec.name])
            fits = value.numel() >= _TORCHAO_MIN_NUMEL and value.numel() % _TORCHAO_BLOCK == 0
            if fits and not spec.is_maximum:
                # As their step does it: codes of zeros, and a copy, which quantizes.
                zeros = quantized.zeros(value.shape, spec.is_signed, _TORCHAO_BLOCK, value.device, dtype=param.dtype)
                value = zeros.copy_(value)
            held[spec.name] = sharding.like_param(value, param, param.shape)
        return held

    return _written(optimizer, "torchao", settings, states)


# ---- both ways ---------------------------------------------------------------------------------------


def _read(optimizer: FusedOptimizer, state_dict: Any, settings: _Settings, states: _States) -> dict[str, Any]:
    """Another package's state dict with our settings and dense states."""
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict, dict) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"state_dict has no {kind.__name__} {key!r}; pass what an optimizer's state_dict() gave")
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group.get("params", ())) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has param groups of {saved_sizes} parameters and the optimizer of {sizes}; "
            "build the optimizer with the groups that it was saved with"
        )
    groups = [deepcopy(settings(saved, f"state_dict: group {i}")) for i, saved in enumerate(saved_groups)]
    # Settings decide which states there are.
    merged = [
        optimizer._checked({**ours, **new, "params": ours["params"]})
        for ours, new in zip(optimizer.param_groups, groups)
    ]
    state = {}
    for index, group, param in _members(saved_groups, merged):
        held = state_dict["state"].get(index)
        if not held:
            continue
        where = f"state_dict: parameter {index}"
        if "step" not in held:
            raise ValueError(f"{where} has no 'step'; load a state dict as it was saved")
        new = {"step": torch.tensor(float(held["step"])), **states(optimizer.states(group), param, held, where)}
        checkpoint.check_state(optimizer, group, param, new, where)
        state[index] = new
    return {"state": state, "param_groups": groups}


def _written(optimizer: FusedOptimizer, package: str, settings: _Settings, states: _States) -> dict[str, Any]:
    """Our state dict with another package's settings and states."""
    packed = optimizer.state_dict()
    groups = []
    for i, group in enumerate(packed["param_groups"]):
        others = {key: deepcopy(value) for key, value in group.items() if key not in optimizer.defaults}
        groups.append({**others, **settings(group, f"param group {i}")})
    state = {}
    for index, group, param in _members(packed["param_groups"], optimizer.param_groups):
        held = packed["state"].get(index)
        if not held:
            continue
        where = f"parameter {index}, of shape {tuple(param.shape)},"
        checkpoint.check_state(optimizer, group, param, held, where)
        if keeps_own_precision(param):
            raise ValueError(f"{where} is {param.dtype}, and {package} steps in float32; use to_torch_state_dict")
        specs = optimizer.states(group)
        missing = [spec.name for spec in specs if not spec.keys_in(held)]
        if missing or "step" not in held:
            raise ValueError(f"{where} has no state {', '.join(missing) or 'step'} yet; take a step before converting")
        state[index] = states(specs, param, {"step": held["step"], **_dense(specs, param, held)}, where)
    return {"state": state, "param_groups": groups}


def _members(
    packed: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
    """(its key in a state dict, its group, itself) for every parameter, given the groups of both."""
    for saved, group in zip(packed, groups):
        for index, param in zip(saved["params"], group["params"]):
            yield index, group, param


def _dense(specs: Sequence[StateSpec], param: Tensor, held: dict[str, Any]) -> dict[str, Tensor]:
    """The states that a parameter has, at least in float32, new and placed as the parameter is."""
    dense = {}
    for spec in specs:
        parts = [sharding.local(held[key]) for key in spec.keys_in(held)]
        if len(parts) == 2:
            value = decode(parts[0], parts[1], is_signed=spec.is_signed).contiguous()  # may be a slice of whole blocks
        elif parts:
            value = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
        else:
            continue
        dense[spec.name] = sharding.like_param(value, param, spec.shape_for(param.shape))
    return dense


def _plain(group: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Those of some settings that a group has, tensors of one element as numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        return value.item() if isinstance(value, Tensor) else value

    return {key: plain(group[key]) for key in keys if key in group}


def _checked_tensor(held: dict[str, Any], key: str, shape: torch.Size, where: str) -> Tensor:
    """A tensor of a state dict. Raises ValueError if it is missing or has another shape."""
    value = held.get(key)
    if not isinstance(value, Tensor) or value.shape != shape:
        found = f"has {key!r} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"has no tensor {key!r}"
        raise ValueError(
            f"{where} {found}; it must be of shape {tuple(shape)}: "
            "load a state dict of the same model, of an optimizer of the same equation"
        )
    return value


def _imported(module: str, package: str) -> Any:
    """A module of a package that only writing its format needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"a state dict for {package} is written with {package}: pip install {package}") from error
