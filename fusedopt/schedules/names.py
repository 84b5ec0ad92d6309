"""`get_scheduler`: schedulers by name, as in transformers, or from a schedule."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from . import lengths
from .compose import Constant, Warmup
from .feedback import RULES, Feedback, Guided
from .measured import scheduler_of
from .named import WarmupStableDecay, _Warmed
from .schedule import SCHEDULES, Schedule, construct
from .scheduler import ScheduleLR

AnySchedule = Schedule | Feedback | Guided


def scheduler_names() -> list[str]:
    """Every name that `get_scheduler` takes, sorted."""
    return sorted([*training_schedules(), *RULES])


def training_schedules() -> dict[str, type[Schedule]]:
    """The schedules of a whole training, by name: all except the building blocks of others."""
    return {name: cls for name, cls in SCHEDULES.items() if cls is Constant or issubclass(cls, _Warmed)}


def get_scheduler(
    name: str | AnySchedule | Sequence[Schedule],
    optimizer: Optimizer,
    num_warmup_steps: int | float | None = None,
    num_training_steps: int | float | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> LRScheduler:
    """Makes a learning rate scheduler, with the signature and the names of transformers' function.

    Args:
        name: One of `schedules.scheduler_names()`, transformers' SchedulerType included; or a schedule, a rule, a
            schedule with a rule (``warmup(200) >> Plateau()``), or a list of one schedule for each param group.
        optimizer: Whose lr to set.
        num_warmup_steps: Steps of the warmup, which need not be whole, or a ratio of `num_training_steps` in [0, 1),
            rounded up. A rule begins after a warmup of this length. Not allowed with a schedule, which has its own.
        num_training_steps: Steps of the whole training; ratios and open lengths of a schedule are resolved with it.
        scheduler_specific_kwargs: The other arguments of the schedule or rule.

    Returns:
        A `ScheduleLR`, or for a rule a `MetricLR` or `GradientLR`, whose step takes the measurement.

    Raises:
        ValueError: The name is unknown, a needed number is missing, or one is outside its range.
        TypeError: A keyword is unknown or a value of a wrong type.
    """
    if isinstance(name, (str, enum.Enum)):
        kwargs = scheduler_specific_kwargs or {}
        schedule: Any = named_schedule(str(getattr(name, "value", name)), num_warmup_steps, num_training_steps, kwargs)
    else:
        schedule = name
        if not isinstance(schedule, (Schedule, Feedback, Guided, list, tuple)):
            raise TypeError(f"name={name!r} is a {type(name).__name__}; pass a name, a schedule or a rule")
        for argument, value in (
            ("num_warmup_steps", num_warmup_steps),
            ("scheduler_specific_kwargs", scheduler_specific_kwargs),
        ):
            if value:
                raise ValueError(f"{argument}={value!r} is for a name; a schedule has its own, so leave it out")
    if isinstance(schedule, (list, tuple)):
        schedule = [_resolved(each, num_training_steps) for each in schedule]
    else:
        schedule = _resolved(schedule, num_training_steps)
    return (scheduler_of if isinstance(schedule, (Feedback, Guided)) else ScheduleLR)(optimizer, schedule)


def named_schedule(name: str, num_warmup_steps: Any, num_training_steps: Any, kwargs: dict[str, Any]) -> Any:
    """The schedule, or the rule with its warmup, that a name and transformers' arguments stand for."""
    if name not in scheduler_names():
        raise ValueError(
            f"name={name!r} is no scheduler{checks.closest(name, scheduler_names())}; "
            f"there are {', '.join(scheduler_names())}"
        )
    if name in RULES:
        rule: Feedback = construct(RULES[name], kwargs)
        warmup = lengths.optional_length("num_warmup_steps", num_warmup_steps)
        return Warmup(warmup) >> rule if warmup else rule
    cls = SCHEDULES[name]
    if cls is Constant:
        if num_warmup_steps:
            warnings.warn(
                f"num_warmup_steps={num_warmup_steps!r} means nothing to 'constant', as in transformers; "
                "use 'constant_with_warmup' to warm up",
                UserWarning,
                stacklevel=checks.callers_level(),
            )
        return construct(cls, kwargs)
    parameters = dict(kwargs)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for argument, value in (("num_warmup_steps", num_warmup_steps), ("num_training_steps", num_training_steps)):
        if argument not in fields or value is None:
            continue
        if argument in parameters:
            raise TypeError(f"{argument} is given twice, as {value!r} and as {kwargs[argument]!r}; pass it once")
        parameters[argument] = value
    if "num_warmup_steps" not in parameters:
        raise ValueError(f"num_warmup_steps=None leaves {name!r} without its warmup; pass a number, 0 for none")
    schedule = construct(cls, parameters)
    if "num_training_steps" in fields and not schedule.is_resolved:
        raise ValueError(f"num_training_steps=None leaves {name!r} without its end; pass the number of training steps")
    if isinstance(schedule, WarmupStableDecay):
        _warn_of_another_total(schedule)
    return schedule


def _warn_of_another_total(schedule: WarmupStableDecay) -> None:
    """Warns if a given stable phase makes the schedule shorter or longer than the training."""
    total, stable = schedule.num_training_steps, schedule.num_stable_steps
    if total is None or stable is None:
        return
    parts = (schedule.num_warmup_steps, stable, schedule.num_decay_steps)
    if lengths.rest(total, parts) != 0:
        warnings.warn(
            f"num_stable_steps={stable!r} makes the schedule {sum(parts)} steps long and "
            f"num_training_steps is {total}; num_stable_steps wins, leave it out to fill the total",
            UserWarning,
            stacklevel=checks.callers_level(),
        )


def _resolved(schedule: Any, total: int | float | None) -> Any:
    if not isinstance(schedule, (Schedule, Guided)):
        return schedule  # a rule has no lengths, and for anything else the scheduler raises the error
    if total is not None:
        return schedule.resolve(total)
    if not schedule.is_resolved:
        raise ValueError(
            f"{schedule!r} has lengths that hang on the total; pass num_training_steps, the number of training steps"
        )
    return schedule
