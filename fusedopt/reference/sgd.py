"""Stochastic gradient descent: Polyak, 1964; Sutskever et al., ICML 2013."""

from __future__ import annotations

from torch import Tensor

from .arithmetic import decayed, rounded


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: int,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
) -> tuple[Tensor, ...]:
    """One step of SGD; with momentum if given its state.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        momentum_buffer: Momentum, zeros before the first step.
        step: This step's number, from 1, since the momentum began.
        lr: Learning rate.
        momentum: Decay of the momentum.
        dampening: Dampening of the gradient in the momentum, from the second step on.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum.

    Returns:
        The new parameter and, if it was given, the new momentum.
    """
    grad = decayed(param, grad, weight_decay)
    step_size = rounded(lr, param)
    if momentum_buffer is None:
        return (param - step_size * grad,)
    part = 1.0 if step == 1 else rounded(1.0 - dampening, param)
    buffer = rounded(momentum, param) * momentum_buffer + part * grad
    direction = grad + rounded(momentum, param) * buffer if nesterov else buffer
    return param - step_size * direction, buffer
