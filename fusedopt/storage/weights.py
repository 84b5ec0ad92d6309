"""The weights that a parameter stands for, which may be more than its own bits."""

from __future__ import annotations

from torch import Tensor

from ..reference import master as reference
from .state import keeps_own_precision


def read(master: str | None, param: Tensor, kept: Tensor | None) -> Tensor:
    """Weights in the precision that is computed in; may share the parameter's memory.

    Args:
        master: What the parameter keeps beside it, one of masters.KEYS; None if nothing.
        param: The parameter, or the part of it that is held here.
        kept: What it keeps; None if nothing was made yet.
    """
    if master is not None and kept is not None:
        return reference.join(master, param, kept)
    return param if keeps_own_precision(param) else param.float()


def write(master: str, param: Tensor, kept: Tensor, value: Tensor, bits: Tensor | None = None) -> None:
    """Stores weights in a parameter and what it keeps beside it.

    Args:
        master: One of masters.KEYS.
        param: The parameter, or the part of it that is held here.
        kept: What it keeps.
        value: The weights, float32.
        bits: Random bits to round stochastically, int32; None rounds to nearest.
    """
    shown, rest = reference.split(master, value, param, kept, bits)
    param.copy_(shown)
    kept.copy_(rest)
