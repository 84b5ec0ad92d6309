"""timm: this package's optimizers by name in its registry, with its param groups."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .. import checks
from ..optimizers.names import class_of, create_optimizer, optimizer_names, released

# timm reads a name's last part after "_" only, and takes "fused..." for NVIDIA's Apex.
_PREFIX = "compiled"


def register(registry: Any = None) -> list[str]:
    """Makes this package's optimizers known to timm, whose `create_optimizer_v2` then takes their names.

    Names are those of `create_optimizer` without underscores, after "compiled": "compiledadamw", "compiledadamw8bit".
    timm forms the param groups: what has one dimension does not decay, and ``layer_decay`` works. Optimizers that
    step during the backward pass are left out, since timm clips and scales gradients after it.

    Args:
        registry: An OptimizerRegistry of timm's; the one that `create_optimizer_v2` reads by default.

    Returns:
        The names, sorted.

    Raises:
        ImportError: timm is not installed.
    """
    checks.installed("timm", "register")
    from timm.optim import _optim_factory

    registry = _optim_factory.default_registry if registry is None else registry
    names = [name for name in optimizer_names() if released(name) is None]
    return sorted(_registered(registry, _optim_factory.OptimInfo, name) for name in names)


def _registered(registry: Any, info: Any, name: str) -> str:
    cls = class_of(name)
    parameters = inspect.signature(cls).parameters
    betas = parameters["betas"].default if "betas" in parameters else ()
    registered = _PREFIX + name.replace("_", "")
    registry.register(
        info(
            name=registered,
            opt_class=functools.partial(create_optimizer, name),
            description=f"fusedopt's {cls.__name__}, compiled kernels: create_optimizer({name!r})",
            has_eps="eps" in parameters,
            has_momentum="momentum" in parameters,
            has_betas=bool(betas),
            num_betas=len(betas) or 2,
        )
    )
    return registered
