"""Gradients as trainers leave them: parts of one bucket, or nothing but zeros. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def in_a_bucket(grads: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers as views of one tensor, each at an odd offset, so that none is aligned to more than an element.

    Args:
        grads: Of one dtype and device.

    Returns:
        The views, in the same order.
    """
    places, end = [], 1
    for grad in grads:
        places.append(end)
        end += grad.numel() + grad.numel() % 2
    bucket = torch.zeros(end, dtype=grads[0].dtype, device=grads[0].device)
    views = [bucket[at : at + grad.numel()].view(grad.shape) for at, grad in zip(places, grads)]
    for view, grad in zip(views, grads):
        view.copy_(grad)
    return views
