"""A checkpoint of the version before the arithmetic of docs/numerics.md changed: its formats are the same.

written_before.json has what that version stored after 20 steps, and where 20 more steps took it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt

SHAPE = (4, 64)
FORMATS: dict[str, dict[str, Any]] = {
    "8bit": {"dtype": torch.float32},
    "split24": {"dtype": torch.bfloat16, "master_weights": "split24"},
}
FILE = Path(__file__).with_name("written_before.json")


def gradient(step: int, dtype: torch.dtype) -> torch.Tensor:
    """Of three magnitudes, and mostly of one sign."""
    i = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float64).reshape(SHAPE)
    return (((i * 37 + step * 101) % 64 - 20) * 0.3 ** (i % 3)).to(dtype)


def optimizer_of(param: torch.nn.Parameter, **kwargs: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW([param], lr=1e-2, state_dtype="8bit", min_quantized_numel=1, **kwargs)


def weights(optimizer: fusedopt.AdamW, param: torch.nn.Parameter) -> torch.Tensor:
    module = torch.nn.Module()
    module.weight = param
    return fusedopt.fp32_parameters(optimizer, module)["weight"]


def run(optimizer: fusedopt.AdamW, param: torch.nn.Parameter, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        param.grad = gradient(step, param.dtype)
        optimizer.step()


def tensor_of(held: dict[str, Any]) -> torch.Tensor:
    values = torch.frombuffer(bytearray.fromhex(held["hex"]), dtype=getattr(torch, held["dtype"]))
    return values.reshape(held["shape"])


@pytest.mark.parametrize("name", FORMATS)
def test_it_loads_and_goes_on(name: str) -> None:
    written = json.loads(FILE.read_text())[name]
    kwargs = dict(FORMATS[name])
    param = torch.nn.Parameter(tensor_of(written["param"]).to(kwargs.pop("dtype")))
    state = {key: tensor_of(held) for key, held in written["state"].items()}
    optimizer = optimizer_of(param, **kwargs)
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [written["group"]]})
    for key, tensor in state.items():
        assert torch.equal(optimizer.state[param][key], tensor), key
    before = weights(optimizer, param).clone()
    run(optimizer, param, first=20, steps=20)
    theirs = tensor_of(written["after"]) - before
    ours = weights(optimizer, param) - before
    # Random bits are others: within the noise of the formats. Two seeds of the version before differ by as much.
    noise = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    print(f"{name}: {noise:.4f} of the movement")
    assert 0 < noise < 2 * written["noise"]
