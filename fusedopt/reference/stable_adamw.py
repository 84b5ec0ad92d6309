"""StableAdamW: Wortsman et al., arXiv:2304.13013, section 3."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adamw import moved
from .arithmetic import power, root, rounded
from .asking import Asking, Extent, all_here
from .norm import pairwise_sum, square_sums


def stable_adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, **hyper: float
) -> tuple[Tensor, ...]:
    """See `asking_stable_adamw`, of a parameter that is all here."""
    whole = Extent(param.numel())
    return all_here(asking_stable_adamw(param, grad, exp_avg, exp_avg_sq, step=step, whole=whole, **hyper))


def asking_stable_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    whole: Extent,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_lr: float,
) -> Asking[tuple[Tensor, ...]]:
    """One step of AdamW whose learning rate is divided by the RMS of the gradient over the root of its second moment.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        exp_avg: First moment, debiased.
        exp_avg_sq: Second moment, debiased.
        step: This step's number, from 1.
        whole: The size of the parameter of which this may be a shard.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator; the root counts as no smaller in the RMS.
        weight_decay: Decoupled weight decay, times lr / max_lr.
        max_lr: The learning rate at which weight_decay is meant.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    if whole.numel == 0:
        return param, exp_avg, exp_avg_sq
    betas = _debiased(beta1, step), _debiased(beta2, step)
    keep, take = betas[1]
    second = rounded(keep, param) * exp_avg_sq + rounded(take, param) * (grad * grad)
    quotient = grad / root(torch.maximum(second, torch.full_like(second, rounded(eps * eps, param))))
    yield []  # as of rules that sum over rows and columns first
    yield []
    (total,) = yield [("all", pairwise_sum(square_sums(quotient)))]
    rms = math.sqrt(total.item() / whole.numel)
    lr = lr / (1.0 if rms < 1.0 else rms)  # NaN stays NaN
    param = param * rounded(1.0 - lr / max_lr * weight_decay, param)
    return moved(param, grad, exp_avg, exp_avg_sq, betas=betas, step_size=lr, inverse_sqrt_bias2=1.0, eps=eps)


def _debiased(beta: float, step: int) -> tuple[float, float]:
    """What a moment keeps and takes, so that it is an average of as many gradients as there have been."""
    faded = power(beta, step)
    return (beta - faded) / (1.0 - faded), (1.0 - beta) / (1.0 - faded)
