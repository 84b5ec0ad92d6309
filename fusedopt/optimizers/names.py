"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer

_PAGED = "paged_"


def optimizer_names() -> list[str]:
    """Every name that `create_optimizer` takes."""
    return sorted(CLASSES)


def create_optimizer(name: str, params: Any, **kwargs: Any) -> FusedOptimizer:
    """Makes an optimizer from its name.

    Args:
        name: One of `optimizer_names()`: those of transformers' `optim` argument and of bitsandbytes.
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        **kwargs: Arguments of the optimizer's class; they win over what the name implies.

    Returns:
        The optimizer.

    Raises:
        ValueError: The name is unknown, or paged state is asked for, which does not exist yet.
        TypeError: A keyword is unknown.
    """
    cls = CLASSES.get(name)
    if cls is None:
        if name.startswith(_PAGED):
            plain = name.removeprefix(_PAGED)
            plain = plain if plain in CLASSES else plain.removesuffix("_32bit")
            if plain in CLASSES:
                raise ValueError(f"{name!r} needs paged state, which does not exist yet; use {plain!r} until it does")
        raise ValueError(
            f"optimizer name {name!r} is not known{checks.closest(name, CLASSES)}; "
            f"there are {', '.join(optimizer_names())}"
        )
    checks.known_keywords(cls, kwargs)
    return cls(params, **{**cls.NAMES[name], **kwargs})
