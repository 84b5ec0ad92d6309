"""Frameworks import torchvision where it is installed."""

from __future__ import annotations

import importlib

import torch

# On PyPI it is built for CUDA: beside a torch for the CPU it does not load, as its operators are missing. Frameworks
# use none of them here, so they are declared.
try:
    importlib.import_module("torchvision")
except ModuleNotFoundError:
    pass
except RuntimeError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
