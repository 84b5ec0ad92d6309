"""Adafactor: csrc/rules/adafactor.h, which has the equation and its paper."""

from typing import Any

import triton
import triton.language as tl

from .normalize import by_factors, by_second_moment
from .rule import Normalizing, Rule

CONFIG = (
    "lr",
    "eps1",
    "eps2",
    "clip_threshold",
    "decay_rate",
    "beta1",
    "weight_decay",
    "scale_parameter",
    "relative_step",
    "warmup_init",
    "compat",
    "is_torch",
)
EPS = CONFIG.index("eps1")
VECTOR = (("exp_avg_sq", False),)
MOMENTUM = (("exp_avg", True),)


@triton.jit
def moments(config, step, machine_eps):
    """See normalize.py."""
    eps1, decay_rate, scale_parameter, is_torch = config[1], config[4], config[7], config[11]
    take = tl.exp(decay_rate * tl.log(step.to(tl.float64)))
    eps = tl.where(eps1 < 0.0, machine_eps, eps1)
    return 1.0 - take, take, eps, eps * eps, is_torch, scale_parameter


@triton.jit
def _at_least(least, value):
    return tl.where(value < least, least, value)  # NaN stays NaN


@triton.jit
def _rms(square_sum, numel):
    return tl.sqrt(square_sum / numel.to(tl.float64))


@triton.jit
def _relative_lr(config, step):
    lr, relative_step, warmup_init, is_torch = config[0], config[8], config[9], config[11]
    shrinking = 1.0 / tl.sqrt(step.to(tl.float64))
    limit = tl.where(warmup_init != 0.0, 1e-6 * step.to(tl.float64), 1e-2)
    limit = tl.where(is_torch != 0.0, lr, limit)
    chosen = tl.where(shrinking < limit, shrinking, limit)
    return tl.where((is_torch != 0.0) | (relative_step != 0.0), chosen, lr)


@triton.jit
def _derive(config, step, sums, MOMENTUM: tl.constexpr):
    """(decay and lost: p becomes p decay, then p - lost p; a/d or 1/d; the multiplier of m; b1, 1 - b1)."""
    param_sum, update_sum, numel = sums
    eps2, clip_threshold, beta1, weight_decay = config[2], config[3], config[5], config[6]
    scale_parameter, compat, is_torch = config[7], config[10], config[11]
    lr = _relative_lr(config, step)
    lr = tl.where(scale_parameter != 0.0, _at_least(eps2, _rms(param_sum, numel)) * lr, lr)
    denominator = _at_least(1.0, _rms(update_sum, numel) / clip_threshold)
    decay = tl.where(is_torch != 0.0, 1.0 - weight_decay * config[0], 1.0)
    lost = tl.where(is_torch != 0.0, 0.0, weight_decay * lr)
    if MOMENTUM:
        scale = tl.where(compat != 0.0, lr, 1.0) / denominator
        lr = tl.where(compat != 0.0, 1.0, lr)
    else:
        scale = lr / denominator
    return decay, lost, scale, lr, beta1, 1.0 - beta1


@triton.jit
def derive(config, step, sums):
    """Without a first moment."""
    return _derive(config, step, sums, MOMENTUM=False)


@triton.jit
def derive_momentum(config, step, sums):
    """With a first moment."""
    return _derive(config, step, sums, MOMENTUM=True)


@triton.jit
def of_matrix(row, derived, g, s, hyper, place, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """What takes the gradient's place in a matrix."""
    return by_factors(row, derived, g, hyper, place, COUNT, WHOLE)


@triton.jit
def of_vector(row, derived, g, s, hyper, place, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """The same, where each element has a second moment."""
    return by_second_moment(g, s[0], hyper)


@triton.jit
def of_vector_momentum(row, derived, g, s, hyper, place, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """The same, where the second moment comes after a first."""
    return by_second_moment(g, s[1], hyper)


@triton.jit
def _updated(p, direction, hyper):
    p = p * hyper[6]
    lost = hyper[7]
    return tl.where(lost != 0.0, p - lost * p, p) - direction


@triton.jit
def _averaged(u, exp_avg, hyper):
    return hyper[10] * exp_avg + hyper[11] * (hyper[8] * u)


@triton.jit
def matrix(p, u, s, hyper):
    """With a factored second moment."""
    return _updated(p, hyper[8] * u, hyper), (), u


@triton.jit
def matrix_momentum(p, u, s, hyper):
    """With a first moment."""
    exp_avg = _averaged(u, s[0], hyper)
    return _updated(p, hyper[9] * exp_avg, hyper), (exp_avg,), u


@triton.jit
def vector(p, u, s, hyper):
    """With a second moment for each element, which is up to date already."""
    return _updated(p, hyper[8] * u, hyper), s, u


@triton.jit
def vector_momentum(p, u, s, hyper):
    """With a first moment."""
    exp_avg = _averaged(u, s[0], hyper)
    return _updated(p, hyper[9] * exp_avg, hyper), (exp_avg, s[1]), u


def _rule(update: Any, derive: Any, quotient: Any, states: tuple[tuple[str, bool], ...], second: int) -> Rule:
    return Rule(update, derive, CONFIG, states, 12, normalizing=Normalizing(moments, quotient, EPS, second))


RULES = {
    "adafactor_matrix": _rule(matrix, derive, of_matrix, (), -1),
    "adafactor_momentum_matrix": _rule(matrix_momentum, derive_momentum, of_matrix, MOMENTUM, -1),
    "adafactor_vector": _rule(vector, derive, of_vector, VECTOR, 0),
    "adafactor_momentum_vector": _rule(vector_momentum, derive_momentum, of_vector_momentum, MOMENTUM + VECTOR, 1),
}
