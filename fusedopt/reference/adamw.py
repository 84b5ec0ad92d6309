"""Adam and AdamW.

Adam: Kingma & Ba, arXiv:1412.6980. AdamW: Loshchilov & Hutter, arXiv:1711.05101.
AMSGrad: Reddi, Kale & Kumar, arXiv:1904.09237.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import power, root, rounded


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, ...]:
    """One step of Adam, or of AdamW if the weight decay is decoupled; AMSGrad if given its state.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Running maximum of the second moment, for AMSGrad.
        step: This step's number, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        decoupled_weight_decay: AdamW's decay of the parameter itself instead of Adam's L2 term.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    bias1 = 1.0 - power(beta1, step)
    bias2 = 1.0 - power(beta2, step)
    if decoupled_weight_decay:
        param = param * rounded(1.0 - lr * weight_decay, param)
    else:
        grad = grad + rounded(weight_decay, param) * param
    return moved(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        betas=((beta1, 1.0 - beta1), (beta2, 1.0 - beta2)),
        step_size=lr / bias1,
        inverse_sqrt_bias2=1.0 / math.sqrt(bias2),
        eps=eps,
    )


def moved(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    betas: tuple[tuple[float, float], tuple[float, float]],
    step_size: float,
    inverse_sqrt_bias2: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """The step once weight decay is done.

    Args:
        param: As for `adam`, like every argument not listed here.
        grad: With an L2 term, if there is one.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        max_exp_avg_sq: Running maximum of the second moment, for AMSGrad.
        betas: Of each moment, what it keeps of itself and what it takes of what is new.
        step_size: The learning rate, with the first moment's correction.
        inverse_sqrt_bias2: The second moment's.
        eps: Added to the denominator.

    Returns:
        As `adam`.
    """
    (keep1, take1), (keep2, take2) = betas
    exp_avg = rounded(keep1, param) * exp_avg + rounded(take1, param) * grad
    exp_avg_sq = rounded(keep2, param) * exp_avg_sq + (rounded(take2, param) * grad) * grad
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)

    denominator = root(second) * rounded(inverse_sqrt_bias2, param) + rounded(eps, param)
    param = param - rounded(step_size, param) * (exp_avg / denominator)

    if max_exp_avg_sq is not None:
        return param, exp_avg, exp_avg_sq, max_exp_avg_sq
    return param, exp_avg, exp_avg_sq
