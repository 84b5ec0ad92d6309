"""Schedules that are driven by measurements of the loss, or of any other metric.

A rule is a value, like a schedule: parameters, and a pure step from a state and a measurement to the next state. The
state is a dict of numbers, so it is resumed as it was saved. `warmup(200) >> rule` warms up first, and
`schedule * rule` multiplies.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import checks
from .compose import Constant
from .lengths import Steps
from .schedule import Schedule, Value, construct, fill

State = dict[str, Any]
RULES: dict[str, type[Feedback]] = {}

# Words of a metric's name that say which direction is good.
_FALLING = re.compile("loss|nll|perplexity|ppl|error|err|r?mse|mae|wer|cer|ter|fid|bpb|bpc|regret")
_RISING = re.compile(
    "acc(uracy)?|f1|f|au(ro)?c|precision|recall|m?ap|m?iou|dice|r2|mcc|correlation|pearsonr?|spearmanr?|(sacre)?bleu|"
    "chrf|meteor|rouge(1|2|l|lsum)?|em|match|ndcg|mrr|psnr|ssim|reward|score"
)


class Feedback(Value):
    """A rule that drives the lr by measurements."""

    # Whether the measurement is a metric that the training loop hands over, or is taken from the gradients.
    measures_gradients: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            RULES[cls.name] = cls

    def start(self, base_lrs: list[float]) -> State:
        """The state before the first measurement.

        Args:
            base_lrs: The lr of each group.

        Returns:
            The state. Its "lrs" are the lr of each group, before any schedule multiplies them.

        Raises:
            ValueError: A parameter does not fit the groups.
        """
        raise NotImplementedError

    def update(self, state: State, value: float, base_lrs: list[float], counts: bool = True) -> None:
        """Takes a measurement.

        Args:
            state: Changed in place.
            value: What was measured.
            base_lrs: The lr of each group at the start.
            counts: False during a warmup, when the lr must not react.
        """
        raise NotImplementedError

    def __rrshift__(self, schedule: Any) -> Guided:
        return Guided(schedule, self, True) if isinstance(schedule, Schedule) else NotImplemented

    def __rmul__(self, schedule: Any) -> Guided:
        return Guided(schedule, self, False) if isinstance(schedule, Schedule) else NotImplemented

    @staticmethod
    def from_dict(description: dict[str, Any]) -> Feedback:
        """The rule that `to_dict` described."""
        cls = RULES.get(description.get("name", ""))
        if cls is None:
            raise ValueError(f"{description!r} describes no rule; there are {', '.join(sorted(RULES))}")
        parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "name"}
        return construct(cls, parameters)


@dataclass(frozen=True)
class Guided(Value):
    """A schedule and a rule: the lr is that of the rule times the schedule.

    Args:
        schedule: Of the step.
        rule: Driven by measurements.
        leads: Whether measurements count only after the schedule's end, as in ``warmup(200) >> rule``.
    """

    name: ClassVar[str] = "guided"
    schedule: Schedule
    rule: Feedback
    leads: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule={self.schedule!r} is a {type(self.schedule).__name__}; pass a Schedule")
        if not isinstance(self.rule, Feedback):
            raise TypeError(f"rule={self.rule!r} is a {type(self.rule).__name__}; pass a rule, for example Plateau()")
        if self.leads and self.schedule.is_resolved and self.schedule.length is None:
            raise ValueError(
                f"{self.schedule!r} has no end, so the rule after it would never begin; give it a length, or multiply"
            )

    def resolve(self, total: Steps) -> Guided:
        """The same with every length in steps."""
        return Guided(self.schedule.resolve(total), self.rule, self.leads)

    @property
    def is_resolved(self) -> bool:
        """Whether every length is known in steps."""
        return self.schedule.is_resolved

    @staticmethod
    def of(rule: Feedback) -> Guided:
        """A rule alone."""
        return Guided(Constant(), rule, False)

    @staticmethod
    def from_dict(description: dict[str, Any]) -> Guided:
        """What `to_dict` described."""
        if description.get("name") != Guided.name:
            raise ValueError(f"{description!r} describes no guided schedule; pass what to_dict() returned")
        return Guided(
            Schedule.from_dict(description["schedule"]), Feedback.from_dict(description["rule"]), description["leads"]
        )


def mode_of_metric(metric: str) -> str:
    """Whether a metric is better when it is smaller or larger, by its name.

    Args:
        metric: For example "eval_loss" or "eval/accuracy"; the last word that is known decides.

    Returns:
        "min" or "max".

    Raises:
        ValueError: No word of it is known.
    """
    for word in reversed(re.split(r"[^a-z0-9]+", metric.lower())):
        if _FALLING.fullmatch(word):
            return "min"
        if _RISING.fullmatch(word):
            return "max"
    raise ValueError(f"metric={metric!r} does not say whether small or large is good; pass mode, 'min' or 'max'")


class _Watching(Feedback):
    """What rules that watch a metric share: a mode, a threshold and a best value."""

    mode: str | None
    metric: str | None
    threshold: float
    threshold_mode: str
    factor: float
    min_lr: float | tuple[float, ...]
    eps: float

    def _check(self, **values: Any) -> None:
        mode, metric = self.mode, self.metric
        if metric is not None and not isinstance(metric, str):
            raise TypeError(f"metric={metric!r} is a {type(metric).__name__}; pass the metric's name")
        if mode is None:
            mode = "min" if metric is None else mode_of_metric(metric)
        checks.one_of("mode", mode, ("min", "max"))
        checks.one_of("threshold_mode", self.threshold_mode, ("rel", "abs"))
        factor = checks.number("factor", self.factor)
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor!r} is outside (0, 1); pass what to multiply the lr by, such as 0.5")
        for name in ("patience", "cooldown"):
            checks.whole(name, getattr(self, name))
        for name in ("threshold", "eps"):
            values[name] = checks.nonnegative(name, getattr(self, name))
        fill(self, mode=mode, factor=factor, min_lr=_lr_bounds("min_lr", self.min_lr), **values)

    def _is_better(self, value: float, best: float) -> bool:
        sign = 1.0 if self.mode == "max" else -1.0
        bar = best * (1.0 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        return value > bar if self.mode == "max" else value < bar

    def worst(self) -> float:
        """What every measurement is better than."""
        return -math.inf if self.mode == "max" else math.inf

    def _lowered(self, lrs: list[float]) -> list[float]:
        lows = [max(lr * self.factor, low) for lr, low in zip(lrs, for_groups("min_lr", self.min_lr, len(lrs)))]
        return [low if lr - low > self.eps else lr for lr, low in zip(lrs, lows)]


@dataclass(frozen=True)
class Plateau(_Watching):
    """The lr falls when a metric has stopped improving: the rule of torch's ReduceLROnPlateau, to the bit.

    A measurement is bad unless it is better than the best so far by more than the threshold. After more than `patience`
    bad ones in a row, lr = max(lr factor, min_lr), and the next `cooldown` measurements do not count as bad.

    Args:
        mode: "min" if small is good, "max" if large is; by default as the name of the metric says, else "min".
        factor: What the lr is multiplied by, in (0, 1).
        patience: Bad measurements in a row that have no effect.
        threshold: What counts as an improvement.
        threshold_mode: "rel", a fraction of the best, or "abs".
        cooldown: Measurements after a reduction that do not count as bad.
        min_lr: Where the lr stops: a number, or one for each group.
        eps: Reductions that are not larger than this are not made.
        metric: Name of the metric, for the mode.
    """

    name: ClassVar[str] = "reduce_lr_on_plateau"
    mode: str | None = None
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float | tuple[float, ...] = 0.0
    eps: float = 1e-8
    metric: str | None = None

    def __post_init__(self) -> None:
        self._check()

    def start(self, base_lrs: list[float]) -> State:
        for_groups("min_lr", self.min_lr, len(base_lrs))
        return {"lrs": list(base_lrs), "best": self.worst(), "num_bad_epochs": 0, "cooldown_counter": 0}

    def update(self, state: State, value: float, base_lrs: list[float], counts: bool = True) -> None:
        if self._is_better(value, state["best"]):
            state["best"] = value
            state["num_bad_epochs"] = 0
        elif counts:
            state["num_bad_epochs"] += 1
        if state["cooldown_counter"] > 0:
            state["cooldown_counter"] -= 1
            state["num_bad_epochs"] = 0
        if state["num_bad_epochs"] > self.patience:
            state["lrs"] = self._lowered(state["lrs"])
            state["cooldown_counter"] = self.cooldown
            state["num_bad_epochs"] = 0


@dataclass(frozen=True)
class Greedy(_Watching):
    """The lr rises while a metric improves and falls while it does not: GreedyLR, as transformers has it.

    After more than `patience` improvements in a row lr = min(lr / factor, max_lr), after more than `patience` failures
    in a row lr = max(lr factor, min_lr). After `reset_start` reductions that find every group at min_lr already,
    everything starts anew. Source: Subramanian, Krishnamoorthy and Murthy, "Dynamic learning rate scheduling based on
    loss changes leads to faster convergence" (arXiv:2512.14527).

    Args:
        mode: "min" if small is good, "max" if large is; by default as the name of the metric says, else "min".
        factor: What the lr is multiplied or divided by, in (0, 1).
        patience: Improvements or failures in a row without effect.
        threshold: What counts as an improvement.
        threshold_mode: "rel", a fraction of the best, or "abs".
        cooldown: Measurements after a reduction that are ignored.
        warmup: Measurements after an increase that are ignored.
        min_lr: The lowest lr: a number, or one for each group. It must not be above the group's lr, which could then
            only grow.
        max_lr: The highest lr, likewise; it must not be below the group's lr.
        eps: Changes that are not larger than this are not made.
        verbose: Whether to print a line for every change.
        smooth: Whether measurements are averaged over the last `window_size`.
        window_size: Of the average.
        reset_start: Reductions at min_lr before everything starts anew.
        metric: Name of the metric, for the mode.
    """

    name: ClassVar[str] = "greedy"
    mode: str | None = None
    factor: float = 0.95
    patience: int = 10
    threshold: float = 1e-6
    threshold_mode: str = "abs"
    cooldown: int = 0
    warmup: int = 0
    min_lr: float | tuple[float, ...] = 1e-3
    max_lr: float | tuple[float, ...] = 1.0
    eps: float = 1e-8
    verbose: bool = False
    smooth: bool = False
    window_size: int = 50
    reset_start: int = 500
    metric: str | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "reset_start"):
            checks.whole(name, getattr(self, name))
        if checks.whole("window_size", self.window_size) == 0:
            raise ValueError("window_size=0 leaves nothing to average; pass a number of measurements above 0")
        checks.flag("smooth", self.smooth)
        checks.flag("verbose", self.verbose)
        self._check(max_lr=_lr_bounds("max_lr", self.max_lr))

    def start(self, base_lrs: list[float]) -> State:
        lows = for_groups("min_lr", self.min_lr, len(base_lrs))
        highs = for_groups("max_lr", self.max_lr, len(base_lrs))
        for i, (lr, low, high) in enumerate(zip(base_lrs, lows, highs)):
            if low > lr:
                raise ValueError(
                    f"min_lr={low!r} is above the lr {lr!r} of param group {i}, which could then only grow; "
                    f"pass a min_lr below it, for example {lr / 100!r}"
                )
            if high < lr:
                raise ValueError(
                    f"max_lr={high!r} is below the lr {lr!r} of param group {i}, which could then only fall; "
                    "pass a max_lr above it"
                )
        return {"lrs": list(base_lrs), **self._counters()}

    def _counters(self) -> State:
        return {
            "best": self.worst(),
            "num_bad_epochs": 0,
            "num_good_epochs": 0,
            "cooldown_counter": 0,
            "warmup_counter": 0,
            "reset_start": self.reset_start,
            "values": [],
            "sum": 0.0,
        }

    def update(self, state: State, value: float, base_lrs: list[float], counts: bool = True) -> None:
        if self.smooth:
            value = self._average(state, value)
        waiting = next((name for name in ("cooldown_counter", "warmup_counter") if state[name] > 0), None)
        if waiting or not counts:
            if waiting:
                state[waiting] -= 1
            elif self._is_better(value, state["best"]):
                state["best"] = value
            state["num_bad_epochs"] = state["num_good_epochs"] = 0
            return
        better = self._is_better(value, state["best"])
        if better:
            state["best"] = value
        state["num_good_epochs"] = state["num_good_epochs"] + 1 if better else 0
        state["num_bad_epochs"] = 0 if better else state["num_bad_epochs"] + 1
        if state["num_good_epochs"] > self.patience:
            self._raise(state)
        elif state["num_bad_epochs"] > self.patience:
            self._lower(state, base_lrs)

    def _average(self, state: State, value: float) -> float:
        state["values"].append(value)
        state["sum"] += value
        while len(state["values"]) > self.window_size:
            state["sum"] -= state["values"].pop(0)
        return state["sum"] / len(state["values"])

    def _raise(self, state: State) -> None:
        lrs = state["lrs"]
        highs = [min(lr / self.factor, high) for lr, high in zip(lrs, for_groups("max_lr", self.max_lr, len(lrs)))]
        state["lrs"] = [high if high - lr > self.eps else lr for lr, high in zip(lrs, highs)]
        state["reset_start"] = self.reset_start
        state["warmup_counter"], state["num_good_epochs"] = self.warmup, 0

    def _lower(self, state: State, base_lrs: list[float]) -> None:
        state["lrs"] = lrs = self._lowered(state["lrs"])
        if all(lr <= low for lr, low in zip(lrs, for_groups("min_lr", self.min_lr, len(lrs)))):
            state["reset_start"] -= 1
            if state["reset_start"] <= 0:
                state.update(self._counters(), lrs=list(base_lrs))
        state["cooldown_counter"], state["num_bad_epochs"] = self.cooldown, 0


def _lr_bounds(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(checks.nonnegative(f"{name}[{i}]", item) for i, item in enumerate(value))
    return checks.nonnegative(name, value)


def for_groups(name: str, value: float | tuple[float, ...], groups: int) -> tuple[float, ...]:
    """One number for each param group, of those or of the one that was given."""
    if not isinstance(value, tuple):
        return (value,) * groups
    if len(value) != groups:
        raise ValueError(f"{name} has {len(value)} values for {groups} param groups; pass one number, or one for each")
    return value
