"""transformers' functions, one for each of its schedules, under their names and with their signatures.

``from transformers import get_cosine_schedule_with_warmup`` becomes ``from fusedopt.schedules import ...``. The values
are transformers' up to the last training step; docs/schedules.md says where they differ on purpose after it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .greedy import GreedyLR
from .lengths import Length
from .names import get_scheduler, named_schedule
from .scheduler import ScheduleLR

# Public in `fusedopt.schedules`, whose API reference has a page of them.
__all__ = [
    "get_adafactor_schedule",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_greedy_schedule",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_polynomial_decay_schedule_with_warmup",
    "get_reduce_on_plateau_schedule",
    "get_wsd_schedule",
]


def _made(
    name: str, optimizer: Optimizer, warmup: Length | None, total: Length | None, last_epoch: int, **parameters: Any
) -> ScheduleLR:
    return ScheduleLR(optimizer, named_schedule(name, warmup, total, parameters), last_epoch)


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> ScheduleLR:
    """A learning rate that stays what it is.

    Args:
        optimizer: Whose lr to set.
        last_epoch: Number of the last step when resuming without a state_dict, as in torch.
    """
    return _made("constant", optimizer, None, None, last_epoch)


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: Length, last_epoch: int = -1
) -> ScheduleLR:
    """`ConstantWithWarmup` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: Steps of the warmup, from 0 to the lr.
        last_epoch: As for `get_constant_schedule`.
    """
    return _made("constant_with_warmup", optimizer, num_warmup_steps, None, last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: Length, num_training_steps: Length, last_epoch: int = -1
) -> ScheduleLR:
    """`Linear` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: Steps of the warmup, or a ratio of the total in [0, 1).
        num_training_steps: Steps of the whole training.
        last_epoch: As for `get_constant_schedule`.
    """
    return _made("linear", optimizer, num_warmup_steps, num_training_steps, last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_training_steps: Length,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> ScheduleLR:
    """`Cosine` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: As for `get_linear_schedule_with_warmup`, like num_training_steps.
        num_training_steps: Steps of the whole training.
        num_cycles: Waves of the cosine; one half goes from the lr to 0.
        last_epoch: As for `get_constant_schedule`.
    """
    return _made("cosine", optimizer, num_warmup_steps, num_training_steps, last_epoch, num_cycles=num_cycles)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_training_steps: Length,
    num_cycles: float = 1,
    last_epoch: int = -1,
) -> ScheduleLR:
    """`CosineWithRestarts` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: As for `get_linear_schedule_with_warmup`, like num_training_steps.
        num_training_steps: Steps of the whole training.
        num_cycles: How often the lr falls to 0.
        last_epoch: As for `get_constant_schedule`.
    """
    name = "cosine_with_restarts"
    return _made(name, optimizer, num_warmup_steps, num_training_steps, last_epoch, num_cycles=num_cycles)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_training_steps: Length,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> ScheduleLR:
    """`Polynomial` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: As for `get_linear_schedule_with_warmup`, like num_training_steps.
        num_training_steps: Steps of the whole training.
        lr_end: The last lr of every group.
        power: Of the part that is left.
        last_epoch: As for `get_constant_schedule`.
    """
    more = {"lr_end": lr_end, "power": power}
    return _made("polynomial", optimizer, num_warmup_steps, num_training_steps, last_epoch, **more)


def get_inverse_sqrt_schedule(
    optimizer: Optimizer, num_warmup_steps: Length, timescale: int | None = None, last_epoch: int = -1
) -> ScheduleLR:
    """`InverseSqrt` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: Steps of the warmup.
        timescale: Steps until the lr has fallen to 1 / sqrt(2); those of the warmup by default, or 10,000.
        last_epoch: As for `get_constant_schedule`.
    """
    return _made("inverse_sqrt", optimizer, num_warmup_steps, None, last_epoch, timescale=timescale)


def get_cosine_with_min_lr_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_training_steps: Length,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> ScheduleLR:
    """`CosineWithMinLR` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: As for `get_linear_schedule_with_warmup`, like num_training_steps.
        num_training_steps: Steps of the whole training.
        num_cycles: Waves of the cosine.
        last_epoch: As for `get_constant_schedule`.
        min_lr: The last lr of every group; this or min_lr_rate.
        min_lr_rate: The last lr as a fraction of the group's.
    """
    more = {"num_cycles": num_cycles, "min_lr": min_lr, "min_lr_rate": min_lr_rate}
    return _made("cosine_with_min_lr", optimizer, num_warmup_steps, num_training_steps, last_epoch, **more)


def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_training_steps: Length,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> ScheduleLR:
    """`CosineWarmupWithMinLR` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: As for `get_linear_schedule_with_warmup`, like num_training_steps.
        num_training_steps: Steps of the whole training.
        num_cycles: Waves of the cosine.
        last_epoch: As for `get_constant_schedule`.
        min_lr: The last lr of every group; this or min_lr_rate.
        min_lr_rate: The last lr as a fraction of the group's.
        warmup_lr_rate: The first lr as a fraction of the group's.
    """
    more = {"num_cycles": num_cycles, "min_lr": min_lr, "min_lr_rate": min_lr_rate, "warmup_lr_rate": warmup_lr_rate}
    return _made("cosine_warmup_with_min_lr", optimizer, num_warmup_steps, num_training_steps, last_epoch, **more)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: Length,
    num_decay_steps: Length,
    num_training_steps: Length | None = None,
    num_stable_steps: Length | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> ScheduleLR:
    """`WarmupStableDecay` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        num_warmup_steps: Steps of the warmup.
        num_decay_steps: Steps of the decay.
        num_training_steps: Steps of the whole training; this or num_stable_steps.
        num_stable_steps: Steps between the two; what the total leaves by default.
        warmup_type: "linear", "cosine" or "1-sqrt", like decay_type.
        decay_type: The shape of the decay.
        min_lr_ratio: The first and the last lr as a fraction of the group's.
        num_cycles: Waves of a cosine decay.
        last_epoch: As for `get_constant_schedule`.
    """
    more = {
        **{"num_decay_steps": num_decay_steps, "num_stable_steps": num_stable_steps},
        **{"warmup_type": warmup_type, "decay_type": decay_type},
        **{"min_lr_ratio": min_lr_ratio, "num_cycles": num_cycles},
    }
    return _made("warmup_stable_decay", optimizer, num_warmup_steps, num_training_steps, last_epoch, **more)


def get_reduce_on_plateau_schedule(optimizer: Optimizer, **kwargs: Any) -> LRScheduler:
    """`Plateau` as a scheduler.

    Args:
        optimizer: Whose lr to set.
        **kwargs: Of `Plateau`, which are those of torch's ReduceLROnPlateau.
    """
    return get_scheduler("reduce_lr_on_plateau", optimizer, scheduler_specific_kwargs=kwargs)


def get_greedy_schedule(optimizer: Optimizer, **kwargs: Any) -> GreedyLR:
    """`GreedyLR`.

    Args:
        optimizer: Whose lr to set.
        **kwargs: Of `GreedyLR`.
    """
    return GreedyLR(optimizer, **kwargs)


def get_adafactor_schedule(optimizer: Any, initial_lr: float = 0.0) -> LRScheduler:
    """`AdafactorSchedule`, which reports the learning rates that an optimizer takes by itself.

    Args:
        optimizer: A `fusedopt.Adafactor`.
        initial_lr: What is reported before the first step.
    """
    import fusedopt  # in here, since optimizers are made after schedules

    return fusedopt.AdafactorSchedule(optimizer, initial_lr)
