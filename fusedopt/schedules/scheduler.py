"""Schedules as torch learning rate schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .curve import AnyCurve
from .schedule import Schedule


class ScheduleLR(LRScheduler):
    """Sets each group's lr to its base lr times a schedule, in closed form: nothing accumulates.

    It is stepped like any scheduler of torch, once after every optimizer step, and works wherever those do:
    in SequentialLR, in ChainedScheduler (as the first, like LambdaLR, because it does not multiply the lr it finds), in
    Lightning, Accelerate and the Trainer of transformers. An lr that is a Tensor is written to in place.

    Args:
        optimizer: Whose lr to set. The lr that its groups have now (or "initial_lr", if a scheduler left that) is
            multiplied.
        schedule: A schedule for all groups, or a sequence of one for each.
        last_epoch: Number of the last step when resuming without a state_dict, as in torch.

    Attributes:
        schedules: The schedule of each group.

    Raises:
        TypeError: A schedule is not a schedule, or the optimizer is not an optimizer.
        ValueError: There are not as many schedules as groups, or a schedule is not resolved or ends above a group's lr.
    """

    # torch warns if the first step comes before the optimizer's.
    _checks_order = True

    def __init__(self, optimizer: Optimizer, schedule: Schedule | Sequence[Schedule], last_epoch: int = -1) -> None:
        base_lrs = base_lrs_of(optimizer)
        self.schedules = _one_for_each(schedule, len(base_lrs))
        self._bases, self._curves = base_lrs, _curves(self.schedules, base_lrs)
        # Named explicitly, because a subclass may have another torch scheduler between this class and the base.
        LRScheduler.__init__(self, optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The lr of each group at `last_epoch`."""
        lrs: list[float | Tensor] = []
        previous, multiplier = None, 1.0
        bases = [base if type(base) is float else float(base) for base in self.base_lrs]
        if bases != self._bases:  # somebody has set them, and a curve that ends at an absolute lr depends on its base
            self._curves, self._bases = _curves(self.schedules, bases), bases
        for base, curve in zip(bases, self._curves):
            if curve is not previous:
                previous, multiplier = curve, curve(self.last_epoch)
            lrs.append(base * multiplier)
        return lrs

    _get_closed_form_lr = get_lr  # torch calls this when it is given a step

    def step(self, epoch: int | None = None) -> None:
        """Advances by one step.

        Args:
            epoch: The step to go to instead; torch warns that this is deprecated.
        """
        self._check_groups()
        if epoch is not None or (self._step_count <= 1 and self._checks_order):
            LRScheduler.step(self, epoch)
            return
        # What the base class does, without the detours that take it three times as long.
        self._step_count += 1
        self.last_epoch += 1
        self._set(self.get_lr())

    def _check_groups(self) -> None:
        if len(self.optimizer.param_groups) != len(self.base_lrs):
            raise ValueError(
                f"the optimizer has {len(self.optimizer.param_groups)} param groups, and had {len(self.base_lrs)} when "
                "its scheduler was made; make a new scheduler after adding groups"
            )

    def _set(self, lrs: list[float | Tensor]) -> None:
        last: list[float | Tensor] = []
        for group, lr in zip(self.optimizer.param_groups, lrs):
            kept = group["lr"]
            if isinstance(kept, Tensor):
                kept.fill_(float(lr))
                last.append(kept.clone())
            else:
                group["lr"] = lr
                last.append(lr)
        self._last_lr = last

    def state_dict(self) -> dict[str, Any]:
        """The position and the schedules with all their parameters, as numbers, strings, lists, dicts and tensors."""
        return {
            "schedules": [schedule.to_dict() for schedule in self.schedules],
            "base_lrs": _copies(self.base_lrs),
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": _copies(self._last_lr),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where a scheduler was when `state_dict` was called.

        Like torch's schedulers it leaves the lr in the optimizer to the optimizer's own state_dict.

        Args:
            state_dict: Of a scheduler like this one, whose schedules replace those given; or of a LambdaLR, such as
                transformers makes, which holds no schedules: then only the position and the base lrs are taken.

        Raises:
            ValueError: It is of another kind of scheduler or for another number of groups.
        """
        missing = [key for key in ("base_lrs", "last_epoch", "_step_count", "_last_lr") if key not in state_dict]
        if missing:
            raise ValueError(
                f"the state_dict lacks {', '.join(missing)}, so it is not of a scheduler like this one; "
                "pass what state_dict() of one returned"
            )
        base_lrs = _copies(state_dict["base_lrs"])
        if len(base_lrs) != len(self.optimizer.param_groups):
            raise ValueError(
                f"the state_dict is for {len(base_lrs)} param groups and the optimizer has "
                f"{len(self.optimizer.param_groups)}; give the optimizer the groups that it had"
            )
        schedules = self.schedules
        if "schedules" in state_dict:
            schedules = _one_for_each([Schedule.from_dict(d) for d in state_dict["schedules"]], len(base_lrs))
        curves = _curves(schedules, base_lrs)
        self.schedules, self._curves, self.base_lrs = schedules, curves, base_lrs
        self._bases = [float(lr) for lr in base_lrs]
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = _copies(state_dict["_last_lr"])


def base_lrs_of(optimizer: Any) -> list[float]:
    """The lr that a new scheduler of the optimizer multiplies: "initial_lr" if an earlier one left it, or the lr."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass a torch optimizer")
    lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if None in lrs:
        raise ValueError(
            f"param group {lrs.index(None)} has lr=None, which leaves nothing to schedule; give the optimizer an lr"
        )
    return [float(lr) for lr in lrs]


def _copies(lrs: Sequence[Any]) -> list[Any]:
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]


def _one_for_each(schedule: Any, groups: int) -> list[Schedule]:
    schedules = list(schedule) if isinstance(schedule, (list, tuple)) else [schedule] * groups
    if len(schedules) != groups:
        raise ValueError(
            f"there are {len(schedules)} schedules for {groups} param groups; pass one for all, or one for each"
        )
    for value in schedules:
        if not isinstance(value, Schedule):
            raise TypeError(f"schedule={value!r} is a {type(value).__name__}; pass a Schedule, or get_scheduler a name")
    return schedules


def _curves(schedules: list[Schedule], lrs: list[Any]) -> list[AnyCurve]:
    return [schedule.curve(float(lr)) for schedule, lr in zip(schedules, lrs)]
