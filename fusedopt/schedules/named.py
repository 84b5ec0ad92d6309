"""The schedules of transformers, by its names and with its parameters.

They are equal to transformers' own up to the last training step. After that they stay at their end value, whereas its
cosines swing back to the peak. In the equations s is the step, w is num_warmup_steps, T is num_training_steps, and
q = (s - w) / max(1, T - w). Without T, `resolve(T)` completes a schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .. import checks
from . import lengths, shapes
from .compose import falling
from .curve import Flat, InverseRoot, Phase, Ramp
from .lengths import Length, Steps
from .schedule import Schedule, checked_total, fill


class _Warmed(Schedule):
    """What these schedules have in common: a warmup, a total, and checks of both."""

    num_warmup_steps: Length
    num_training_steps: Any = None
    _needs_total: ClassVar[bool] = True
    _lengths: ClassVar[tuple[str, ...]] = ("num_warmup_steps",)

    def _check(self, **values: Any) -> None:
        for name in self._lengths:
            values[name] = lengths.optional_length(name, getattr(self, name))
        if values["num_warmup_steps"] is None:
            raise ValueError("num_warmup_steps=None is no length; pass a number of steps, or a ratio in [0, 1)")
        if self._needs_total and self.num_training_steps is not None:
            total = values["num_training_steps"] = lengths.steps("num_training_steps", self.num_training_steps)
            values.update(self._in_steps(total, values))
        fill(self, **values)

    def _in_steps(self, total: Steps, values: dict[str, Any]) -> dict[str, Any]:
        """The lengths of `_lengths` that are given, in steps."""
        given = [name for name in self._lengths if values[name] is not None]
        return dict(zip(given, lengths.resolved_all([values[name] for name in given], total)))

    def resolve(self, total: Steps) -> Schedule:
        total = checked_total(total)
        if self.is_resolved:
            return self
        if self._needs_total:
            return replace(self, num_training_steps=total)  # type: ignore[type-var]
        return replace(self, **self._in_steps(total, vars(self)))  # type: ignore[type-var]

    @property
    def is_resolved(self) -> bool:
        if self._needs_total:
            return self.num_training_steps is not None
        return not lengths.is_ratio(self.num_warmup_steps)

    def _warmup(self, low: float = 0.0, shape: str = "linear") -> Phase:
        w = self.num_warmup_steps
        return Phase(w, Ramp(shapes.rise(shape), low, 1.0, max(1, w)), 1.0)

    @property
    def _rest(self) -> Steps:
        """Steps between the warmup and the end."""
        return self.num_training_steps - self.num_warmup_steps


@dataclass(frozen=True)
class ConstantWithWarmup(_Warmed):
    """s / max(1, w), then 1.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
    """

    name: ClassVar[str] = "constant_with_warmup"
    _needs_total: ClassVar[bool] = False
    num_warmup_steps: Length

    def __post_init__(self) -> None:
        self._check()

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        return [self._warmup(), Phase(None, Flat(1.0), 1.0)]


@dataclass(frozen=True)
class Linear(_Warmed):
    """s / max(1, w), then (T - s) / (T - w), then 0.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
    """

    name: ClassVar[str] = "linear"
    num_warmup_steps: Length = 0
    num_training_steps: Steps | None = None

    def __post_init__(self) -> None:
        self._check()

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        return [self._warmup(), falling(shapes.fall("linear"), 0.0, 1.0, self._rest, arrives=True)]


@dataclass(frozen=True)
class Cosine(_Warmed):
    """s / max(1, w), then (1 + cos(2 pi num_cycles q)) / 2, which holds from T on.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        num_cycles: Waves; half of one goes down to 0.
    """

    name: ClassVar[str] = "cosine"
    num_warmup_steps: Length = 0
    num_training_steps: Steps | None = None
    num_cycles: float = 0.5

    def __post_init__(self) -> None:
        self._check(num_cycles=checks.nonnegative("num_cycles", self.num_cycles))

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        return [self._warmup(), self._wave(0.0)]

    def _wave(self, low: float, offset: Steps = 0) -> Phase:
        shape = shapes.fall("cosine", self.num_cycles)
        return falling(shape, low, 1.0, max(1, self._rest), arrives=False, offset=offset)


@dataclass(frozen=True)
class CosineWithRestarts(_Warmed):
    """s / max(1, w), then (1 + cos(pi (num_cycles q mod 1))) / 2, then 0.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        num_cycles: How often it goes down to 0, each time from 1.
    """

    name: ClassVar[str] = "cosine_with_restarts"
    num_warmup_steps: Length = 0
    num_training_steps: Steps | None = None
    num_cycles: float = 1

    def __post_init__(self) -> None:
        self._check(num_cycles=checks.nonnegative("num_cycles", self.num_cycles))

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        shape = shapes.fall("cosine_with_restarts", self.num_cycles)
        return [self._warmup(), falling(shape, 0.0, 1.0, max(1, self._rest), arrives=True)]


@dataclass(frozen=True)
class Polynomial(_Warmed):
    """s / max(1, w), then (1 - r)(1 - q)^power + r with r = lr_end / base_lr, then r.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        lr_end: The lr that every group ends at, below that of all of them; a group whose lr is 0 stays at 0.
        power: Of the polynomial, above 0.
    """

    name: ClassVar[str] = "polynomial"
    num_warmup_steps: Length = 0
    num_training_steps: Steps | None = None
    lr_end: float = 1e-7
    power: float = 1.0

    def __post_init__(self) -> None:
        self._check(
            lr_end=checks.nonnegative("lr_end", self.lr_end),
            power=checks.positive("power", self.power),
        )

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        low = _relative("lr_end", self.lr_end, base_lr, equal_is_fine=False)
        shape = shapes.fall("polynomial", power=self.power)
        return [self._warmup(), falling(shape, low, 1.0, self._rest, arrives=True)]

    @property
    def needs_base_lr(self) -> bool:
        return True


@dataclass(frozen=True)
class InverseSqrt(_Warmed):
    """s / max(1, w), then 1 / sqrt((s + timescale - w) / timescale), without end.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        timescale: Steps after which it has fallen to 0.71; by default the warmup's length, or 10,000 without a warmup.
    """

    name: ClassVar[str] = "inverse_sqrt"
    _needs_total: ClassVar[bool] = False
    num_warmup_steps: Length = 0
    timescale: float | None = None

    def __post_init__(self) -> None:
        self._check(timescale=None if self.timescale is None else checks.positive("timescale", self.timescale))

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        timescale = self.timescale or self.num_warmup_steps or 10_000
        return [self._warmup(), Phase(None, InverseRoot(float(timescale)), 0.0)]


@dataclass(frozen=True)
class CosineWithMinLR(Cosine):
    """s / max(1, w), then c (1 - r) + r with c as in `Cosine`, which holds from T on.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        num_cycles: Waves; half of one goes down to the minimum.
        min_lr: The lowest lr, for every group; r = min_lr / base_lr. A group whose lr is 0 stays at 0.
        min_lr_rate: r itself, in [0, 1]. One of the two is needed.
    """

    name: ClassVar[str] = "cosine_with_min_lr"
    min_lr: float | None = None
    min_lr_rate: float | None = None

    def __post_init__(self) -> None:
        self._check(**self._minimum())

    def _minimum(self) -> dict[str, Any]:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            given = "not" if self.min_lr is None else "both"
            raise ValueError(
                f"min_lr={self.min_lr!r} and min_lr_rate={self.min_lr_rate!r} are {given} given; "
                "pass one of them, an lr or a ratio of the group's lr"
            )
        return {
            "num_cycles": checks.nonnegative("num_cycles", self.num_cycles),
            "min_lr": None if self.min_lr is None else checks.nonnegative("min_lr", self.min_lr),
            "min_lr_rate": None if self.min_lr_rate is None else _ratio("min_lr_rate", self.min_lr_rate),
        }

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        return [self._warmup(), self._wave(self._low(base_lr))]

    def _low(self, base_lr: float | None) -> float:
        return self.min_lr_rate if self.min_lr is None else _relative("min_lr", self.min_lr, base_lr)  # type: ignore

    @property
    def needs_base_lr(self) -> bool:
        return self.min_lr is not None


@dataclass(frozen=True)
class CosineWarmupWithMinLR(CosineWithMinLR):
    """`CosineWithMinLR` one step ahead: it does not begin at 0, and is at the minimum one step earlier.

    (s + 1) / max(1, w), or wr + (1 - wr) s / max(1, w - 1), then that cosine with q = (s - w + 1) / max(1, T - w),
    which holds from T - 1 on.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        num_cycles: Waves; half of one goes down to the minimum.
        min_lr: The lowest lr, for every group; r = min_lr / base_lr. A group whose lr is 0 stays at 0.
        min_lr_rate: r itself, in [0, 1]. One of the two is needed.
        warmup_lr_rate: wr in [0, 1], the multiplier that the warmup begins at.
    """

    name: ClassVar[str] = "cosine_warmup_with_min_lr"
    warmup_lr_rate: float | None = None

    def __post_init__(self) -> None:
        rate = None if self.warmup_lr_rate is None else _ratio("warmup_lr_rate", self.warmup_lr_rate)
        self._check(**self._minimum(), warmup_lr_rate=rate)

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        w = self.num_warmup_steps
        whole = math.floor(w)  # where w is not, the first formula would pass 1 at this step: the second one has begun
        if self.warmup_lr_rate is None:
            ramp = Ramp(shapes.rise("linear"), 0.0, 1.0, max(1, w), offset=1)
        else:
            ramp = Ramp(shapes.rise("linear"), self.warmup_lr_rate, 1.0, max(1, w - 1))
        return [Phase(whole, ramp, 1.0), self._wave(self._low(base_lr), offset=1 + whole - w)]


@dataclass(frozen=True)
class WarmupStableDecay(_Warmed):
    """Warmup f(1 - r) + r, then 1, then decay f(1 - r) + r, then r.

    Args:
        num_warmup_steps: Steps, or a ratio of the total.
        num_decay_steps: Steps, or a ratio of the total.
        num_training_steps: Steps in all.
        num_stable_steps: Steps between the two; by default what they leave of the total, which they override.
        warmup_type: f(q) of the warmup: "linear" q, "cosine" (1 - cos pi q) / 2 or "1-sqrt" 1 - sqrt(1 - q).
        decay_type: f(q) of the decay: "linear" 1 - q, "cosine" (1 + cos 2 pi num_cycles q) / 2 or "1-sqrt" 1 - sqrt(q).
        min_lr_ratio: r in [0, 1].
        num_cycles: Waves of a cosine decay.

    Source: Hu et al., "MiniCPM" (arXiv:2404.06395); the 1-sqrt decay is Haegele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations" (arXiv:2405.18392).
    """

    name: ClassVar[str] = "warmup_stable_decay"
    _lengths: ClassVar[tuple[str, ...]] = ("num_warmup_steps", "num_stable_steps", "num_decay_steps")
    num_warmup_steps: Length
    num_decay_steps: Length
    num_training_steps: Steps | None = None
    num_stable_steps: Length | None = None
    warmup_type: str = "linear"
    decay_type: str = "cosine"
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5

    def __post_init__(self) -> None:
        checks.one_of("warmup_type", self.warmup_type, ("linear", "cosine", "1-sqrt"))
        checks.one_of("decay_type", self.decay_type, ("linear", "cosine", "1-sqrt"))
        if self.num_decay_steps is None:
            raise ValueError("num_decay_steps=None is no length; pass a number of steps, or a ratio in [0, 1)")
        self._check(
            min_lr_ratio=_ratio("min_lr_ratio", self.min_lr_ratio),
            num_cycles=checks.nonnegative("num_cycles", self.num_cycles),
        )
        if self.num_training_steps is not None and self.num_stable_steps is None:
            self._stable()

    def _stable(self) -> Steps:
        if self.num_stable_steps is not None:
            return self.num_stable_steps
        w, d = self.num_warmup_steps, self.num_decay_steps
        rest = lengths.rest(self.num_training_steps, (w, d))  # type: ignore[arg-type]
        if rest < 0:
            raise ValueError(
                f"num_warmup_steps={w} and num_decay_steps={d} together exceed num_training_steps="
                f"{self.num_training_steps}; make them shorter, or train for longer"
            )
        return rest

    @property
    def is_resolved(self) -> bool:
        values = [getattr(self, name) for name in self._lengths]
        return super().is_resolved or not any(value is None or lengths.is_ratio(value) for value in values)

    def phases(self, before: float | None, base_lr: float | None) -> list[Phase]:
        decay = shapes.fall(self.decay_type, self.num_cycles)
        return [
            self._warmup(self.min_lr_ratio, self.warmup_type),
            Phase(self._stable(), Flat(1.0), 1.0),
            falling(decay, self.min_lr_ratio, 1.0, self.num_decay_steps, arrives=True),
        ]


def _relative(name: str, lr: float, base_lr: float | None, *, equal_is_fine: bool = True) -> float:
    """An absolute lr as a ratio of the base lr, which is not below it."""
    assert base_lr is not None
    if base_lr == 0:
        return 0.0  # whatever the multiplier, the lr stays 0
    if lr > base_lr or (lr == base_lr and not equal_is_fine):
        raise ValueError(
            f"{name}={lr!r} is not below the lr {base_lr!r} of a group, so that lr would not fall; "
            f"pass a smaller {name}"
        )
    return lr / base_lr


def _ratio(name: str, value: Any) -> float:
    result = checks.nonnegative(name, value)
    if result > 1:
        raise ValueError(f"{name}={result!r} is above 1; pass a ratio of the group's lr, from 0 to 1")
    return result
