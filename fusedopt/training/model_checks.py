"""Whether an optimizer's parameters are those of the model, and whether its steps can move them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.optimizer import FusedOptimizer
from ..groups import param_groups
from .findings import Finding
from .value_checks import Settings

_SHOWN = 3  # names of many
# Bits of a significand, the leading one included.
_BITS = {torch.bfloat16: 8, torch.float16: 11}
_TYPICAL = 0.02  # what weights are initialized with, and about their size afterwards
_STUCK = 0.5  # the share of weights from which it is worth a warning


def check_parameters(optimizer: Optimizer, model: nn.Module | None) -> Iterator[Finding]:
    """Findings about which parameters an optimizer has, and in which groups."""
    names = _names(optimizer, model)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    for i, group in enumerate(optimizer.param_groups):
        params = group["params"]
        twice = [names[param] for param in dict.fromkeys(params) if sum(p is param for p in params) > 1]
        if twice:
            yield Finding(
                "error", f"param group {i}", None, f"lists {_some(twice)} more than once, and steps it as often",
                "list each parameter once",
            )  # fmt: skip
        if params and not any(param.requires_grad for param in params):
            yield Finding(
                "warning", f"param group {i}", None, "is frozen: none of its parameters requires a gradient",
                "leave it out, or call requires_grad_()",
            )  # fmt: skip
        elif any(param.grad is not None for param in held) and params and all(p.grad is None for p in params):
            yield Finding(
                "warning", f"param group {i}", None, "is reached by no gradient: others have some, and it has none",
                "use its parameters in the loss, or leave it out",
            )  # fmt: skip
    yield from _tied(optimizer, names)
    if model is None:
        return
    left = [name for name, p in model.named_parameters() if p.requires_grad and not any(p is q for q in held)]
    if left:
        yield Finding(
            "warning", "param groups", None,
            f"lack {_some(left)}, which require gradients: {'they are' if len(left) > 1 else 'it is'} never stepped",
            "add what is to learn, and call requires_grad_(False) on the rest",
        )  # fmt: skip


def _names(optimizer: Optimizer, model: nn.Module | None) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {}
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
        for param, name in zip(group["params"], own):
            names.setdefault(param, name)
    names.update({param: name for name, param in (model.named_parameters() if model is not None else ())})
    return names


def _tied(optimizer: Optimizer, names: dict[Tensor, str]) -> Iterator[Finding]:
    """Parameters that are two objects in one memory, each of which is stepped."""
    at: dict[tuple[Any, int], list[tuple[int, Tensor]]] = {}
    for i, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.numel() and param.device.type != "meta" and type(param) is nn.Parameter:
                at.setdefault((param.device, param.data_ptr()), []).append((i, param))
    for found in at.values():
        params = list(dict.fromkeys(param for _, param in found))
        if len(params) > 1:
            groups = sorted({i for i, _ in found})
            where = f"group {groups[0]}" if len(groups) == 1 else f"groups {' and '.join(map(str, groups))}"
            yield Finding(
                "error", "param groups", None,
                f"{_some([names[p] for p in params])} in {where} share their memory: it is stepped {len(params)} times",
                "tie modules by assigning the Parameter itself, not its data",
            )  # fmt: skip


def check_decay(optimizer: Optimizer, model: nn.Module) -> Iterator[Finding]:
    """Biases and norms that decay."""
    spared = {p for group in param_groups(model, 1.0) if group["weight_decay"] == 0 for _, p in group["params"]}
    names = {param: name for name, param in model.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        decaying = [names[p] for p in group["params"] if p in spared and group.get("weight_decay", 0) > 0]
        if decaying:
            yield Finding(
                "warning", f"param group {i}: weight_decay", group["weight_decay"],
                f"decays biases and norms ({_some(decaying)}), which pulls scales towards 0",
                "pass fusedopt.param_groups(model, weight_decay) to the optimizer",
            )  # fmt: skip


def check_quantized(optimizer: Optimizer) -> Iterator[Finding]:
    """8-bit states that no parameter can have."""
    if not isinstance(optimizer, FusedOptimizer):
        return
    asked = any("8bit" in str(group["state_dtype"]) for group in optimizer.param_groups)
    report = optimizer.memory_report() if asked else None
    if report is None or not report.unquantized:
        return
    elements = sum(count for _, count in report.unquantized.values())
    reasons = ", ".join(report.unquantized)
    states = {spec.name for g in optimizer.param_groups for p in g["params"] for spec in optimizer.states_of(g, p)}
    saved = sum(report.ours[name] for name in states)
    if saved == 4 * elements:  # all of them are float32
        yield Finding(
            "warning", "state_dtype", "8bit", f"nothing is quantized: no parameter can be ({reasons})",
            "leave it out, or lower options.min_quantized_numel",
        )  # fmt: skip


def check_movement(of: Settings, params: Iterable[Tensor]) -> Iterator[Finding]:
    """16-bit weights that are so large that an update is rounded away."""
    step = _expected_step(of)
    if step is None or _keeps_more(of.values):
        return
    total = stuck = 0
    for param in params:
        if param.dtype not in _BITS or param.device.type == "meta":
            continue
        size = step * (max(float(param.detach().float().square().mean().sqrt()), 1e-3) if _is_scaled(of) else 1.0)
        half = half_ulp(param.detach())
        total += int(torch.count_nonzero(half))
        stuck += int(torch.count_nonzero(half > size))
    if total and stuck > _STUCK * total:
        yield _not_moving(of, f"{stuck / total:.0%} of the 16-bit weights are so large that an update of {step:.2g}")


def check_typical_movement(of: Settings, dtype: torch.dtype) -> Iterator[Finding]:
    """The same for weights of the usual size, where there is no model."""
    step = _expected_step(of)
    if step is None or dtype not in _BITS or _keeps_more(of.values):
        return
    half = float(half_ulp(torch.tensor([_TYPICAL], dtype=dtype, device="cpu")))
    if half > step * (_TYPICAL if _is_scaled(of) else 1.0):
        yield _not_moving(
            of, f"of a weight of {_TYPICAL}, an update of {step:.2g}, below half a step of {2 * half:.2g},"
        )


def _not_moving(of: Settings, begin: str) -> Finding:
    return of.finding(
        "warning", "rounding", f"{begin} is lost when it is rounded to nearest",
        "round stochastically (rounding='stochastic'), or keep more of the weights (master_weights='kahan')",
    )  # fmt: skip


def _expected_step(of: Settings) -> float | None:
    lr = of.values.get("lr")
    if of.cls is None or of.cls.UPDATE_RMS is None or lr is None or not float(lr) > 0:
        return None
    return float(lr) * of.cls.UPDATE_RMS


def _is_scaled(of: Settings) -> bool:
    """Whether the update is multiplied by the parameter's RMS."""
    return bool(of.values.get("scale_parameter"))


def _keeps_more(values: dict[str, Any]) -> bool:
    return (
        bool(values.get("master_weights") or values.get("use_kahan_summation"))
        or values.get("rounding") == "stochastic"
    )


def half_ulp(weights: Tensor) -> Tensor:
    """Half the distance to the next number, for 16-bit weights; 0 where a weight is 0.

    Args:
        weights: bfloat16 or float16.

    Returns:
        float32, of the same shape.
    """
    exact = weights.float()
    exponent = torch.frexp(exact).exponent  # of a significand in [0.5, 1)
    half = torch.ldexp(torch.ones_like(exact), exponent - _BITS[weights.dtype] - 1)
    return torch.where(exact == 0, torch.zeros_like(exact), half)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
