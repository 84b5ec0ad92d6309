"""Optimizers by name."""

from __future__ import annotations

import warnings
from typing import Any

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer

# What transformers' `optim` argument takes, and why no optimizer of ours answers to it: the beginning of a name, and
# the sentence that follows "optimizer name ...".
_REFUSED = {
    "galore_": (
        "projects gradients onto a few directions of each matrix (GaLore, arXiv:2403.03507), which takes more than "
        "steps of single elements; for small state use 'adamw_8bit' or 'adafactor'"
    ),
    "apollo_": (
        "scales gradients by what random projections of them say (APOLLO, arXiv:2412.05270), which takes more than "
        "steps of single elements; for small state use 'adamw_8bit' or 'adafactor'"
    ),
    "lomo": (
        "steps during the backward pass of a model, by a call of its own that takes the loss (arXiv:2306.09782); use "
        "'sgd' and release_gradients, which take the same steps"
    ),
    "adalomo": (
        "steps during the backward pass of a model, by a call of its own that takes the loss (arXiv:2310.10195); use "
        "'adafactor' with scale_parameter=True and release_gradients, which take the same steps"
    ),
    "grokadamw": (
        "amplifies gradients by a signal that it takes from losses, which a step does not see; use 'adamw_torch'"
    ),
}


def optimizer_names() -> list[str]:
    """Every name that `create_optimizer` takes."""
    return sorted(CLASSES)


def refusal(name: str) -> str | None:
    """Why `create_optimizer` does not take a name of transformers' `optim` argument; None if it does.

    Args:
        name: Any name.

    Returns:
        The error's sentence.
    """
    if name in CLASSES:
        return None
    for beginning, reason in _REFUSED.items():
        if name.startswith(beginning):
            return f"optimizer name {name!r} {reason}"
    return (
        f"optimizer name {name!r} is not known{checks.closest(name, CLASSES)}; there are {', '.join(optimizer_names())}"
    )


def resolved(name: str, given: dict[str, Any]) -> tuple[type[FusedOptimizer], dict[str, Any]]:
    """The class that a name stands for, and its arguments, those that are given among them.

    Raises:
        ValueError: The name is unknown, or means something that does not exist.
        TypeError: A keyword is unknown.
    """
    reason = refusal(name)
    if reason is not None:
        raise ValueError(reason)
    cls = CLASSES[name]
    checks.known_keywords(cls, given)
    if name in cls.NOTES:
        warnings.warn(f"{name}: {cls.NOTES[name]}", UserWarning, stacklevel=3)
    return cls, {**cls.implied(name, given), **given}


def create_optimizer(name: str, params: Any, **kwargs: Any) -> FusedOptimizer:
    """Makes an optimizer from its name.

    Names of transformers' `optim` argument stand for the arguments that its Trainer gives them: "lion_8bit" has
    Adam's betas, and "adafactor" with an lr neither scales it by the parameter nor takes it from the step's number.

    Args:
        name: One of `optimizer_names()`: those of transformers' `optim` argument and of bitsandbytes.
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        **kwargs: Arguments of the optimizer's class; they win over what the name implies.

    Returns:
        The optimizer.

    Raises:
        ValueError: The name is unknown, or means something that does not exist.
        TypeError: A keyword is unknown.
    """
    cls, arguments = resolved(name, kwargs)
    return cls(params, **arguments)
