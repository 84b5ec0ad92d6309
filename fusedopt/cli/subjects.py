"""What `fusedopt check` checks: a way to step by every rule, and the backends of every device."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..backends import BACKENDS
from ..engine.optimizer import CLASSES, FusedOptimizer

# By kind of device: what is checked unless a backend is named.
USUAL = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


@dataclass(frozen=True)
class Subject:
    """An optimizer, and the settings with which it steps by certain rules.

    Attributes:
        name: Of its rule, without layouts.
        rules: One, or one for each layout.
        optimizer: The class.
        settings: Its arguments.
    """

    name: str
    rules: tuple[str, ...]
    optimizer: type[FusedOptimizer]
    settings: dict[str, Any]


class Target(NamedTuple):
    """A backend on a device."""

    device: torch.device
    backend: str


def subjects() -> list[Subject]:
    """Optimizers that step by every rule there is: with default settings, then with others where it takes them."""
    found: list[Subject] = []
    known: set[str] = set()
    for cls in dict.fromkeys(CLASSES.values()):
        for settings in _settings(cls):
            if known.issuperset(cls.REFERENCES):
                break
            try:
                optimizer = cls([torch.zeros(1, dtype=torch.float32, device="cpu")], **settings)
            except (TypeError, ValueError):
                continue
            group = optimizer.param_groups[0]
            rules = tuple(optimizer.group_step(group, layout).rule for layout in optimizer.layouts(group))
            if not known.issuperset(rules):
                known.update(rules)
                found.append(Subject(optimizer.rule(group), rules, cls, settings))
    return found


def _settings(cls: type[FusedOptimizer]) -> Iterator[dict[str, Any]]:
    """Arguments for a class: none, then one of its own changed, then two, then three."""
    shared = inspect.signature(FusedOptimizer.__init__).parameters
    changed: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        default = parameter.default
        if name in shared:
            continue
        if isinstance(default, bool):
            changed[name] = not default
        elif default is None or default == 0.0:
            changed[name] = 0.1
    for count in range(4):
        for names in itertools.combinations(changed, count):
            yield {name: changed[name] for name in names}


def devices() -> list[torch.device]:
    """The CPU and every device that torch finds."""
    found = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found += [torch.device(kind, index) for index in range(module.device_count())]
    return found


def device_named(text: str) -> torch.device:
    """A device that is here. Raises ValueError."""
    here = devices()
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cpu" and device.index is None and device.type in USUAL:
        device = torch.device(device.type, 0)
    if device not in here:
        raise ValueError(f"device {text!r} is not here; there are {', '.join(map(str, here))}")
    return device


def targets(device: str | None = None, backend: str | None = None) -> list[Target]:
    """The backends that are made for each device, or the one named. Raises ValueError."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; there are {', '.join(BACKENDS)}")
    chosen = devices() if device is None else [device_named(device)]
    found = [
        Target(each, name)
        for each in chosen
        for name in BACKENDS
        if (name in USUAL[each.type] if backend is None or device is None else name == backend)
    ]
    found = [target for target in found if backend is None or target.backend == backend]
    if not found:
        raise ValueError(f"backend {backend!r} is not made for {', '.join(map(str, chosen))}; name the device, too")
    return found
