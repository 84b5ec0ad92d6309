"""Adagrad: Duchi, Hazan & Singer, JMLR 12 (2011)."""

from __future__ import annotations

from torch import Tensor

from .arithmetic import decayed, root, rounded


def adagrad(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,  # torch's name
    *,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    """One step of Adagrad.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        sum: Sum of squared gradients.
        step: This step's number, from 1.
        lr: Learning rate.
        lr_decay: Decay of the learning rate.
        eps: Added to the denominator.
        weight_decay: L2 penalty.

    Returns:
        The new parameter and the new sum.
    """
    grad = decayed(param, grad, weight_decay)
    sum = sum + grad * grad
    step_size = rounded(lr / (1.0 + (step - 1) * lr_decay), param)
    return param - step_size * (grad / (root(sum) + rounded(eps, param))), sum
