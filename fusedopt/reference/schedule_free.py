"""Schedule-free SGD and Adam: Defazio et al., "The Road Less Scheduled", arXiv:2405.15682."""

from __future__ import annotations

import math

from torch import Tensor

from .arithmetic import decayed, power, root, rounded


def schedule_free(
    param: Tensor,
    grad: Tensor,
    z: Tensor,
    exp_avg_sq: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    average: float,
    adaptive: float,
) -> tuple[Tensor, ...]:
    """One step of schedule-free SGD, or of Adam if given its second moment.

    Args:
        param: Where gradients are taken, y in the paper, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        z: What takes the steps; in the first one the parameter, whatever is here.
        exp_avg_sq: Second moment, for Adam.
        step: This step's number, from 1.
        lr: Learning rate of this step, warmup included.
        beta1: How much of y is x, the average of z; the rest is z.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: L2 penalty, taken at y and added to the normalized gradient.
        average: The weight of this step's z in x.
        adaptive: 0 for a step along the gradient itself, while RAdam's second moment is too young.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    if step == 1:
        z = param
    states: tuple[Tensor, ...] = ()
    if exp_avg_sq is not None:
        inverse_sqrt_bias2 = rounded(1.0 / math.sqrt(1.0 - power(beta2, step)), param)
        exp_avg_sq = rounded(beta2, param) * exp_avg_sq + (rounded(1.0 - beta2, param) * grad) * grad
        states = (exp_avg_sq,)
        if adaptive != 0.0:
            grad = grad / (root(exp_avg_sq) * inverse_sqrt_bias2 + rounded(eps, param))
    grad = decayed(param, grad, weight_decay)
    step_size = rounded(lr * (beta1 * (1.0 - average) - 1.0), param)
    param = (param + rounded(average, param) * (z - param)) + step_size * grad
    return param, z - rounded(lr, param) * grad, *states
