"""Gradient release: the function that users call, and what it asks of its arguments."""

from __future__ import annotations

from typing import Any

from .. import checks
from .clipping import check_clip
from .handle import Release
from .passes import check_reducers

CLIPS = ("previous", "parameter", "exact")
BUCKET_NUMEL = 2**20  # elements: enough for what a call costs not to show


def release_gradients(
    optimizer: Any, *, bucket_numel: int = BUCKET_NUMEL, clip: str | None = None, loss_scale: float = 1.0
) -> Release:
    """Steps each parameter as soon as its gradient is ready, and frees the gradient.

    A model then has the gradients of a bucket at a time. Weights and states get the bits of the usual step, with
    every optimizer and format. Go on calling `optimizer.step()` after each backward pass: it steps what is left, and
    schedulers, hooks and reports go by it. `torch.nn.utils.clip_grad_norm_` finds no gradients; clip with the
    optimizer's max_grad_norm:

    - "exact": as the usual step. Call `handle.backward(loss)` instead of `loss.backward()`: it measures all gradients
      in a first backward pass and steps in a second.
    - "previous": by the norm of the step before, times how much that of the gradients that are there has changed since.
      It costs no backward pass, and each bucket waits for its sums. Where gradients grow that come last, those that
      came first are clipped less than they would be. The first step, which has no norm before it, clips each parameter
      to its share of max_grad_norm, the root of its share of all elements, so that the whole does not exceed it.
    - "parameter": each parameter's gradient by itself, to max_grad_norm.

    `last_grad_norm` is the norm of all gradients in each case. Norms of DTensors go over all their shards, as in a
    usual step: the processes of a mesh meet once for all gradients with "exact", and for each bucket otherwise.

    Args:
        optimizer: An optimizer of this package.
        bucket_numel: Gradients wait until together they have this many elements; 1 steps each parameter by itself.
        clip: "exact", "previous" or "parameter", for an optimizer with max_grad_norm; None for one without.
        loss_scale: A constant that the loss is multiplied by before the backward pass, for float16; gradients are
            divided by it in float32.

    Returns:
        A handle with `accumulate()`, `backward(loss)` and `remove()`, which is a context manager, too. The optimizer
        keeps it (`release_handle`), so you need not; when nobody uses the optimizer any more, gradients stay again.

    Raises:
        TypeError: It is another optimizer.
        ValueError: An argument is out of range, the optimizer or another one of the same parameters releases gradients
            already, it clips and `clip` does not say how, or its gradients are reduced by DistributedDataParallel.
    """
    if not hasattr(type(optimizer), "_release"):
        raise TypeError(f"optimizer={optimizer!r} is a {type(optimizer).__name__}; pass an optimizer of fusedopt")
    if optimizer._release is not None:
        raise ValueError("this optimizer releases gradients already; call remove() of its handle first")
    bucket_numel = checks.whole("bucket_numel", bucket_numel)
    if bucket_numel < 1:
        raise ValueError(f"bucket_numel={bucket_numel!r} holds no gradient; pass a whole number >= 1")
    loss_scale = checks.nonnegative("loss_scale", loss_scale)
    if not loss_scale > 0:
        raise ValueError("loss_scale=0 would make every gradient zero; pass a number > 0")
    if clip is not None:
        checks.one_of("clip", clip, CLIPS)
    check_clip(optimizer, clip)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    check_reducers(params)
    optimizer._release = Release(optimizer, bucket_numel, clip, loss_scale)
    return optimizer._release
