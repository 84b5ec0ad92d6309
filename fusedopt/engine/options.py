"""The keyword arguments that every optimizer takes, written once."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..storage.state import StateDtype, StateRounding


class TorchFlags(TypedDict, total=False):
    """Those of them that torch's optimizers have, too."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class Options(TorchFlags, total=False):
    """Keyword arguments of every optimizer; FusedOptimizer documents them."""

    state_dtype: StateDtype
    state_rounding: StateRounding
    min_quantized_numel: int
    rounding: str | None
    master_weights: str | None
    nonfinite: str
    seed: int
    max_grad_norm: float | None
    skip_step_above: float | None
    state_device: str | None
    stream_bytes: int
    reserve_bytes: int
    step_device: str | None
    host_threads: int | None
    grad_norm_group: ProcessGroup | None
    backend: str


# What stands in no torch optimizer's param groups, by its default; filled by FusedOptimizer.
OWN_DEFAULTS: dict[str, Any] = {}


def note_own_defaults(base: Any) -> None:
    """Fills OWN_DEFAULTS from the signature of `base`, the constructor of FusedOptimizer."""
    own = Options.__annotations__.keys() - TorchFlags.__annotations__.keys()
    parameters = inspect.signature(base).parameters
    OWN_DEFAULTS.update({name: parameters[name].default for name in parameters if name in own})


def spell_out(init: Any, base: Any) -> None:
    """Gives a constructor with ``**options: Unpack[Options]`` the signature that lists them, with defaults of `base`.

    Keyword arguments of another type are left alone: a subclass of a user's may take any.
    """
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.annotation != "Unpack[Options]"]
    if len(own) == len(signature.parameters):
        return
    names = {parameter.name for parameter in own}
    defaults = inspect.signature(base).parameters
    listed = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name].default,
            annotation=getattr(annotation, "__forward_arg__", annotation),  # as text, like the constructor's own
        )
        for name, annotation in Options.__annotations__.items()
        if name not in names
    ]
    init.__signature__ = signature.replace(parameters=[*own, *listed])
