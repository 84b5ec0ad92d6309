"""torchtitan: its container of optimizers, with this package's among them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import checks
from ..engine.optimizer import FusedOptimizer
from ..engine.options import OWN_DEFAULTS
from ..optimizers.names import class_of, create_optimizer, optimizer_names, released

if TYPE_CHECKING:
    # Made when it is asked for, because torchtitan is imported then.
    class OptimizersContainer: ...  # noqa: D101


__all__ = ["OptimizersContainer", "config"]


def config(name: str = "adamw_8bit", lr: float = 8e-4, **kwargs: Any) -> Any:
    """What a torchtitan configuration takes for its optimizer: one for all parameters.

    torchtitan clips gradients itself, so do not pass max_grad_norm.

    Args:
        name: One of `optimizer_names()`, but those that step during the backward pass.
        lr: Learning rate.
        **kwargs: Other arguments of the optimizer; betas and weight decay are torchtitan's (0.9, 0.95) and 0.1 unless
            they are given here, where the optimizer has them.

    Returns:
        An ``OptimizersContainer.Config``.

    Raises:
        ImportError: torchtitan is not installed.
        ValueError: The name is one of an optimizer that steps during the backward pass, or torchtitan is asked to clip
            twice.
    """
    checks.installed("torchtitan", "config")
    from torchtitan.components.optimizer import ParamGroupConfig

    _check_released(name)
    if "max_grad_norm" in kwargs:
        raise ValueError(
            f"max_grad_norm={kwargs['max_grad_norm']!r} would clip again what torchtitan has clipped; set its "
            "training.max_norm"
        )
    with_torchtitans: dict[str, Any] = {"lr": lr, "weight_decay": 0.1}
    if name in optimizer_names() and _pair_of_betas(class_of(name)):
        with_torchtitans["betas"] = (0.9, 0.95)
    group = ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={**with_torchtitans, **kwargs})
    return __getattr__("OptimizersContainer").Config(param_groups=[group])


def _check_released(name: str) -> None:
    """Raises ValueError for a name of an optimizer that steps during the backward pass."""
    if released(name) is not None:
        raise ValueError(
            f"optimizer name {name!r} steps and frees gradients during the backward pass, and torchtitan clips them "
            f"after it; use {released(name)!r}"
        )


def _pair_of_betas(cls: type) -> bool:
    betas = inspect.signature(cls).parameters.get("betas")
    return betas is not None and len(betas.default) == 2


@functools.cache
def _container_class() -> type:
    from torchtitan.components import optimizer

    class OptimizersContainer(optimizer.OptimizersContainer):  # type: ignore[misc]
        """torchtitan's container, whose groups may name optimizers of this package, as `create_optimizer` does."""

        @dataclass(kw_only=True, slots=True)
        class Config(optimizer.OptimizersContainer.Config):  # type: ignore[misc]
            """torchtitan's."""

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
            _check_released(name)
            if name in optimizer_names():
                return functools.partial(create_optimizer, name)
            return optimizer.OptimizersContainer._resolve_optimizer_factory(name)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            # torchtitan looks for each option of a group, and ours are in a state dict only where they were set: the
            # others stay as they are here.
            told = dict(state_dict)
            for made in self.optimizers:
                groups = made.param_groups if isinstance(made, FusedOptimizer) else []
                for group in (group for group in groups if group["params"]):
                    first = group["param_names"][0]
                    for key in OWN_DEFAULTS:
                        told.setdefault(f"param_groups.{first}.{key}", group[key])
            super().load_state_dict(told)

    OptimizersContainer.__qualname__ = OptimizersContainer.__name__
    OptimizersContainer.Config.__qualname__ = "OptimizersContainer.Config"
    return OptimizersContainer


def __getattr__(name: str) -> Any:
    if name == "OptimizersContainer":
        return _container_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
