"""Tensors as the memory that they are in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..storage.allocation import is_plain


def base(tensor: Tensor) -> Tensor:
    """The same numbers as a Tensor, apart from autograd's graph."""
    tensor = tensor.detach()
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def is_plain_memory(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are what its memory holds, aligned to their size."""
    return not tensor.is_neg() and not tensor.is_conj() and tensor.data_ptr() % tensor.element_size() == 0


def shares_elements(tensor: Tensor) -> bool:
    """Whether several elements of a tensor are the same place in memory, as expand() makes them."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))


def has_no_memory(tensor: Tensor) -> bool:
    """Whether the memory of a tensor's elements has been freed."""
    if not is_plain(tensor) or tensor.layout != torch.strided or tensor._is_zerotensor():
        return False
    return tensor.numel() > 0 and tensor.data_ptr() == 0


def dense(grad: Tensor) -> Tensor:
    """A gradient with a number for every element.

    A sparse one may have several, which are added; autograd's tensors of zeros have none in their memory.
    """
    if grad.layout == torch.sparse_coo:
        return grad.to_dense()
    return grad.clone() if grad._is_zerotensor() else grad


def nothing() -> Tensor:
    """No sums."""
    return torch.zeros(0, dtype=torch.float64, device="cpu")
