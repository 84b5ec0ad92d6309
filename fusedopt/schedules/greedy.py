"""GreedyLR, as transformers has it: a class with its arguments, attributes and state dict."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from .feedback import Greedy
from .measured import MetricLR

# What a state dict has, in the order of transformers' own.
_KEYS = (
    *("factor", "min_lrs", "max_lrs", "patience", "verbose", "cooldown", "warmup", "cooldown_counter"),
    *("warmup_counter", "mode", "threshold", "threshold_mode", "best", "num_bad_epochs", "num_good_epochs", "eps"),
    *("last_epoch", "smooth", "window_size", "reset_start", "reset_start_original"),
)


class GreedyLR(MetricLR):
    """A learning rate that rises while a metric improves and falls while it does not: transformers' GreedyLR.

    It is a `MetricLR` with the rule `Greedy`, and has the state dict of transformers' class, so checkpoints go both
    ways. Source: Subramanian, Krishnamoorthy and Murthy, arXiv:2512.14527.

    Args:
        optimizer: Whose lr to set.
        mode: "min" if small is good, "max" if large is.
        factor: What the lr is multiplied or divided by, in (0, 1).
        patience: Improvements or failures in a row without effect.
        threshold: What counts as an improvement.
        threshold_mode: "rel", a fraction of the best, or "abs".
        cooldown: Measurements after a reduction that are ignored.
        warmup: Measurements after an increase that are ignored.
        min_lr: The lowest lr: a number, or one for each group.
        max_lr: The highest lr, likewise.
        eps: Changes that are not larger than this are not made.
        verbose: Whether to print a line for every change.
        smooth: Whether measurements are averaged over the last `window_size`.
        window_size: Of the average.
        reset_start: Reductions at min_lr before everything starts anew.

    Raises:
        ValueError: A value is out of range, or min_lr and max_lr do not have a group's lr between them.
        TypeError: A value is of the wrong type.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float | list[float] | tuple[float, ...] = 1e-3,
        max_lr: float | list[float] | tuple[float, ...] = 1.0,
        eps: float = 1e-8,
        verbose: bool = False,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        rule = Greedy(
            mode=mode,
            factor=factor,
            patience=patience,
            threshold=threshold,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
            warmup=warmup,
            min_lr=tuple(min_lr) if isinstance(min_lr, list) else min_lr,
            max_lr=tuple(max_lr) if isinstance(max_lr, list) else max_lr,
            eps=eps,
            verbose=verbose,
            smooth=smooth,
            window_size=window_size,
            reset_start=reset_start,
        )
        super().__init__(optimizer, rule)

    def is_better(self, current: float, best: float) -> bool:
        """Whether a measurement counts as an improvement.

        Args:
            current: The measurement.
            best: What it is compared with.
        """
        return self.rule._is_better(current, best)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """What transformers' class saves: arguments, counters, and the lr of each group."""
        self._adopt()
        state = {key: getattr(self, key) for key in _KEYS}
        state["_last_lr"] = [float(lr) for lr in self.get_last_lr()]
        state["_init_lrs"] = [float(lr) for lr in self.base_lrs]
        if self.smooth:
            values, total = list(self.state["values"]), self.state["sum"]
            state["_streaming_avg"] = {"window_size": self.window_size, "values": values, "sum": total}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where a scheduler was when `state_dict` was called, and sets the lr that it had.

        Args:
            state_dict: Of this class, of transformers' GreedyLR, or of a `MetricLR` with the rule `Greedy`.

        Raises:
            ValueError: It is of another kind of scheduler or for another number of groups.
        """
        super().load_state_dict(state_dict)
        if "_init_lrs" in state_dict:
            self.base_lrs = [float(lr) for lr in state_dict["_init_lrs"]]
