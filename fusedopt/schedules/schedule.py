"""What a schedule is: a pure value, callable at any step, that can be composed, compared, written and read back."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import operator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import checks
from . import lengths, picture
from .curve import AnyCurve, Curve, Phase
from .elementary import Array
from .lengths import Steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEDULES: dict[str, type[Schedule]] = {}
_KEPT = 64  # curves of different base lrs that one schedule remembers


def create_schedule(name: str, **parameters: Any) -> Schedule:
    """Makes a schedule from its name.

    Args:
        name: One of `schedule_names()`.
        **parameters: Arguments of the schedule's class.

    Returns:
        The schedule.

    Raises:
        ValueError: The name is unknown or a parameter is outside its range.
        TypeError: A parameter is unknown or of a wrong type.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule name {name!r} is not known{checks.closest(str(name), SCHEDULES)}; "
            f"there are {', '.join(schedule_names())}"
        )
    return construct(SCHEDULES[name], parameters)


def schedule_names() -> list[str]:
    """Every name that `create_schedule` takes, sorted."""
    return sorted(SCHEDULES)


def construct(cls: type, parameters: dict[str, Any]) -> Any:
    """A schedule or rule of that class. An unknown or missing parameter raises an error that names it."""
    checks.known_keywords(cls, parameters)
    needed = [n for n, p in inspect.signature(cls).parameters.items() if p.default is p.empty and n not in parameters]
    if needed:
        raise ValueError(
            f"{cls.__name__} lacks {' and '.join(needed)}; pass {'it' if len(needed) == 1 else 'them'} too"
        )
    return cls(**parameters)


class Value:
    """Parameters, repr, equality, hash and JSON form of frozen dataclasses."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters as plain numbers, strings, lists and dicts; `from_dict` reads it back."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": self.name, **{field.name: _plain(getattr(self, field.name)) for field in fields}}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())


def fill(target: Any, /, **values: Any) -> None:
    """Sets the fields of a frozen dataclass that is being constructed."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class Schedule(Value):
    """A multiplier of the learning rate for every step: ``schedule(step, base_lr=None)``.

    Schedules are values. They keep no position, are equal if their parameters are, hash, and round-trip through
    `to_dict` and `to_json`. ``a >> b`` is ``a`` followed by ``b``, ``a * b`` (or ``a * 0.1``) their product.

    Lengths are steps or ratios of a total (a float in [0, 1), rounded up), which `resolve` turns into steps. Steps need
    not be whole: a warmup of 20.34 rises by 1 / 20.34 in each step, and what follows it begins at 20.34.
    """

    # Not a field, so that copies and LambdaLR's state_dict see only the parameters of a schedule.
    __slots__ = ("_curves",)
    _curves: dict[float | None, AnyCurve]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            SCHEDULES[cls.name] = cls

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        """What the schedule consists of.

        Args:
            before: The multiplier that the schedule before this one ended at; None if it is the first.
            base_lr: What the multiplier will multiply; only schedules with `needs_base_lr` use it.

        Returns:
            Its phases in order.
        """
        raise NotImplementedError

    def resolve(self, total: Steps) -> Schedule:
        """The same schedule with every length in steps.

        Args:
            total: Number of steps of the whole training.

        Returns:
            An equal schedule if all lengths are known, else one with ratios and open lengths filled in.

        Raises:
            ValueError: A sequence is longer than the total, or the phases of warmup_stable_decay are.
        """
        raise NotImplementedError

    @property
    def is_resolved(self) -> bool:
        """Whether every length is known in steps."""
        raise NotImplementedError

    @property
    def needs_base_lr(self) -> bool:
        """Whether the multiplier depends on the base lr, because the schedule ends at an absolute one."""
        return False

    @property
    def length(self) -> int | None:
        """Steps until it ends and its last value holds; None if it has no end."""
        length = self.exact_length
        return None if length is None else math.ceil(length)

    @property
    def exact_length(self) -> Steps | None:
        """`length` as it is, if it is not whole: what follows in a sequence begins there."""
        # Durations do not depend on the base lr. With infinity, no absolute lr is too large.
        total: Steps = 0
        for phase in self._checked().phases(None, float("inf")):
            if phase.steps is None:
                return None
            total += phase.steps
        return total

    def curve(self, base_lr: float | None = None) -> AnyCurve:
        """The function of the step, ready to be evaluated often.

        Args:
            base_lr: As in a call.

        Returns:
            A callable that takes a step >= 0, which it does not check.
        """
        if not self.needs_base_lr:
            base_lr = None
        elif base_lr is None:
            raise ValueError(f"{self!r} ends at an absolute lr; pass base_lr, the lr that it multiplies")
        try:
            known = self._curves
        except AttributeError:
            known = {}
            fill(self, _curves=known)
        if base_lr not in known:
            if len(known) >= _KEPT:
                known.clear()
            known[base_lr] = self._checked()._curve(base_lr)
        return known[base_lr]

    def _curve(self, base_lr: float | None) -> AnyCurve:
        return Curve(self.phases(None, base_lr))

    def _checked(self) -> Schedule:
        if not self.is_resolved:
            raise ValueError(
                f"{self!r} has lengths that hang on the total; call resolve(total) and use what it returns"
            )
        return self

    def __call__(self, step: Any, base_lr: float | None = None) -> Any:
        """The multiplier of the lr.

        Args:
            step: A step >= 0, or an array of them of an integer dtype.
            base_lr: The lr that is multiplied. Only schedules that end at an absolute lr need it.

        Returns:
            A float, or a float64 array of the shape of `step`, whose elements have the same bits as the floats.

        Raises:
            ValueError: A step is negative, a length is not resolved or base_lr is missing.
            TypeError: A step is not an integer.
        """
        if type(step) is int and step >= 0:
            return self.curve(base_lr)(step)
        if isinstance(step, np.ndarray):
            return self.curve(base_lr).at(_array_of_steps(step))
        try:
            index = None if isinstance(step, bool) else operator.index(step)
        except TypeError:  # as for a tensor of several elements, which has __index__ all the same
            index = None
        if index is None:
            raise TypeError(f"step={step!r} is a {type(step).__name__}; pass an int or a numpy array of integers")
        return self.curve(base_lr)(checks.whole("step", index))

    # What these make is defined in terms of this class, so it is made by name.
    def __rshift__(self, other: Any) -> Schedule:
        return create_schedule("sequence", parts=(self, other)) if isinstance(other, Schedule) else NotImplemented

    def __mul__(self, other: Any) -> Schedule:
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            other = create_schedule("constant", value=other)
        return create_schedule("product", factors=(self, other)) if isinstance(other, Schedule) else NotImplemented

    __rmul__ = __mul__

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @staticmethod
    def from_dict(description: dict[str, Any]) -> Schedule:
        """The schedule that `to_dict` described.

        Args:
            description: "name" and the parameters of that schedule.

        Returns:
            An equal schedule.

        Raises:
            ValueError: There is no name, an unknown one, or a parameter outside its range.
            TypeError: A parameter is unknown or of a wrong type.
        """
        if not isinstance(description, dict) or "name" not in description:
            raise ValueError(f"{description!r} describes no schedule; pass a dict with its name and parameters")
        parameters = {key: _from_plain(value) for key, value in description.items() if key != "name"}
        return create_schedule(description["name"], **parameters)

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that `to_json` wrote. Raises a ValueError for any other text."""
        try:
            description = json.loads(text)
        except ValueError as error:
            raise ValueError(f"text is not JSON ({error}); pass what to_json() gave") from error
        return Schedule.from_dict(description)

    def plot(self, steps: int | None = None, base_lr: float | None = None, ax: Axes | None = None) -> Axes:
        """Draws the schedule with matplotlib.

        Args:
            steps: How many, from 0; the schedule's own length by default.
            base_lr: The lr that is multiplied; without it the multiplier is drawn.
            ax: Axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return picture.plot([self], steps=steps, base_lr=base_lr, ax=ax)

    def sketch(self, steps: int | None = None, base_lr: float | None = None, width: int = 72, height: int = 12) -> str:
        """Draws the schedule with characters.

        Args:
            steps: How many, from 0; the schedule's own length by default.
            base_lr: The lr that is multiplied; without it the multiplier is drawn.
            width: Characters in a line.
            height: Lines of the drawing itself.

        Returns:
            Lines to print.
        """
        return picture.sketch(self, steps=steps, base_lr=base_lr, width=width, height=height)


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return Schedule.from_dict(value)
    return tuple(_from_plain(item) for item in value) if isinstance(value, list) else value


def _array_of_steps(step: np.ndarray) -> Array:
    if not np.issubdtype(step.dtype, np.integer):
        raise TypeError(f"step is an array of {step.dtype}; pass an array of integers")
    if step.size and step.min() < 0:
        raise ValueError(f"step has the negative element {step.min()}; pass steps >= 0")
    return step.astype(np.float64)


def checked_total(total: Any) -> Steps:
    """A total number of steps."""
    return lengths.steps("total", total)
