"""AdEMAMix: csrc/rules/ademamix.h, which has the equation and its paper."""

import triton
import triton.language as tl

from .arithmetic import power, root
from .rule import Rule

CONFIG = ("lr", "beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")
STATES = (("exp_avg", True), ("exp_avg_slow", True), ("exp_avg_sq", False))


@triton.jit
def alpha_at(alpha, t_alpha, step):
    """Linear until t_alpha; 0 means no schedule."""
    grown = alpha * step.to(tl.float64) / tl.where(t_alpha > 0.0, t_alpha, 1.0)
    return tl.where((t_alpha > 0.0) & (grown < alpha), grown, alpha)


@triton.jit
def beta3_at(beta1, beta3, t_beta3, step):
    """Its half-life grows linearly from beta1's until t_beta3; 0 means no schedule."""
    part = tl.where(t_beta3 > 0.0, step.to(tl.float64) / tl.where(t_beta3 > 0.0, t_beta3, 1.0), 1.0)
    grows = (part < 1.0) & (beta3 > beta1)
    # Elements that are not used in the end get harmless numbers.
    part = tl.where(grows, part, 0.5)
    log1 = tl.log(tl.where(grows & (beta1 > 0.0), beta1, 0.5))
    log3 = tl.log(tl.where(grows, beta3, 0.75))
    grown = tl.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1))
    grown = tl.where(grown < beta3, grown, beta3)
    grown = tl.where(beta1 == 0.0, tl.exp(log3 / part), grown)  # the limit of the above
    return tl.where(grows, grown, beta3)


@triton.jit
def derive(config, step):
    """(lr, 1 - lr wd, b1, 1 - b1, b2, 1 - b2, b3(t), 1 - b3(t), alpha(t), 1 / (1 - b1^t), 1 / sqrt(1 - b2^t), eps)."""
    lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay = config
    slow = beta3_at(beta1, beta3, t_beta3, step)
    return (
        lr,
        1.0 - lr * weight_decay,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        slow,
        1.0 - slow,
        alpha_at(alpha, t_alpha, step),
        1.0 / (1.0 - power(beta1, step)),
        1.0 / tl.sqrt(1.0 - power(beta2, step)),
        eps,
    )


@triton.jit
def ademamix(p, g, s, hyper):
    """A fast and a slow momentum."""
    lr, decay, beta1, rest1, beta2, rest2, beta3, rest3, alpha, inverse_bias1, inverse_sqrt_bias2, eps = hyper
    exp_avg = beta1 * s[0] + rest1 * g
    exp_avg_slow = beta3 * s[1] + rest3 * g
    exp_avg_sq = beta2 * s[2] + (rest2 * g) * g
    rooted = root(exp_avg_sq)
    mixed = exp_avg * inverse_bias1 + alpha * exp_avg_slow
    p = p * decay - lr * tl.div_rn(mixed, rooted * inverse_sqrt_bias2 + eps)
    return p, (exp_avg, exp_avg_slow, exp_avg_sq), rooted


RULES = {"ademamix": Rule(ademamix, derive, CONFIG, STATES, 12, rooted=2)}
