"""FSDP2's CPUOffloadPolicy: parameters, gradients and states are shards on the CPU, which are stepped there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded.models import EIGHT_BIT, assert_same_whole, loss_of, params_of, shard, tokens, transformer
from sharded.ranks import Ranks
from torch.distributed.fsdp import CPUOffloadPolicy

import fusedopt

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {"max_grad_norm": 0.5}),
    "8bit-split24": (torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24"}),
}


def _trains_as_one(rank: int, world: int, format_name: str, options: dict[str, Any], releases: bool) -> None:
    dtype, kwargs = FORMATS[format_name]
    kwargs = {"lr": 1e-2, **kwargs}
    model, twin = transformer(dtype=dtype), transformer(dtype=dtype)
    shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    ours = fusedopt.AdamW(model.parameters(), **kwargs, **options)
    theirs = fusedopt.AdamW(twin.parameters(), **kwargs)
    assert all(param.device.type == "cpu" for param in params_of(ours))
    if releases:
        fusedopt.release_gradients(ours, bucket_numel=1)
    for step in range(3):
        for optimizer, of in ((ours, model), (theirs, twin)):
            loss_of(of, tokens(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_whole(ours, theirs)
    if "max_grad_norm" in kwargs:
        assert torch.equal(ours.last_grad_norm, theirs.last_grad_norm)


@pytest.mark.parametrize(
    ("format_name", "options", "releases"),
    [
        ("fp32", {}, False),
        ("fp32", {"step_device": "cpu"}, False),
        ("8bit-split24", {"step_device": "cpu"}, True),
        pytest.param("8bit-split24", {}, True, marks=pytest.mark.thorough),
    ],
)
def test_trains_as_one_process(ranks: Ranks, format_name: str, options: dict[str, Any], releases: bool) -> None:
    ranks(2, _trains_as_one, format_name=format_name, options=options, releases=releases)
