"""RMSprop: Tieleman & Hinton, 2012; centered: Graves, arXiv:1308.0850."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import decayed, root, rounded


def _moments(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    *,
    alpha: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient over its scale, and the new moments."""
    grad = decayed(param, grad, weight_decay)
    decay, rest = rounded(alpha, param), rounded(1.0 - alpha, param)
    square_avg = decay * square_avg + (rest * grad) * grad
    second = square_avg
    if grad_avg is not None:
        grad_avg = decay * grad_avg + rest * grad
        second = square_avg - grad_avg * grad_avg
        second = torch.where(second < 0, 0.0, second)  # rounding can push a variance below 0
    return grad / (root(second) + rounded(eps, param)), square_avg, grad_avg


def rmsprop(
    param: Tensor, grad: Tensor, square_avg: Tensor, *, step: int, lr: float, momentum: float, **moments: Any
) -> tuple[Tensor, ...]:
    """One step of RMSprop.

    Args:
        param: Parameter, of any shape; all other tensors have its shape and dtype.
        grad: Gradient of the loss to minimize.
        square_avg: Second moment.
        step: This step's number, from 1; unused.
        lr: Learning rate.
        momentum: 0 here.
        **moments: alpha, the decay of the moments; eps, added to the denominator; weight_decay.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    direction, square_avg, _ = _moments(param, grad, square_avg, None, **moments)
    return param - rounded(lr, param) * direction, square_avg


def rmsprop_centered(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor,
    *,
    step: int,
    lr: float,
    momentum: float,
    **moments: Any,
) -> tuple[Tensor, ...]:
    """The same with a first moment, `grad_avg`, that centers the second."""
    direction, square_avg, centre = _moments(param, grad, square_avg, grad_avg, **moments)
    assert centre is not None
    return param - rounded(lr, param) * direction, square_avg, centre


def rmsprop_momentum(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    square_avg: Tensor,
    *,
    step: int,
    lr: float,
    momentum: float,
    **moments: Any,
) -> tuple[Tensor, ...]:
    """The same as `rmsprop` with momentum."""
    direction, square_avg, _ = _moments(param, grad, square_avg, None, **moments)
    buffer = rounded(momentum, param) * momentum_buffer + direction
    return param - rounded(lr, param) * buffer, buffer, square_avg


def rmsprop_centered_momentum(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor,
    *,
    step: int,
    lr: float,
    momentum: float,
    **moments: Any,
) -> tuple[Tensor, ...]:
    """The same as `rmsprop_centered` with momentum."""
    direction, square_avg, centre = _moments(param, grad, square_avg, grad_avg, **moments)
    assert centre is not None
    buffer = rounded(momentum, param) * momentum_buffer + direction
    return param - rounded(lr, param) * buffer, buffer, square_avg, centre
