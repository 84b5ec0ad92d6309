"""Optimizers by name."""

from __future__ import annotations

import warnings
from typing import Any

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer
from ..offload.release import release_gradients

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
    "grokadamw": (
        "amplifies gradients by a signal that it takes from losses, which a step does not see; use 'adamw_torch'"
    ),
}

# Names of optimizers that step during the backward pass: each is another one whose gradients are released, with these
# arguments. LOMO: arXiv:2306.09782; AdaLomo: arXiv:2310.10195.
_RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "lomo": ("sgd", {}),
    "adalomo": ("adafactor", {"lr": 1e-3, "scale_parameter": True, "relative_step": False}),
}
_OF_RELEASE = ("bucket_numel", "clip", "loss_scale")  # arguments of release_gradients


def optimizer_names() -> list[str]:
    """Every name that `create_optimizer` takes."""
    return sorted([*CLASSES, *_RELEASED])


def released(name: str) -> str | None:
    """The optimizer whose gradients are released under a name that stands for that; None if it stands for none."""
    return _RELEASED[name][0] if name in _RELEASED else None


def class_of(name: str) -> type[FusedOptimizer]:
    """The class of a name that `create_optimizer` takes."""
    return CLASSES[released(name) or name]


def implied(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of its class that such a name stands for, if others are given."""
    if name not in _RELEASED:
        return CLASSES[name].implied(name, given)
    return {key: value for key, value in _RELEASED[name][1].items() if key not in given}


def refusal(name: str) -> str | None:
    """Why `create_optimizer` does not take a name of transformers' `optim` argument; None if it does.

    Args:
        name: Any name.

    Returns:
        The error's sentence.

    Raises:
        TypeError: It is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} is a {type(name).__name__}; pass one of optimizer_names(), such as 'adamw'")
    if name in CLASSES or name in _RELEASED:
        return None
    for beginning, reason in _REFUSED.items():
        if name.startswith(beginning):
            return f"optimizer name {name!r} {reason}"
    return (
        f"optimizer name {name!r} is not known{checks.closest(name.lower(), optimizer_names())}; there are "
        f"{', '.join(optimizer_names())}"
    )


def resolved(name: str, given: dict[str, Any]) -> tuple[type[FusedOptimizer], dict[str, Any]]:
    """The class that a name stands for, and its arguments, those that are given among them.

    Raises:
        ValueError: The name is unknown, or means something that does not exist.
        TypeError: A keyword is unknown.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name={name!r} is a {type(name).__name__}; pass one of optimizer_names(), such as 'adamw_8bit'"
        )
    reason = refusal(name)
    if reason is not None:
        raise ValueError(reason)
    cls = class_of(name)
    checks.known_keywords(cls, given)
    if name in cls.NOTES:
        warnings.warn(f"{name}: {cls.NOTES[name]}", UserWarning, stacklevel=checks.callers_level())
    return cls, {**implied(name, given), **given}


def create_optimizer(name: str, params: Any, **kwargs: Any) -> FusedOptimizer:
    """Makes an optimizer from its name.

    Names of transformers' `optim` argument stand for the arguments that its Trainer gives them: "lion_8bit" has
    Adam's betas, and "adafactor" with an lr neither scales it by the parameter nor takes it from the step's number.
    "lomo" is SGD and "adalomo" Adafactor that step during the backward pass (`release_gradients`): call ``step()``
    after it all the same. The handle is the optimizer's ``release_handle``.

    Args:
        name: One of `optimizer_names()`: those of transformers' `optim` argument and of bitsandbytes.
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        **kwargs: Arguments of the optimizer's class; they win over what the name implies. For "lomo" and "adalomo" also
            `release_gradients`' bucket_numel, clip (needed with max_grad_norm) and loss_scale.

    Returns:
        The optimizer.

    Raises:
        ValueError: The name is unknown, or means something that does not exist.
        TypeError: The name is no string, or a keyword is unknown.
    """
    if not isinstance(name, str) or name not in _RELEASED:
        cls, arguments = resolved(name, kwargs)
        return cls(params, **arguments)
    of_release = {key: kwargs.pop(key) for key in _OF_RELEASE if key in kwargs}
    cls, arguments = resolved(name, kwargs)
    optimizer = cls(params, **arguments)
    release_gradients(optimizer, **of_release)
    return optimizer
