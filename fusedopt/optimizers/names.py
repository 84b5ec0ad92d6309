"""Optimizers by name."""

from __future__ import annotations

from typing import Any

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer


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
        ValueError: The name is unknown.
        TypeError: A keyword is unknown.
    """
    cls = CLASSES.get(name)
    if cls is None:
        raise ValueError(
            f"optimizer name {name!r} is not known{checks.closest(name, CLASSES)}; "
            f"there are {', '.join(optimizer_names())}"
        )
    checks.known_keywords(cls, kwargs)
    return cls(params, **{**cls.NAMES[name], **kwargs})
