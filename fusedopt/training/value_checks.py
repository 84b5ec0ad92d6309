"""Whether numbers are ones that train: ranges, and what two of them mean together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..engine.optimizer import FusedOptimizer
from .findings import Finding

_SMALLEST_FLOAT16 = 2.0**-24  # that is not 0; bfloat16 reaches as low as float32
_SMALLEST_NORMAL = 2.0**-126  # of float32, in which steps compute
_FAR = 10  # times outside the usual range: no longer unusual but wrong


class Settings(NamedTuple):
    """An optimizer's arguments, of a recipe or of a param group, and what they mean.

    Attributes:
        cls: The optimizer's class; None for one that is not known here.
        values: Arguments by name.
        steps: Steps in all; None if that is not known.
        where: Precedes fields of a param group, such as "group 1: "; empty for a recipe.
        option: Precedes what is an option in a recipe.
    """

    cls: type[FusedOptimizer] | None
    values: dict[str, Any]
    steps: int | None
    where: str = ""
    option: str = "options."

    def finding(self, severity: str, field: str, reason: str, remedy: str) -> Finding:
        """A finding about one of the values."""
        name = field.partition("[")[0]
        option = "" if name in ("lr", "betas", "eps", "weight_decay", "max_grad_norm") else self.option
        return Finding(severity, f"{self.where}{option}{field}", self.values.get(name), reason, remedy)


def check_values(of: Settings) -> Iterator[Finding]:
    """Every finding about an optimizer's numbers."""
    for check in (_lr, _weight_decay, _betas, _memory_of_moments, _eps, _clipping, _relative_step):
        yield from check(of)


def _is_bad(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isfinite(value)


def _lr(of: Settings) -> Iterator[Finding]:
    lr = of.values.get("lr")
    if lr is None:
        return
    lr = float(lr)
    low, high = (1e-8, 1e-2) if of.cls is None else of.cls.USUAL_LR
    name = "this optimizer" if of.cls is None else of.cls.__name__
    if _is_bad(lr) or lr < 0:
        yield of.finding("error", "lr", "is no step size", f"pass a number in [{low:g}, {high:g}]")
    elif lr == 0:
        yield of.finding("error", "lr", "nothing learns", f"pass a number in [{low:g}, {high:g}]")
    elif lr > high * _FAR:
        yield of.finding(
            "error",
            "lr",
            f"is {lr / high:.0f} times what {name} is known to bear, {high:g}",
            f"begin with {high / 10:g}",
        )
    elif lr > high:
        yield of.finding("warning", "lr", f"is above what {name} usually bears, {high:g}", _high_remedy(of, high))
    elif lr < low:
        yield of.finding("warning", "lr", f"is below {low:g}, where hardly anything moves", f"begin with {low * 1e3:g}")


def _high_remedy(of: Settings, high: float) -> str:
    if of.cls is not None and of.cls.USUAL_LR_NOTE:
        return f"{of.cls.USUAL_LR_NOTE}; begin with {high / 3:g}"
    return f"use a tenth, {float(of.values['lr']) / 10:g}, unless a range test says otherwise"


def _weight_decay(of: Settings) -> Iterator[Finding]:
    decay, lr = of.values.get("weight_decay"), of.values.get("lr")
    if decay is None:
        return
    if _is_bad(decay) or decay < 0:
        yield of.finding("error", "weight_decay", "lets weights grow", "pass a number >= 0, usually 0.01 to 0.1")
    elif lr is not None and not _is_bad(lr) and decay * float(lr) >= 1:
        yield of.finding(
            "error", "weight_decay", f"times lr={lr:g} is {decay * float(lr):g}: a step turns weights around",
            "pass 0.1 or less",
        )  # fmt: skip
    elif decay > 0.1 and not (of.cls is not None and decay <= of.cls.USUAL_WEIGHT_DECAY):
        yield of.finding(
            "warning", "weight_decay", "is more than the usual 0 to 0.1",
            "use 0.1, unless the configuration that it is from has this lr, too: what counts is their product",
        )  # fmt: skip


def _betas(of: Settings) -> Iterator[Finding]:
    betas = of.values.get("betas")
    if betas is None:
        return
    betas = [float(beta) for beta in betas]
    wrong = [i for i, beta in enumerate(betas) if _is_bad(beta) or not 0 <= beta < 1]
    for i in wrong:
        yield of.finding("error", f"betas[{i}]", "is no average", "pass numbers in [0, 1), for example 0.9 and 0.999")
    if wrong or len(betas) < 2:
        return
    for i, least in enumerate((0.8, 0.9)):
        if betas[i] < least:
            yield of.finding(
                "warning", f"betas[{i}]", f"averages over {1 / (1 - betas[i]):.0f} steps only, less than any usual one",
                f"pass a number in [{least}, 1)",
            )  # fmt: skip
    if of.cls is not None and any(not spec.is_signed for spec in of.cls.STATES) and betas[0] ** 2 >= betas[1]:
        yield of.finding(
            "warning", "betas", "beta1 >= sqrt(beta2): the first moment remembers longer than the second, so that an "
            "old large gradient is divided by new small ones", "swap them, or pass (0.9, 0.999)",
        )  # fmt: skip


def _memory_of_moments(of: Settings) -> Iterator[Finding]:
    """A moment that averages over more steps than there are is still its first gradients at the end."""
    betas, steps = of.values.get("betas"), of.steps
    if betas is None or steps is None:
        return
    for i, beta in enumerate(betas):
        if i == 0 or not 0 <= float(beta) < 1:
            continue
        if i == 2 and of.values.get("t_beta3"):
            continue  # grows into it
        span = 1 / (1 - float(beta))
        if span > steps:
            yield of.finding(
                "warning", f"betas[{i}]", f"averages over {span:,.0f} steps, and there are {steps:,}",
                f"pass at most {1 - 1 / max(10.0, steps / 5):.3g}, which averages over a fifth of them"
                + (", or set options.t_beta3" if i == 2 else ""),
            )  # fmt: skip


def _eps(of: Settings) -> Iterator[Finding]:
    eps = of.values.get("eps")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        return
    if _is_bad(eps) or eps < 0:
        yield of.finding("error", "eps", "may make denominators 0 or negative", "pass a number >= 0, for example 1e-8")
        return
    if eps < _SMALLEST_NORMAL:
        yield of.finding(
            "warning", "eps", "is nothing in float32: where gradients are 0, the step divides 0 by 0", "pass 1e-8"
        )
    elif eps > 1e-2:
        yield of.finding(
            "warning", "eps", "is larger than the root of most second moments: steps become those of SGD", "pass 1e-8"
        )
    root = math.sqrt(_SMALLEST_FLOAT16)
    names = " and ".join(name for name, stored in _formats_of_squares(of).items() if stored == "float16")
    if names and eps < root:
        yield of.finding(
            "warning", "eps",
            f"is below {root:.2g}, the root of the smallest number that {names} can hold in float16: below it is "
            "0, and then a step is its first moment over eps",
            f"keep {names} in bfloat16 or 8 bits, or pass eps={root:.0e}",
        )  # fmt: skip


def _formats_of_squares(of: Settings) -> dict[str, str]:
    """The states that are divided by, which have no sign, and the format that each has."""
    if of.cls is None:
        return {}
    wanted = of.values.get("state_dtype", "float32")
    unsigned = [spec for spec in of.cls.STATES if not spec.is_signed and not spec.always_float32]
    names = [spec.name for spec in unsigned if not spec.is_maximum or of.values.get("amsgrad")]
    formats = {name: wanted.get(name, "float32") if isinstance(wanted, dict) else wanted for name in names}
    aliases = {"fp16": "float16", "bf16": "bfloat16"}
    formats = {name: aliases.get(str(f), str(f).removeprefix("torch.")) for name, f in formats.items()}
    return formats


def _clipping(of: Settings) -> Iterator[Finding]:
    norm = of.values.get("max_grad_norm")
    if norm is None:
        return
    if _is_bad(norm) or norm <= 0:
        yield of.finding("error", "max_grad_norm", "would make every gradient 0", "pass a number > 0, or none")
    elif norm > 100:
        yield of.finding("warning", "max_grad_norm", "is rarely reached, so nothing is clipped", "pass 1.0, or none")
    elif norm < 1e-3:
        yield of.finding(
            "warning", "max_grad_norm", "is below nearly every norm: each gradient is scaled to it", "pass 1.0"
        )


def _relative_step(of: Settings) -> Iterator[Finding]:
    """An optimizer that takes its rate from the step's number, together with one that is given."""
    if of.values.get("relative_step") and of.values.get("lr") is not None and of.values.get("variant") != "torch":
        yield of.finding(
            "error", "lr", "together with relative_step=True, which takes the rate from the step's number",
            "set relative_step and scale_parameter to false, or leave lr out and use the schedule 'constant'",
        )  # fmt: skip
