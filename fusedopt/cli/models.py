"""Models and loops that a command line names: MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Annotated, Any

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


Train = Annotated[
    str,
    typer.Option(
        "--train",
        metavar="MODULE:FUNCTION",
        help="The loop: called with (recipe, seed, budget), yields (step, loss); MODULE is imported from here, too.",
    ),
]


def made(name: str | None) -> nn.Module | None:
    """The model that MODULE:FACTORY makes; None for None. Raises a ValueError or TypeError."""
    if name is None:
        return None
    factory = imported(name, "--model", "MODULE:FACTORY", "train:make_model")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise TypeError(f"--model {name!r} cannot be called ({error}); name a function without arguments") from error
    except ValueError:  # a function that tells nothing of its arguments
        pass
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {name!r} returns a {type(model).__name__}; return a torch.nn.Module")
    return model


def imported(name: Any, option: str = "--train", form: str = "MODULE:FUNCTION", example: str = "train:train") -> Any:
    """What MODULE:FUNCTION names. Raises a ValueError that names the option."""
    module, colon, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not all(part.isidentifier() for part in module.split(".")) or not colon or not function.isidentifier():
        raise ValueError(
            f"{option} {name!r} is not {form}, two names as Python's import takes them; pass for example {example}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name!r} cannot be imported ({error}); pass {form}") from error
