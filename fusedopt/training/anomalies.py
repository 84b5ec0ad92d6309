"""What is wrong with a training, found in what is recorded of its steps. docs/training/monitor.md has the equations."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .. import checks
from .anomalies_series import Series, alternation, median, spread

KINDS = {
    "non_finite": "a loss or gradient norm that is inf or NaN",
    "overflow": "float16 gradients that overflow again and again",
    "loss_spike": "a loss far above those before it",
    "divergence": "a loss that rises and stays",
    "plateau": "a loss that no longer falls",
    "oscillation": "a loss that goes up and down by turns",
    "exploding_gradients": "gradients far larger than those before",
    "vanishing_gradients": "gradients that are gone while the loss is not",
    "update_spike": "an update far larger than the learning rate explains",
    "stuck_weights": "weights that do not move",
    "dead_parameters": "parameters whose gradient is 0",
    "zero_lr": "a learning rate of 0",
}


@dataclass(frozen=True)
class Anomaly:
    """One thing that is wrong.

    Attributes:
        kind: One of KINDS.
        step: Where it was found.
        value: What was measured.
        limit: What it is compared with.
        message: A sentence.
    """

    kind: str
    step: int
    value: float
    limit: float
    message: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From where on something is an anomaly. The equations are in docs/training/monitor.md.

    Args:
        window: Records that a value is compared with.
        least: Records that there must be to compare; `recent` at least.
        recent: Records that running medians are of.
        deviations: Robust standard deviations above the running median that make a spike.
        loss_spike: How many times the running median a loss must be for a spike, too.
        divergence: How many times its least running median the loss must be.
        oscillation: The autocorrelation at lag 1 below which a loss oscillates.
        gradient_spike: How many times their running median gradients must be.
        gradient_growth: How many times their first running median gradients may become.
        vanishing: The share of their largest running median at which gradients are gone.
        update_spike: How many times the expected norm an update must be.
        stuck: The share of the expected norm below which an update moves nothing.
        repeats: Records in a row with norms, or an lr of 0, that make weights stuck or dead, or the lr zero.
        overflows: Falls of GradScaler's scale within 20 records that are too many.
        plateau_after: Records before there may be a plateau.
        plateau: The share of its average fall per doubling of the steps below which the loss no longer falls.
        quiet: Records without an anomaly before the same kind is reported anew.
    """

    window: int = 64
    least: int = 16
    recent: int = 10
    deviations: float = 8.0
    loss_spike: float = 1.1
    divergence: float = 1.5
    oscillation: float = -0.75
    gradient_spike: float = 10.0
    gradient_growth: float = 100.0
    vanishing: float = 1e-3
    update_spike: float = 3.0
    stuck: float = 1e-2
    repeats: int = 2
    overflows: int = 5
    plateau_after: int = 1000
    plateau: float = 0.05
    quiet: int = 20

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "oscillation":
                if not -1 <= checks.number(each.name, value) < 0:
                    raise ValueError(f"oscillation={value!r} is no negative autocorrelation; pass a number in [-1, 0)")
            elif isinstance(each.default, int):
                checks.count(each.name, value)
            else:
                checks.positive(each.name, value)
        if self.least < self.recent:
            raise ValueError(f"least={self.least!r} is less than recent={self.recent!r}; pass as many at least")


def number(value: Any) -> float | None:
    """A recorded number as a float; None if it was not recorded, or is something else, such as a text."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class Detector:
    """Finds anomalies in the records of a run, given one after the other.

    It reports an anomaly when it begins, and again only after it was gone for `Limits.quiet` records.

    Args:
        limits: From where on something is an anomaly; the defaults raise no false alarm in trainings that go well.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        window, recent = self.limits.window, self.limits.recent
        self._loss, self._grads = Series(window, recent), Series(window, recent)
        self._rates = Series(window, recent)  # norm of the update over the learning rate
        self._all_losses = array("d")
        self._largest_lr = 0.0
        self._scale: float | None = None
        self._falls: deque[bool] = deque(maxlen=20)
        self._repeats: dict[str, int] = {}
        self._last_seen: dict[str, int] = {}
        self._count = 0
        self._next_look = self.limits.plateau_after
        self._is_flat = False

    def add(self, record: Mapping[str, Any]) -> list[Anomaly]:
        """Looks at the next record.

        Args:
            record: As `Monitor` writes them; what is missing is not looked at.

        Returns:
            The anomalies that begin with it.
        """
        self._count += 1
        found = []
        for look in _LOOKS:
            for anomaly in look(self, record):
                last = self._last_seen.get(anomaly.kind)
                self._last_seen[anomaly.kind] = self._count
                if last is None or self._count - last > self.limits.quiet:
                    found.append(anomaly)
        self._remember(record)
        return found

    def _remember(self, record: Mapping[str, Any]) -> None:
        loss, norm, lr = (number(record.get(name)) for name in ("loss", "grad_norm", "lr"))
        if loss is not None and math.isfinite(loss):
            self._loss.add(loss)
            self._all_losses.append(loss)
        if norm is not None and math.isfinite(norm):
            self._grads.add(norm)
        rate = self._rate(record)
        if rate is not None:
            self._rates.add(rate)
        if lr is not None:
            self._largest_lr = max(self._largest_lr, lr)

    def _rate(self, record: Mapping[str, Any]) -> float | None:
        """The norm of the update over the learning rate that explains it: none above those that have been borne."""
        update, lr = number(record.get("update_norm")), number(record.get("lr"))
        if update is None or lr is None or not math.isfinite(update) or update <= 0:
            return None
        borne = min(lr, self._largest_lr) if self._largest_lr > 0 else lr
        return update / borne if borne > 0 else None

    def _in_a_row(self, name: str, holds: bool) -> bool:
        self._repeats[name] = self._repeats.get(name, 0) + 1 if holds else 0
        return self._repeats[name] >= self.limits.repeats

    def _spike(
        self, record: Mapping[str, Any], kind: str, value: float, series: Series, times: float, text: str
    ) -> list[Anomaly]:
        """A value far above those before it; nothing if it is not.

        Args:
            record: Where the value is from.
            kind: What it is then.
            value: A finite number.
            series: Those before it; there is a running median.
            times: How many times that it must be.
            text: The sentence, with places for {value}, {median} and {times}, the value over the median.
        """
        limit, middle = series.jump(self.limits.deviations, times), series.median
        if value <= limit or middle is None:
            return []
        ratio = value / middle if middle else math.inf
        return [_anomaly(record, kind, value, limit, text.format(value=value, median=middle, times=ratio))]

    # ---- each kind ---------------------------------------------------------------------------------

    def _non_finite(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        # With a loss scale, gradients that overflow are what it is for.
        names = {"loss": "the loss"} if "scale" in record else {"loss": "the loss", "grad_norm": "the gradient norm"}
        for name, text in names.items():
            value = number(record.get(name))
            if value is not None and not math.isfinite(value):
                yield _anomaly(record, "non_finite", value, math.inf, f"{text} is {value}")
                return

    def _overflow(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        scale = number(record.get("scale"))
        if scale is None:
            return
        self._falls.append(self._scale is not None and scale < self._scale)
        self._scale = scale
        falls, limit = sum(self._falls), self.limits.overflows
        if falls >= limit or scale < 1:
            text = f"the loss scale fell {falls} times within 20 steps, to {scale:g}: gradients overflow float16"
            yield _anomaly(record, "overflow", falls, limit, text)

    def _loss_spike(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        loss, limits = number(record.get("loss")), self.limits
        if loss is not None and math.isfinite(loss) and self._loss.count >= limits.least:
            text = "the loss is {value:.4g}, far above its running median of {median:.4g}"
            yield from self._spike(record, "loss_spike", loss, self._loss, limits.loss_spike, text)

    def _divergence(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        series, limits = self._loss, self.limits
        middle = series.median
        if middle is None or series.count < limits.least + limits.recent or middle <= series.least:
            return
        limit = series.rise(series.least, 0.75 * limits.deviations, limits.divergence)
        if middle > limit:
            text = f"the loss has risen to {middle:.4g} from {series.least:.4g} and stays there"
            yield _anomaly(record, "divergence", middle, limit, text)

    def _plateau(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        losses, count = self._all_losses, len(self._all_losses)
        if count < self._next_look:
            return
        self._next_look = math.ceil(count * 1.25)
        lr = number(record.get("lr"))
        if lr is not None and lr < 0.5 * self._largest_lr:
            return  # it is meant to settle
        half = count // 4  # the second half of the run, in two parts
        earlier, later = losses[count - 2 * half : count - half], losses[count - half :]
        (before, sigma), after = spread(earlier), median(later)
        error = 1.2533 * sigma * math.sqrt(2 / half)  # standard error of a difference of medians
        begin = median(losses[: self.limits.recent])
        # Of the fall per unit of log(steps): that of the second half against the average.
        average = (begin - after) / math.log(count / self.limits.recent)
        fall = (before - after + 2 * error) / math.log((count - half / 2) / (count - 1.5 * half))
        limit = self.limits.plateau * average
        was_flat, self._is_flat = self._is_flat, fall < limit
        if self._is_flat and not was_flat:
            text = f"the loss has not fallen below {min(before, after):.4g} within {2 * half:,} steps"
            yield _anomaly(record, "plateau", fall, limit, text)

    def _oscillation(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        values, limits = list(self._loss.values), self.limits
        if "loss" not in record or len(values) < limits.window or self._count % 8:
            return
        found = alternation(values)
        if found < limits.oscillation and spread(values)[1] > 0.01 * abs(median(values)):
            text = f"the loss goes up and down by turns (autocorrelation {found:.2f})"
            yield _anomaly(record, "oscillation", found, limits.oscillation, text)

    def _exploding(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        norm, limits = number(record.get("grad_norm")), self.limits
        if norm is None or not math.isfinite(norm):
            return
        if self._grads.count >= limits.least and self._grads.median:
            text = "the gradient norm is {value:.4g}, {times:.0f} times its running median"
            found = self._spike(record, "exploding_gradients", norm, self._grads, limits.gradient_spike, text)
            if found:
                yield from found
                return
        now, first = self._grads.median, self._grads.first
        if now is not None and first is not None and first > 0 and now > limits.gradient_growth * first:
            text = f"the gradient norm has grown from {first:.4g} to {now:.4g}"
            yield _anomaly(record, "exploding_gradients", now, limits.gradient_growth * first, text)

    def _vanishing(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        now, limits = self._grads.median, self.limits
        if now is None or number(record.get("grad_norm")) is None or self._grads.most <= 0:
            return
        loss, first = self._loss.median, self._loss.first
        if loss is not None and first is not None and abs(loss) < 0.1 * abs(first):
            return  # it is learned
        limit = limits.vanishing * self._grads.most
        if now < limit:
            text = f"the gradient norm has fallen to {now:.4g} from {self._grads.most:.4g}, and the loss has not"
            yield _anomaly(record, "vanishing_gradients", now, limit, text)

    def _update_spike(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        rate = self._rate(record)
        if rate is not None and self._rates.median:
            text = "the update is {times:.1f} times as large as those before it"
            yield from self._spike(record, "update_spike", rate, self._rates, self.limits.update_spike, text)

    def _stuck(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        for group in record.get("groups", ()):
            update, expected = number(group.get("update")), number(group.get("expected"))
            if update is None or record.get("skipped"):
                continue
            limit = self.limits.stuck * (expected or 0.0)
            stands = (number(group.get("lr")) or 0.0) > 0 and (update == 0 or update < limit)
            if self._in_a_row(f"stuck {group.get('name')}", stands):
                text = f"the weights of {group.get('name')} do not move: the norm of the update is {update:.3g}"
                yield _anomaly(record, "stuck_weights", update, limit, text)
                return

    def _dead(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        if "dead" not in record:
            return
        names = [name for name in record["dead"] if self._repeats.get(f"dead {name}", 0) + 1 >= self.limits.repeats]
        for key in [key for key in self._repeats if key.startswith("dead ") and key[5:] not in record["dead"]]:
            del self._repeats[key]
        for name in record["dead"]:
            self._in_a_row(f"dead {name}", True)
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            text = f"the gradient of {', '.join(names[:3])}{more} is 0 in all elements"
            yield _anomaly(record, "dead_parameters", len(names), 0, text)

    def _zero_lr(self, record: Mapping[str, Any]) -> Iterator[Anomaly]:
        lr = number(record.get("lr"))
        # A schedule may begin with a step at 0, so it takes one more.
        if lr is not None and self._in_a_row("lr", lr == 0) and self._repeats["lr"] > self.limits.repeats:
            yield _anomaly(record, "zero_lr", 0.0, 0.0, "the learning rate is 0, so nothing is learned")


_Look = Callable[[Detector, Mapping[str, Any]], Iterator[Anomaly]]

_LOOKS: tuple[_Look, ...] = (
    Detector._non_finite,
    Detector._overflow,
    Detector._update_spike,
    Detector._loss_spike,
    Detector._divergence,
    Detector._exploding,
    Detector._vanishing,
    Detector._plateau,
    Detector._oscillation,
    Detector._stuck,
    Detector._dead,
    Detector._zero_lr,
)


def _anomaly(record: Mapping[str, Any], kind: str, value: float, limit: float, text: str) -> Anomaly:
    return Anomaly(kind, int(record["step"]), float(value), float(limit), text)
