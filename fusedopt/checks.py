"""Checks of what users pass in: every error names the argument, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

_PYTHONS_OWN = (float, int, bool, str, type(None))


def number(name: str, value: Any) -> float:
    """A finite real number, given as a number or a one-element tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)}; pass a number or a tensor of one element"
            )
        value = value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a number or a tensor of one element")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{name}={value!r} is not finite; pass a finite number")
    return result


def nonnegative(name: str, value: Any) -> float:
    """A finite number >= 0."""
    result = number(name, value)
    if result < 0:
        raise ValueError(f"{name}={result!r} is negative; pass a number >= 0")
    return result


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name}={result!r} is not positive; pass a number above 0")
    return result


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    result = number(name, value)
    if not 0 <= result < 1:
        raise ValueError(f"{name}={result!r} is outside [0, 1); pass a number from 0 up to, not including, 1")
    return result


def betas(value: Any, example: tuple[float, ...]) -> None:
    """As many numbers in [0, 1) as the example has."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(example):
        number_of = {2: "a pair", 3: "three numbers"}[len(example)]
        raise ValueError(f"betas={value!r} must be {number_of}; pass for example {example}")
    for i, beta in enumerate(value):
        fraction(f"betas[{i}]", beta)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass an int")
    return int(value)


def uint32(name: str, value: Any) -> int:
    """A whole number that fits 32 unsigned bits."""
    result = _integer(name, value)
    if not 0 <= result < 2**32:
        raise ValueError(f"{name}={value!r} is outside [0, 2**32); pass an int in that range")
    return result


def whole(name: str, value: Any) -> int:
    """A whole number >= 0."""
    result = _integer(name, value)
    if result < 0:
        raise ValueError(f"{name}={value!r} is negative; pass an int >= 0")
    return result


def count(name: str, value: Any) -> int:
    """A whole number >= 1."""
    result = _integer(name, value)
    if result < 1:
        raise ValueError(f"{name}={value!r} counts nothing; pass a whole number above 0")
    return result


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass True or False")
    return value


def switch(name: str, value: Any) -> bool:
    """A flag that torch's optimizers have, too, where 1 and 0 do as well as True and False."""
    return flag(name, bool(value) if type(value) is int and value in (0, 1) else value)


def process_group(name: str, value: Any) -> None:
    """A process group of torch.distributed, or None."""
    if value is None:
        return
    dist = sys.modules.get("torch.distributed")
    kind = getattr(dist, "ProcessGroup", None)
    if kind is None or not isinstance(value, kind):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; pass a process group, as torch.distributed.new_group and "
            "DeviceMesh.get_group give, or None"
        )


def one_of(name: str, value: Any, options: Iterable[str]) -> str:
    """One of some words."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; pass one of {', '.join(map(repr, options))}")
    return value


def installed(package: str, what: str, install: str | None = None) -> None:
    """Raises an ImportError that says what to install, if a package is missing.

    One that is there and does not load is another matter, which its own error tells.

    Args:
        package: The name by which it is imported.
        what: What needs it, as the subject of a sentence in the singular.
        install: What pip installs; the package by default.
    """
    try:
        found = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # the package around it; or None in its place
        found = None
    if found is None:
        raise ImportError(f"{what} needs {package}; install it with: pip install {install or package}")


def callers_level() -> int:
    """The stacklevel that makes a warning point to the line that called into this package, or torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fusedopt", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def closest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' if a known word is close, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def known_keywords(cls: type, given: dict[str, Any]) -> None:
    """Raises a TypeError for a keyword that the constructor of ``cls`` does not take.

    One with ``**kwargs`` may take anything, and what it hands on is checked by `known_to_bases`.
    """
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _only(cls, [name for name in parameters if name != "self"], given)


def known_to_bases(cls: type, given: dict[str, Any]) -> None:
    """Raises a TypeError for keywords that reached the last constructor of ``cls`` and are known to none."""
    inits = [base.__dict__["__init__"] for base in cls.__mro__ if "__init__" in base.__dict__]
    parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    _only(cls, list(dict.fromkeys(p.name for p in parameters if p.kind in kinds and p.name != "self")), given)


def _only(cls: type, names: list[str], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in names:
            raise TypeError(
                f"{cls.__name__} got an unknown argument {name}={value!r}{closest(name, names)}; "
                f"it takes {', '.join(names)}"
            )


def plain(value: Any) -> Any:
    """A setting as checkpoints can keep it: what numpy or a library for configurations made of it as Python's own."""
    if type(value) in _PYTHONS_OWN:  # most of them, and the questions below take ten times as long
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())  # a number, if there is but one
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    return value
