"""Schedule-free SGD and Adam: csrc/rules/schedule_free.h, which has the equation and its papers."""

import triton
import triton.language as tl

from .arithmetic import decayed, power, root
from .rule import Rule

CONFIG = ("lr", "beta1", "beta2", "eps", "weight_decay", "average", "adaptive")
STATES = (("z", True), ("exp_avg_sq", False))


@triton.jit
def derive(config, step):
    """(1 in the first step, lr, lr (b1 (1 - c) - 1), c, wd, b2, 1 - b2, 1 / sqrt(1 - b2^t), eps, adaptive)."""
    lr, beta1, beta2, eps, weight_decay, average, adaptive = config
    return (
        tl.where(step == 1, 1.0, 0.0).to(tl.float64),
        lr,
        lr * (beta1 * (1.0 - average) - 1.0),
        average,
        weight_decay,
        beta2,
        1.0 - beta2,
        1.0 / tl.sqrt(1.0 - power(beta2, step)),
        eps,
        adaptive,
    )


@triton.jit
def _moved(p, g, z, hyper):
    """The parameter and z, after a step along the normalized gradient."""
    _, lr, step_size, average, weight_decay, _, _, _, _, _ = hyper
    g = decayed(g, p, weight_decay)
    return (p + average * (z - p)) + step_size * g, z - lr * g


@triton.jit
def schedule_free_sgd(p, g, s, hyper):
    """The gradient as it is."""
    first, _, _, _, _, _, _, _, _, _ = hyper
    z = tl.where(first != 0.0, p, s[0])
    p, z = _moved(p, g, z, hyper)
    return p, (z,), g


@triton.jit
def schedule_free_adam(p, g, s, hyper):
    """The gradient over the root of its second moment, unless that is too young for RAdam."""
    first, _, _, _, _, beta2, rest2, inverse_sqrt_bias2, eps, adaptive = hyper
    z = tl.where(first != 0.0, p, s[0])
    exp_avg_sq = beta2 * s[1] + (rest2 * g) * g
    rooted = root(exp_avg_sq)
    g = tl.where(adaptive != 0.0, tl.div_rn(g, rooted * inverse_sqrt_bias2 + eps), g)
    p, z = _moved(p, g, z, hyper)
    return p, (z, exp_avg_sq), rooted


RULES = {
    "schedule_free_sgd": Rule(schedule_free_sgd, derive, CONFIG, STATES[:1], 10),
    "schedule_free_adam": Rule(schedule_free_adam, derive, CONFIG, STATES, 10, rooted=1),
}
