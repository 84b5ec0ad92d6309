"""AdEMAMix: Pagliardini, Ablin & Grangier, arXiv:2409.03137."""

from __future__ import annotations

import math

from torch import Tensor

from .arithmetic import power, root, rounded


def alpha_at(step: int, alpha: float, t_alpha: float) -> float:
    """The weight of the slow momentum: linear until t_alpha, which is 0 for no schedule."""
    return min(alpha, alpha * step / t_alpha) if t_alpha > 0 else alpha


def beta3_at(step: int, beta1: float, beta3: float, t_beta3: float) -> float:
    """The decay of the slow momentum: its half-life grows linearly from beta1's until t_beta3, 0 for no schedule."""
    part = step / t_beta3 if t_beta3 > 0 else 1.0
    if part >= 1.0 or beta3 <= beta1:
        return beta3
    log3 = math.log(beta3)
    if beta1 == 0.0:
        return math.exp(log3 / part)  # the limit of what follows
    log1 = math.log(beta1)
    return min(beta3, math.exp(log1 * log3 / ((1.0 - part) * log3 + part * log1)))


def ademamix(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    t_alpha: float,
    t_beta3: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    """One step of AdEMAMix.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        exp_avg: Fast momentum.
        exp_avg_slow: Slow momentum, not bias-corrected.
        exp_avg_sq: Second moment.
        step: This step's number, from 1.
        lr: Learning rate.
        beta1: Decay of the fast momentum.
        beta2: Decay of the second moment.
        beta3: Decay of the slow momentum, once its schedule has ended.
        alpha: Weight of the slow momentum, once its schedule has ended.
        t_alpha: Steps of alpha's schedule, 0 for none.
        t_beta3: Steps of beta3's schedule, 0 for none.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    beta3 = beta3_at(step, beta1, beta3, t_beta3)
    inverse_bias1 = rounded(1.0 / (1.0 - power(beta1, step)), param)
    inverse_sqrt_bias2 = rounded(1.0 / math.sqrt(1.0 - power(beta2, step)), param)

    exp_avg = rounded(beta1, param) * exp_avg + rounded(1.0 - beta1, param) * grad
    exp_avg_slow = rounded(beta3, param) * exp_avg_slow + rounded(1.0 - beta3, param) * grad
    exp_avg_sq = rounded(beta2, param) * exp_avg_sq + (rounded(1.0 - beta2, param) * grad) * grad

    mixed = exp_avg * inverse_bias1 + rounded(alpha_at(step, alpha, t_alpha), param) * exp_avg_slow
    update = mixed / (root(exp_avg_sq) * inverse_sqrt_bias2 + rounded(eps, param))
    param = param * rounded(1.0 - lr * weight_decay, param) - rounded(lr, param) * update
    return param, exp_avg, exp_avg_slow, exp_avg_sq
