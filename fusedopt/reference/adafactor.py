"""Adafactor: Shazeer & Stern, arXiv:1804.04235; in the version of transformers or that of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arithmetic import root, rounded
from .asking import Asking, Extent, all_here
from .factored import column_sums, row_sums, unit_sums, weighted_column_sums
from .norm import chunk_sums, pairwise_sum, square_sums


@dataclass(frozen=True)
class Knobs:
    """Hyperparameters, switches as 0 or 1.

    Attributes:
        lr: Learning rate; ignored with relative_step, unless is_torch.
        eps1: Regularizes the second moment; below 0, it is the machine epsilon of the parameter's dtype.
        eps2: The smallest RMS that is assumed for a parameter.
        clip_threshold: The largest RMS of an update.
        decay_rate: The exponent of the step, which gives the weight of a gradient in the second moment.
        beta1: Decay of the first moment.
        weight_decay: Decoupled weight decay.
        scale_parameter: Multiply the learning rate by the RMS of the parameter.
        relative_step: Take the learning rate from the step's number.
        warmup_init: Begin that with a warmup.
        compat: Keep the first moment of updates that are multiplied by their learning rates already.
        is_torch: Torch's equation.
    """

    lr: float
    eps1: float
    eps2: float
    clip_threshold: float
    decay_rate: float
    beta1: float
    weight_decay: float
    scale_parameter: float
    relative_step: float
    warmup_init: float
    compat: float
    is_torch: float


def relative_lr(knobs: Knobs, step: int) -> float:
    """The learning rate of a step before it is multiplied by the RMS of a parameter."""
    if knobs.is_torch:
        return min(knobs.lr, 1.0 / math.sqrt(step))
    if knobs.relative_step:
        return min(1e-6 * step if knobs.warmup_init else 1e-2, 1.0 / math.sqrt(step))
    return knobs.lr


def actual_lr(knobs: Knobs, step: int, param: Tensor) -> float:
    """The learning rate of a step, in double.

    Args:
        knobs: Hyperparameters.
        step: The step's number, from 1.
        param: The weights before the step, in full precision: (batch, rows, columns) if factored, else 1-D.

    Returns:
        What the update is multiplied by.
    """
    return _lr_from(knobs, step, _weight_sums(knobs, param), Extent(param.numel()))


def _weight_sums(knobs: Knobs, param: Tensor) -> list[Tensor]:
    """The sum of the squares of the weights here, if it is needed."""
    if not knobs.scale_parameter:
        return []
    squares = param.double() * param.double()
    return [pairwise_sum(unit_sums(squares) if param.dim() > 1 else chunk_sums(squares))]


def _lr_from(knobs: Knobs, step: int, weight_sums: Sequence[Tensor], whole: Extent) -> float:
    """The learning rate, from what that came to."""
    return scaled_lr(knobs, step, _rms(weight_sums[0], whole)) if weight_sums else relative_lr(knobs, step)


def scaled_lr(knobs: Knobs, step: int, rms: float) -> float:
    """The same, if the RMS of the weights before the step is known."""
    return _at_least(rms, knobs.eps2) * relative_lr(knobs, step)


def _rms(square_sum: Tensor, whole: Extent) -> float:
    return math.sqrt(square_sum.item() / whole.numel)


def _at_least(value: float, least: float) -> float:
    return least if value < least else value  # NaN stays NaN


def _averages(mean: Tensor, average: Tensor, step: int, knobs: Knobs) -> Tensor:
    part = float(step) ** knobs.decay_rate
    return rounded(1.0 - part, mean) * average + rounded(part, mean) * mean


def _torchs_eps(knobs: Knobs, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if knobs.eps1 < 0 else knobs.eps1


def _moved(average: Tensor, sums: Tensor, count: int, step: int, knobs: Knobs) -> Tensor:
    """The new averages of rows or columns, from the sums of so many squares each."""
    mean = sums / count
    return _averages((mean if knobs.is_torch else mean + knobs.eps1).to(average.dtype), average, step, knobs)


def _matrix_update(
    param: Tensor, grad: Tensor, row: Tensor, col: Tensor, step: int, dtype: torch.dtype, knobs: Knobs, whole: Extent
) -> Asking[tuple[Tensor, Tensor, float, Tensor, Tensor]]:
    """The update of (batch, rows, columns), the sum of its squares, its learning rate, and the new moments."""
    squares = grad.double() * grad.double()
    (sums,) = yield [("columns", row_sums(squares))]
    row = _moved(row, sums, whole.columns, step, knobs)
    weight_sums = _weight_sums(knobs, param)
    sums, total, *weight_sums = yield [
        ("rows", column_sums(squares)),
        ("rows", row_sums(row.double())),
        *(("all", sums) for sums in weight_sums),
    ]
    col = _moved(col, sums, whole.rows, step, knobs)
    mean = (total / whole.rows).to(grad.dtype).unsqueeze(-1)
    if knobs.is_torch:
        eps = _torchs_eps(knobs, dtype)
        mean = torch.maximum(mean, torch.full_like(mean, eps))
        estimate = (row / mean).unsqueeze(-1) * col.unsqueeze(-2)
        update = grad / root(torch.maximum(estimate, torch.full_like(estimate, eps * eps)))
        sums = unit_sums(update.double() * update.double())
    else:
        row_factor, col_factor = 1.0 / root(row / mean), 1.0 / root(col)
        update = (row_factor.unsqueeze(-1) * col_factor.unsqueeze(-2)) * grad
        # mean R / (R C) g g, added up without reading g again: a row is weighed as soon as its average is known.
        weighted = weighted_column_sums(grad, 1.0 / root(row))
        sums = pairwise_sum(weighted / col.double()) * mean.double().squeeze(-1)
    (total,) = yield [("all", pairwise_sum(sums))]
    return update, total, _lr_from(knobs, step, weight_sums, whole), row, col


def _vector_update(
    param: Tensor, grad: Tensor, average: Tensor, step: int, dtype: torch.dtype, knobs: Knobs, whole: Extent
) -> Asking[tuple[Tensor, Tensor, float, Tensor]]:
    """The update, the sum of its squares, its learning rate, and the new second moment."""
    if knobs.is_torch:
        average = _averages(grad * grad, average, step, knobs)
        eps = _torchs_eps(knobs, dtype)
        update = grad / root(torch.maximum(average, torch.full_like(average, eps * eps)))
    else:
        average = _averages(grad * grad + rounded(knobs.eps1, grad), average, step, knobs)
        update = grad / root(average)
    yield []  # as a matrix, which has sums of rows first
    weight_sums = yield [("all", sums) for sums in _weight_sums(knobs, param.reshape(-1))]
    (total,) = yield [("all", pairwise_sum(square_sums(update)))]
    return update, total, _lr_from(knobs, step, weight_sums, whole), average


def _decayed(param: Tensor, lr: float, knobs: Knobs) -> Tensor:
    """The parameter after weight decay, in either version.

    torch rounds 1 - lr * weight_decay, which errs by up to 3e-8 in the same direction in every step; transformers'
    subtraction errs at random. Without weight decay, a subtraction would turn parameters that are -0 into 0.
    """
    if knobs.is_torch:
        return param * rounded(1.0 - knobs.weight_decay * knobs.lr, param)
    part = rounded(knobs.weight_decay * lr, param)
    return param if part == 0.0 else param - part * param


def _applied(
    param: Tensor, update: Tensor, total: Tensor, lr: float, exp_avg: Tensor | None, knobs: Knobs, whole: Extent
) -> tuple[Tensor, ...]:
    """The new parameter and, if it was given, the new first moment."""
    denominator = _at_least(_rms(total, whole) / knobs.clip_threshold, 1.0)
    param = _decayed(param, lr, knobs)
    if exp_avg is None:
        return (param - rounded(lr / denominator, param) * update,)
    scale = rounded((lr if knobs.compat else 1.0) / denominator, param)
    rest = rounded(1.0 - knobs.beta1, param)
    exp_avg = rounded(knobs.beta1, param) * exp_avg + rest * (scale * update)
    return param - (exp_avg if knobs.compat else rounded(lr, param) * exp_avg), exp_avg


def adafactor_matrix(
    param: Tensor, grad: Tensor, *states: Tensor, step: int, dtype: torch.dtype, **hyper: float
) -> tuple[Tensor, ...]:
    """See `asking_matrix`, of a parameter that is all here."""
    whole = Extent(param.numel(), states[-2].shape[-1], states[-1].shape[-1])
    return all_here(asking_matrix(param, grad, *states, step=step, dtype=dtype, whole=whole, **hyper))


def asking_matrix(
    param: Tensor, grad: Tensor, *states: Tensor, step: int, dtype: torch.dtype, whole: Extent, **hyper: float
) -> Asking[tuple[Tensor, ...]]:
    """One step of Adafactor for a parameter of at least two dimensions.

    Args:
        param: Parameter.
        grad: Gradient of the loss to minimize, of its shape and dtype.
        *states: The first moment, of the parameter's shape, if there is one; then the averages of the squared
            gradient over rows, (..., rows), and over columns, (..., columns). A parameter of more dimensions is
            one matrix for each index of the leading ones.
        step: This step's number, from 1.
        dtype: Of the parameter as it is stored.
        whole: The size of the parameter of which this may be a shard.
        **hyper: See Knobs.

    Returns:
        The new parameter, followed by the new states in the order they were given.
    """
    if whole.numel == 0:
        return param, *states
    knobs = Knobs(**hyper)
    *first, row, col = states
    rows, cols = row.shape[-1], col.shape[-1]
    count = row.numel() // rows if rows else col.numel() // max(1, cols)  # a shard may have no rows, or no columns
    matrices = (count, rows, cols)
    shaped, factors = param.reshape(matrices), (row.reshape(count, rows), col.reshape(count, cols))
    update, total, lr, new_row, new_col = yield from _matrix_update(
        shaped, grad.reshape(matrices), *factors, step, dtype, knobs, whole
    )
    applied = _applied(shaped, update, total, lr, first[0].reshape(matrices) if first else None, knobs, whole)
    return *(x.reshape(param.shape) for x in applied), new_row.reshape(row.shape), new_col.reshape(col.shape)


def adafactor_vector(
    param: Tensor, grad: Tensor, *states: Tensor, step: int, dtype: torch.dtype, **hyper: float
) -> tuple[Tensor, ...]:
    """See `asking_vector`, of a parameter that is all here."""
    whole = Extent(param.numel())
    return all_here(asking_vector(param, grad, *states, step=step, dtype=dtype, whole=whole, **hyper))


def asking_vector(
    param: Tensor, grad: Tensor, *states: Tensor, step: int, dtype: torch.dtype, whole: Extent, **hyper: float
) -> Asking[tuple[Tensor, ...]]:
    """The same for a parameter with fewer dimensions, whose last state is the second moment, of the same shape."""
    if whole.numel == 0:
        return param, *states
    knobs = Knobs(**hyper)
    *first, average = states
    update, total, lr, average = yield from _vector_update(param, grad, average, step, dtype, knobs, whole)
    applied = _applied(
        param.reshape(-1), update.reshape(-1), total, lr, first[0].reshape(-1) if first else None, knobs, whole
    )
    return *(x.reshape(param.shape) for x in applied), average
