"""Lion: Chen et al., arXiv:2302.06675."""

from __future__ import annotations

from torch import Tensor

from .arithmetic import rounded, sign


def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    """One step of Lion.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        exp_avg: Momentum.
        step: This step's number, from 1; unused.
        lr: Learning rate.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled weight decay.

    Returns:
        The new parameter and the new momentum.
    """
    direction = sign(rounded(beta1, param) * exp_avg + rounded(1.0 - beta1, param) * grad)
    exp_avg = rounded(beta2, param) * exp_avg + rounded(1.0 - beta2, param) * grad
    return param * rounded(1.0 - lr * weight_decay, param) - rounded(lr, param) * direction, exp_avg
