"""A torch scheduler that reports the learning rates of Adafactor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from .adafactor import Adafactor


class AdafactorSchedule(LRScheduler):
    """Reports the learning rates that an `Adafactor` takes by itself, for loops that ask a scheduler for them.

    It never writes to the optimizer. `get_last_lr` asks `Adafactor.actual_lrs` when it is called.

    Args:
        optimizer: An `Adafactor`.
        initial_lr: What is reported of a group before its first step.

    Raises:
        TypeError: The optimizer is another.
    """

    def __init__(self, optimizer: Adafactor, initial_lr: float = 0.0) -> None:
        if not isinstance(optimizer, Adafactor):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, whose learning rate is in its param groups; "
                "pass a fusedopt.Adafactor"
            )
        # Not the base's constructor: it writes lr and initial_lr into the groups.
        self.optimizer: Adafactor = optimizer
        self.initial_lr = checks.nonnegative("initial_lr", initial_lr)
        self.base_lrs = [self.initial_lr for _ in optimizer.param_groups]
        self.last_epoch = 0
        self._step_count = 1

    def step(self, epoch: int | None = None) -> None:
        """Counts a step.

        Args:
            epoch: To count from instead.
        """
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each param group's last step."""
        return [self.initial_lr if lr is None else lr for lr in self.optimizer.actual_lrs()]

    @property
    def _last_lr(self) -> list[float | Tensor]:  # type: ignore[override]
        return self.get_lr()

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate of each param group's last step."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """The state of the scheduler; what it reports comes from the optimizer's."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}
