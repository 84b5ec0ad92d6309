"""Rules that are driven by measurements as torch learning rate schedulers."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import checks
from .attributes import bounds, counted, measurement, setting
from .compose import Constant
from .feedback import Feedback, Greedy, Guided, for_groups
from .scheduler import ScheduleLR, base_lrs_of

if TYPE_CHECKING:
    from transformers import TrainerCallback


class _MeasuredLR(ScheduleLR):
    """Sets each group's lr to that of a rule times a schedule of the step."""

    _is_ready = False

    def __init__(self, optimizer: Optimizer, guided: Guided | Feedback) -> None:
        if isinstance(guided, Feedback):
            guided = Guided.of(guided)
        if not isinstance(guided, Guided):
            raise TypeError(f"guided={guided!r} is a {type(guided).__name__}; pass a rule, or a schedule >> a rule")
        self._take(guided)
        self.state = self.rule.start(self._first_lrs(optimizer))
        super().__init__(optimizer, guided.schedule)

    def _initial_step(self) -> None:
        """Sets the first lr, before anything can be measured."""
        super()._initial_step()
        self._is_ready, self._has_stepped = True, False

    def _take(self, guided: Guided) -> None:
        lead = guided.schedule.length if guided.leads else 0
        self.guided, self.rule, self._lead = guided, guided.rule, lead or 0

    def _first_lrs(self, optimizer: Optimizer) -> list[float]:
        """What the rule begins with."""
        return base_lrs_of(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The lr of each group at `last_epoch`, after what has been measured."""
        return [lr * curve(self.last_epoch) for lr, curve in zip(self.state["lrs"], self._curves)]

    _get_closed_form_lr = get_lr

    def _measure(self, value: float) -> None:
        self._check_groups()
        before = self.state["lrs"]
        bases = [float(lr) for lr in self.base_lrs]
        self.rule.update(self.state, value, bases, counts=self.last_epoch >= self._lead)
        if getattr(self.rule, "verbose", False) and self.state["lrs"] != before:
            print(f"step {self.last_epoch + 1}: the lr goes from {before} to {self.state['lrs']}")

    def state_dict(self) -> dict[str, Any]:
        """The position, the schedule, the rule and what it has measured."""
        return {
            **super().state_dict(),
            "guided": self.guided.to_dict(),
            "measured": copy.deepcopy(self.state),
            "has_stepped": self._has_stepped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where a scheduler was when `state_dict` was called, and sets the lr that it had.

        Args:
            state_dict: Of a scheduler like this one, whose schedule and rule replace those given.

        Raises:
            ValueError: It is of another kind of scheduler or for another number of groups.
        """
        guided = Guided.from_dict(state_dict["guided"]) if "guided" in state_dict else None
        if guided is None or type(guided.rule) is not type(self.rule):
            what = "another kind of scheduler" if guided is None else f"a scheduler with {guided.rule!r}"
            raise ValueError(f"the state_dict is of {what}, not of one with {self.rule!r}; make that scheduler")
        super().load_state_dict(state_dict)
        self._take(guided)
        self.state, self._has_stepped = copy.deepcopy(state_dict["measured"]), state_dict["has_stepped"]
        self._set(self.get_last_lr())


class GradientLR(_MeasuredLR):
    """A schedule that is driven by the gradients: `GradientNorm` or `GradientSparsity`.

    Args:
        optimizer: Whose lr to set.
        guided: The rule, or a schedule with one: ``warmup(200) >> GradientNorm()``, ``Cosine(...) * GradientNorm()``.

    Attributes:
        state: What has been measured.
    """

    def __init__(self, optimizer: Optimizer, guided: Guided | Feedback) -> None:
        rule = guided.rule if isinstance(guided, Guided) else guided
        if isinstance(rule, Feedback) and not rule.measures_gradients:
            raise TypeError(f"{rule!r} needs a metric; use MetricLR, or get_scheduler, which chooses")
        super().__init__(optimizer, guided)

    def step(self, metrics: Any = None, epoch: int | None = None) -> None:  # type: ignore[override]
        """Measures, and advances by one step. Call it after the optimizer's step, before `zero_grad`.

        Args:
            metrics: The measurement: the norm, or the fraction of zeros. By default it is taken from the optimizer's
                `last_grad_norm` or from the gradients.
            epoch: The step to go to instead; torch warns that this is deprecated.
        """
        if self._is_ready and epoch is None:
            self._measure(self.rule.measure(self.optimizer) if metrics is None else float(metrics))  # type: ignore
        super().step(epoch)


class MetricLR(_MeasuredLR, ReduceLROnPlateau):
    """A schedule that is driven by a metric: `Plateau` or `Greedy`.

    A rule alone changes the lr that it finds, as the originals do: whoever else sets the lr may go on doing so. With a
    schedule, the lr is that of the rule times the schedule, whatever it was before.

    To isinstance it is a ReduceLROnPlateau, so the Trainer of transformers steps it after each evaluation with the
    metric, and Lightning with the value that it is told to monitor.

    It has the attributes of ReduceLROnPlateau or, with `Greedy`, of transformers' GreedyLR, and what is set holds from
    the next measurement on and in checkpoints. `default_min_lr` and `mode_worse` follow from others and cannot be set.

    Args:
        optimizer: Whose lr to set.
        guided: The rule, or a schedule with one: ``warmup(200) >> Plateau()``, ``Cosine(...) * Plateau()``.

    Attributes:
        state: What has been measured.
    """

    _checks_order = False  # a metric may be measured before the first step

    mode, factor, patience, cooldown = map(setting, ("mode", "factor", "patience", "cooldown"))
    threshold, threshold_mode, eps = map(setting, ("threshold", "threshold_mode", "eps"))
    warmup, verbose, smooth, window_size = map(setting, ("warmup", "verbose", "smooth", "window_size"))
    reset_start_original = setting("reset_start")
    min_lrs, max_lrs = bounds("min_lr"), bounds("max_lr")
    best = counted("best", measurement)
    num_bad_epochs, num_good_epochs = counted("num_bad_epochs"), counted("num_good_epochs")
    cooldown_counter, warmup_counter = counted("cooldown_counter"), counted("warmup_counter")
    reset_start = counted("reset_start")

    def __init__(self, optimizer: Optimizer, guided: Guided | Feedback) -> None:
        self.bounds: dict[str, list[float]] = {}
        rule = guided.rule if isinstance(guided, Guided) else guided
        if isinstance(rule, Feedback) and rule.measures_gradients:
            raise TypeError(f"{rule!r} is driven by gradients; use GradientLR, or get_scheduler, which chooses")
        super().__init__(optimizer, guided)
        if self._is_alone:  # where Greedy starts anew
            self.base_lrs = list(self.state["lrs"])

    @property
    def _is_alone(self) -> bool:
        """Whether there is no schedule to set the lr: the rule changes the lr that it finds then, as torch's does."""
        schedule = self.guided.schedule
        return isinstance(schedule, Constant) and schedule.value in (None, 1.0)

    def _first_lrs(self, optimizer: Optimizer) -> list[float]:
        first = super()._first_lrs(optimizer)  # checked
        return [float(group["lr"]) for group in optimizer.param_groups] if self._is_alone else first

    def _set(self, lrs: list[float | Tensor]) -> None:
        if self._is_alone:  # an lr that has not changed is left alone
            kept = [group["lr"] for group in self.optimizer.param_groups]
            lrs = [old if float(old) == lr else lr for old, lr in zip(kept, lrs)]
        super()._set(lrs)

    def _adopt_lrs(self) -> None:
        """Goes on from the lr as it is, if there is no schedule that sets it: others may have changed it."""
        if self._is_alone and self._is_ready:
            self._check_groups()
            self.state["lrs"] = [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, metrics: Any = None, epoch: int | None = None) -> None:  # type: ignore[override]
        """Advances by one step, and takes a measurement if there is one.

        Args:
            metrics: The metric, a number or a one-element tensor. Without it this is a step of the schedule alone: a
                warmup advances, and the rule sees nothing. A measurement after such steps is no step of its own, so
                evaluations between training steps do not count as further training steps.
            epoch: The step to go to instead.

        Raises:
            ValueError: There is no measurement and no schedule beside the rule, so nothing would happen.
        """
        if metrics is None and self._is_ready and isinstance(self.guided.schedule, Constant):
            raise ValueError(f"{self.rule!r} lacks its measurement, and no schedule goes on; call step(metrics)")
        follows = False
        self._adopt_lrs()
        if metrics is not None:
            follows = self._has_stepped and epoch is None
            self._measure(float(metrics))
        self._has_stepped = metrics is None
        if follows:
            self._set(self.get_lr())
        else:
            super().step(epoch)

    def trainer_callback(self) -> TrainerCallback:
        """A callback for the Trainer of transformers, which steps this scheduler after evaluations only.

        With it, a warmup or a schedule that the rule is multiplied with advances with every training step. A rule alone
        has nothing to advance and does not need it.

        Returns:
            What to pass as one of the Trainer's ``callbacks``.

        Raises:
            ImportError: transformers is not installed.
        """
        checks.installed("transformers", "a Trainer", "'fusedopt[transformers]'")
        from transformers import TrainerCallback

        scheduler = self

        class StepCallback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                scheduler.step()

        return StepCallback()

    # ---- as others read and set it -------------------------------------------------------------------

    def change(self, **arguments: Any) -> None:
        """Replaces arguments of the rule, which goes on from what it has measured.

        Args:
            **arguments: Of the rule's class.

        Raises:
            ValueError: One is outside its range.
            TypeError: One is unknown or of a wrong type.
        """
        for name in arguments:
            self.bounds.pop(name, None)
        self._take(replace(self.guided, rule=replace(self.rule, **arguments)))  # type: ignore[type-var]

    def _adopt(self) -> None:
        """Takes over what has been written into the lists of bounds that were handed out."""
        groups = len(self.state["lrs"])
        now = {name: for_groups(name, tuple(values), groups) for name, values in self.bounds.items()}
        self.change(**{n: v for n, v in now.items() if v != for_groups(n, getattr(self.rule, n), groups)})

    def _measure(self, value: float) -> None:
        self._adopt()
        super()._measure(value)

    @property
    def default_min_lr(self) -> float | None:  # type: ignore[override]
        """The lowest lr if it is one for all groups."""
        low = self.rule.min_lr  # type: ignore[attr-defined]
        return None if isinstance(low, tuple) else low

    @property
    def mode_worse(self) -> float:  # type: ignore[override]
        """What every measurement is better than."""
        return self.rule.worst()  # type: ignore[attr-defined]

    def _init_is_better(self, mode: Any, threshold: Any, threshold_mode: Any) -> None:
        self.change(mode=mode, threshold=threshold, threshold_mode=threshold_mode)

    def _reset(self) -> None:
        """Starts anew: with torch's rule at the present lr, with that of transformers at the first one."""
        self._adopt_lrs()
        present = self.state["lrs"]
        self.state = self.rule.start([float(lr) for lr in self.base_lrs])
        if not isinstance(self.rule, Greedy):
            self.state["lrs"] = present
        self._set(self.get_lr())

    # ---- checkpoints ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, the schedule, the rule and what it has measured."""
        self._adopt()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where a scheduler was when `state_dict` was called, and sets the lr that it had.

        Args:
            state_dict: Of a scheduler like this one, whose schedule and rule replace those given; or of torch's
                ReduceLROnPlateau or transformers' GreedyLR, whichever this is like.

        Raises:
            ValueError: It is of another kind of scheduler or for another number of groups.
        """
        if "guided" not in state_dict and "num_bad_epochs" in state_dict:
            state_dict = self._translated(state_dict)
        super().load_state_dict(state_dict)
        self.bounds = {}

    def _translated(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """The state_dict of torch's or transformers' scheduler as one of ours."""
        if ("num_good_epochs" in theirs) != ("num_good_epochs" in self.state):
            raise ValueError(f"the state_dict is of another kind of scheduler than {self.rule!r}; make that one")
        names = {field.name for field in fields(self.rule)}  # type: ignore[arg-type]
        given = {name: theirs[name] for name in names if name in theirs}
        given.update({name[:-1]: tuple(theirs[name]) for name in ("min_lrs", "max_lrs") if name in theirs})
        given.pop("reset_start", None)  # the current value of the countdown; its initial value has another name
        if "reset_start_original" in theirs:
            given["reset_start"] = theirs["reset_start_original"]
        rule = replace(self.rule, **given)  # type: ignore[type-var]
        lrs = [float(lr) for lr in theirs["_last_lr"]]
        state = {**self.state, **{key: theirs[key] for key in self.state if key in theirs}, "lrs": lrs}
        state.update({key: value for key, value in theirs.get("_streaming_avg", {}).items() if key in state})
        return {
            **MetricLR.state_dict(self),
            "last_epoch": checks.whole("last_epoch", theirs["last_epoch"]),
            "_step_count": theirs["last_epoch"] + 1,
            "_last_lr": theirs["_last_lr"],
            "guided": replace(self.guided, rule=rule).to_dict(),
            "measured": state,
        }


def scheduler_of(optimizer: Optimizer, guided: Guided | Feedback) -> LRScheduler:
    """The scheduler that a rule needs."""
    rule = guided.rule if isinstance(guided, Guided) else guided
    return (GradientLR if rule.measures_gradients else MetricLR)(optimizer, guided)
