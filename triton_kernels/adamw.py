"""Adam and AdamW: csrc/rules/adamw.h, which has the equation and its papers."""

import triton
import triton.language as tl

from .arithmetic import maximum, power, root
from .rule import Rule

CONFIG = ("lr", "beta1", "beta2", "eps", "weight_decay")
STATES = (("exp_avg", True), ("exp_avg_sq", False))
STATES_AMSGRAD = (*STATES, ("max_exp_avg_sq", False))


@triton.jit
def derive(config, step):
    """(wd, 1 - lr wd, b1, 1 - b1, b2, 1 - b2, lr / (1 - b1^t), 1 / sqrt(1 - b2^t), eps)."""
    lr, beta1, beta2, eps, weight_decay = config
    bias1 = 1.0 - power(beta1, step)
    bias2 = 1.0 - power(beta2, step)
    return (
        weight_decay,
        1.0 - lr * weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / bias1,
        1.0 / tl.sqrt(bias2),
        eps,
    )


@triton.jit
def _adam(p, g, s, hyper, L2: tl.constexpr, AMSGRAD: tl.constexpr):
    weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_sqrt_bias2, eps = hyper
    if L2:
        g = g + weight_decay * p
    else:
        p = p * decay
    exp_avg = beta1 * s[0] + one_minus_beta1 * g
    exp_avg_sq = beta2 * s[1] + (one_minus_beta2 * g) * g
    if AMSGRAD:
        second = maximum(s[2], exp_avg_sq)
        rooted = root(second)
        states = (exp_avg, exp_avg_sq, second)
    else:
        rooted = root(exp_avg_sq)
        states = (exp_avg, exp_avg_sq)
    p = p - step_size * tl.div_rn(exp_avg, rooted * inverse_sqrt_bias2 + eps)
    return p, states, rooted


@triton.jit
def adamw(p, g, s, hyper):
    """Decoupled weight decay."""
    return _adam(p, g, s, hyper, L2=False, AMSGRAD=False)


@triton.jit
def adamw_amsgrad(p, g, s, hyper):
    """The same, with the largest second moment so far."""
    return _adam(p, g, s, hyper, L2=False, AMSGRAD=True)


@triton.jit
def adam(p, g, s, hyper):
    """An L2 penalty."""
    return _adam(p, g, s, hyper, L2=True, AMSGRAD=False)


@triton.jit
def adam_amsgrad(p, g, s, hyper):
    """The same, with the largest second moment so far."""
    return _adam(p, g, s, hyper, L2=True, AMSGRAD=True)


RULES = {
    "adamw": Rule(adamw, derive, CONFIG, STATES, 9, rooted=1),
    "adamw_amsgrad": Rule(adamw_amsgrad, derive, CONFIG, STATES_AMSGRAD, 9),
    "adam": Rule(adam, derive, CONFIG, STATES, 9, rooted=1),
    "adam_amsgrad": Rule(adam_amsgrad, derive, CONFIG, STATES_AMSGRAD, 9),
}
