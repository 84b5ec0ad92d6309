"""Which 16-bit parameters keep more of their weights than they show, and where."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from .state import DTYPES, ROUNDINGS, Slot

# What is kept, under which key. The kinds are those of Master in csrc/core/tensors.h.
KEYS = {"kahan": "compensation", "split24": "master_low", "split32": "master_low16", "float32": "master"}
# The 16 bits of split32 are an integer. They are kept under a dtype that collectives send: gloo and NCCL know no int16.
_DTYPES = {"split24": torch.int8, "split32": torch.bfloat16, "float32": torch.float32}
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def normalize(value: Any) -> str | None:
    """master_weights as param_groups keep it. Raises ValueError."""
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    return None if value is None else checks.one_of("master_weights", value, KEYS)


def normalize_rounding(value: Any) -> str | None:
    """Rounding as param_groups keep it. Raises ValueError."""
    return None if value is None else checks.one_of("rounding", value, ROUNDINGS)


def rounding_of(group: dict[str, Any]) -> str:
    """How a group's 16-bit parameters are rounded.

    To nearest, as torch does, unless told otherwise; but 24 bits of a weight stochastically, since rounded
    to nearest they move too far or not at all.
    """
    return group["rounding"] or ("stochastic" if group["master_weights"] == "split24" else "nearest")


def kind_of(master_weights: str | None, param: Tensor) -> str | None:
    """What a parameter keeps of what its group asks for: None, or one of KEYS."""
    return master_weights if param.dtype in SIXTEEN_BIT else None


def refusal(group: dict[str, Any], param: Tensor) -> str | None:
    """Why a parameter cannot keep what its group asks for, as a sentence; None if it can."""
    kind = kind_of(group["master_weights"], param)
    if param.dtype != torch.float16 or kind in (None, "float32"):
        return None
    return (
        f"master_weights={kind!r} needs bfloat16 parameters, whose weights it splits at bit 16, and this one is "
        "float16; use master_weights='float32' in its group"
    )


def slot_of(group: dict[str, Any], param: Tensor, local: Tensor) -> Slot | None:
    """The tensor that a parameter needs for it, of which `local` is the part that is held here; None if none."""
    kind = kind_of(group["master_weights"], param)
    if kind is None:
        return None
    dtype = DTYPES[group.get("compensation_buffer_dtype", "bfloat16")] if kind == "kahan" else _DTYPES[kind]
    return Slot(KEYS[kind], local.shape, param.shape, dtype)


def first_value(group: dict[str, Any], local: Tensor) -> Tensor | None:
    """What it begins with: the weights for a float32 master; None where that is zero."""
    return local.detach().float() if kind_of(group["master_weights"], local) == "float32" else None
