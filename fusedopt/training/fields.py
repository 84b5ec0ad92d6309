"""The fields of a recipe: their names, types, and what is filled in."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch

from .. import checks
from ..engine.optimizer import CLASSES
from ..schedules import Schedule, scheduler_names
from ..schedules.names import named_schedule
from . import files

# Of an optimizer's arguments, those that are fields of a recipe; all others are in `options`.
OWN_FIELDS = ("lr", "betas", "eps", "weight_decay")
_SET_BY_FIELDS = (*OWN_FIELDS, "params", "max_grad_norm")

# What others call a field.
_ALIASES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "optim": "optimizer",
    "optim_args": "options",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "num_warmup_steps": "warmup",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "num_training_steps": "steps",
    "batch_size": "per_device_train_batch_size",
    "clip_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "activation_checkpointing": "gradient_checkpointing",
    "torch_compile": "compile",
}


def check_names(cls: type, given: Mapping[str, Any]) -> None:
    """Raises a TypeError for a key that is no field, naming the nearest."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in names:
            near = f"; it is called {_ALIASES[key]!r} here" if key in _ALIASES else checks.closest(str(key), names)
            instead = "" if near else f"; there are {', '.join(names)}"
            raise TypeError(f"{key}={given[key]!r} is no field of a recipe{near}{instead}")


@functools.cache
def _adapter(cls: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter, with_config
    from typing_extensions import TypedDict

    hints = get_type_hints(cls)
    hints = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    shape = TypedDict("shape", hints)  # type: ignore[misc]
    return TypeAdapter(with_config(ConfigDict(strict=True))(shape))


def typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields in their types. Raises a TypeError, or a ValueError for a word that is not known."""
    plain = {name: checks.plain(value) for name, value in values.items()}
    for name in ("betas", "eps", "no_decay"):  # files have lists
        plain[name] = tuple(plain[name]) if isinstance(plain[name], list) else plain[name]
    files.needed("pydantic")
    from pydantic import ValidationError

    try:
        return _adapter(cls).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        wanted = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        kind = ValueError if first["type"] == "literal_error" else TypeError
        raise kind(f"{name}={values[name]!r} does not fit; pass {wanted}") from None


def fill(values: dict[str, Any]) -> None:
    """Fills in the optimizer's defaults. Raises a ValueError for a field that it does not have."""
    cls = CLASSES[values["optimizer"]]
    parameters = inspect.signature(cls).parameters
    given = {name: values[name] for name in OWN_FIELDS if values[name] is not None}
    implied = cls.implied(values["optimizer"], given)
    for name in OWN_FIELDS:
        if name not in parameters:
            if values[name] is not None:
                raise ValueError(
                    f"{name}={values[name]!r} means nothing to {values['optimizer']!r}, which takes "
                    f"{', '.join(parameters)}; leave it out, or put what you mean into options"
                )
        elif values[name] is None:
            default = implied.get(name, parameters[name].default)
            is_plain = isinstance(default, (int, float)) or name == "betas"  # a pair of eps has a default of its own
            values[name] = default if is_plain and default is not inspect.Parameter.empty else None
    if values["betas"] is not None:
        values["betas"] = tuple(float(beta) for beta in values["betas"])
    for name in ("lr", "weight_decay"):
        values[name] = None if values[name] is None else float(values[name])


def check_decay(values: dict[str, Any]) -> None:
    """Raises a ValueError for fields that divide parameters into groups where there is to be one."""
    for name in ("no_decay", "layer_decay"):
        if values["decay"] == "all" and values[name]:
            raise ValueError(
                f"{name}={values[name]!r} divides parameters into groups, and decay='all' makes one of them; set decay "
                f"to 'matrices', or leave {name} out"
            )


def given(schedule: Any) -> Any:
    """A schedule without parameters that are None, which is their default wherever they may be."""
    if isinstance(schedule, dict):
        return {key: given(value) for key, value in schedule.items() if value is not None}
    return [given(part) for part in schedule] if isinstance(schedule, list) else schedule


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options as files can keep them, dtypes and devices by their names. Raises a TypeError for what cannot be kept."""
    named = {key: _named(value) for key, value in options.items()}
    for key, value in named.items():
        if not _is_plain(value):
            raise TypeError(
                f"options.{key}={value!r} is a {type(value).__name__}, which no file can keep; pass a number, a text, "
                "or a list or mapping of these"
            )
    return named


def _named(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises a TypeError for an option that the optimizer does not have, a ValueError for one that is a field."""
    for key in options:
        if key in _SET_BY_FIELDS:
            raise ValueError(f"options.{key}={options[key]!r} has a field of its own; write {key} at the top level")
    checks.known_keywords(CLASSES[name], options)


def check_schedule(schedule: dict[str, Any], warmup: int | float) -> None:
    """Raises a ValueError or TypeError for a schedule that does not exist, or that a warmup does not go with."""
    name = schedule.get("name")
    if not isinstance(name, str):
        raise ValueError(f"schedule={schedule!r} has no name; there are {', '.join(scheduler_names())}")
    if name not in scheduler_names():
        Schedule.from_dict(schedule)  # raises for a name that is no building block either
        if warmup:
            raise ValueError(f"warmup={warmup!r} is for a named schedule; {name!r} has its own, so leave it out")
        return
    for key, instead in (("num_warmup_steps", "warmup"), ("num_training_steps", "steps")):
        if key in schedule:
            raise ValueError(f"schedule.{key}={schedule[key]!r} has a field of its own; write it as {instead}")
    if name == "constant" and warmup:
        raise ValueError(f"warmup={warmup!r} means nothing to 'constant'; use 'constant_with_warmup', or leave it out")
    # Any numbers will do to find parameters that are unknown or out of range.
    named_schedule(name, 0 if name != "constant" else None, 10**9, {k: v for k, v in schedule.items() if k != "name"})
