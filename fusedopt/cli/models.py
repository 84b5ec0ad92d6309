"""Models that a command line names: MODULE:FACTORY."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer
from torch import nn

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="A function without arguments that returns the model; MODULE is imported from here, too.",
    ),
]


def made(name: str | None) -> nn.Module | None:
    """The model that MODULE:FACTORY makes; None for None. Raises a ValueError or TypeError."""
    if name is None:
        return None
    module, colon, factory = name.partition(":")
    if not colon or not module or not factory:
        raise ValueError(f"--model {name!r} is not MODULE:FACTORY; pass for example train:make_model")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name!r} cannot be imported ({error}); pass MODULE:FACTORY") from error
    model = found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {name!r} returns a {type(model).__name__}; return a torch.nn.Module")
    return model
