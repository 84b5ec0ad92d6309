"""Every optimizer in every layout and format, against one process; what comes out is the table of the documents."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADAFACTOR, CASES, integers
from sharded.layouts import LAYOUTS
from sharded.models import EIGHT_BIT, full_grads, full_params, placed, whole
from sharded.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fusedopt
from fusedopt.storage.state import why_not_quantized

DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
OPTIMIZERS = {"AdamW": "adamw", "Lion": "lion", "AdEMAMix": "ademamix", "RMSprop": "rmsprop", "Adagrad": "adagrad"}
OPTIMIZERS |= {"SGD": "sgd", "Adafactor": "adafactor", "StableAdamW": "stable_adamw"}
KWARGS = {"SGD": {"momentum": 0.9}, "Adafactor": {"scale_parameter": True, "relative_step": True, "lr": None}}
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"state_dtype": "bfloat16", "rounding": "stochastic"}),
    "8-bit": (torch.float32, EIGHT_BIT),
    "masters": (torch.bfloat16, {**EIGHT_BIT, "master_weights": "split24"}),
}
# Matrices whose shards are whole blocks in every layout and ragged ones, fewer rows than ranks, a vector.
EVEN = ((128, 256), (64, 128))
RAGGED = ((67, 71), (2, 70), (13, 5, 64))
SHAPES = (*EVEN, *RAGGED, (31,))


def _build(name: str, layout: str, params: list[Any], kwargs: dict[str, Any]) -> Any:
    if layout != "ZeRO-1":
        return getattr(fusedopt, name)(params, **kwargs)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=getattr(fusedopt, name), **kwargs)


def _set_grads(params: list[Any], step: int, dtype: torch.dtype) -> None:
    for param, grad in zip(params, full_grads([tuple(param.shape) for param in params], step, dtype)):
        param.grad = placed(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad


def _verdict(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> str:
    if all(torch.equal(integers(a), integers(b)) for a, b in zip(ours, theirs)):
        return "bits"
    if dtype == torch.float32:
        near = all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(ours, theirs))
        return "1e-6" if near else "other"
    # A difference of 1e-7 now and then changes how a weight is rounded.
    near = all(torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6) for a, b in zip(ours, theirs))
    same = sum(int((a == b).sum()) for a, b in zip(ours, theirs)) / sum(a.numel() for a in ours)
    return "1e-6" if near and same > 0.99 else "other"


def _keep_float32(optimizer: Any) -> list[bool]:
    """Which parameters keep float32 state although 8 bits are asked for, because shards would cut their blocks."""
    if not isinstance(optimizer, fusedopt.FusedOptimizer):
        return [False] * len(SHAPES)
    (group,) = optimizer.param_groups
    reasons = [
        [why_not_quantized(spec, group, param) for spec in optimizer.states_of(group, param)]
        for param in group["params"]
        if group["state_dtype"] == "8bit"
    ]
    cut = [any("edges within blocks" in reason for reason in each) for each in reasons]
    assert any("edges within blocks" in reason for reason in optimizer.memory_report().unquantized) == any(cut)
    return cut or [False] * len(SHAPES)


def _run(rank: int, world: int, layout: str, names: list[str], formats: list[str]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    rows = {**{case.name: case for case in CASES}, "adafactor": ADAFACTOR}
    for name in names:
        for format_name in formats:
            dtype, kwargs = FORMATS[format_name]
            kwargs = {**rows[OPTIMIZERS[name]].kwargs, **KWARGS.get(name, {}), "seed": 3, **kwargs}
            params = LAYOUTS[layout][1](world, full_params(SHAPES, dtype))
            twins = [nn.Parameter(param) for param in full_params(SHAPES, dtype)]
            ours = _build(name, layout, params, kwargs)
            cut = _keep_float32(ours)
            groups = [{"params": [t for t, c in zip(twins, cut) if not c]}]
            groups += [{"params": [t], "state_dtype": "float32"} for t, c in zip(twins, cut) if c]
            theirs = getattr(fusedopt, name)(groups, **kwargs)
            try:
                for step in range(3):
                    for optimizer, each in ((ours, params), (theirs, twins)):
                        _set_grads(each, step, dtype)
                        optimizer.step()
            except ValueError as error:
                found[name, format_name] = str(error)
                continue
            weights = [whole(param) for param in params]
            if getattr(fusedopt, name).takes_sums:  # compiled or not
                plain = LAYOUTS[layout][1](world, full_params(SHAPES, dtype))
                reference = _build(name, layout, plain, {**kwargs, "backend": "eager"})
                for step in range(3):
                    _set_grads(plain, step, dtype)
                    reference.step()
                assert all(torch.equal(integers(whole(a)), integers(b)) for a, b in zip(plain, weights))
            found[name, format_name] = _verdict(weights, twins, dtype) + (" ¹" if any(cut) else "")
            gathered = [None] * world
            torch.distributed.all_gather_object(gathered, weights)
            for other in gathered:
                assert all(torch.equal(integers(a), integers(b)) for a, b in zip(other, weights)), "ranks differ"
    return found


def results(ranks: Ranks, layout: str, names: list[str], formats: list[str]) -> dict[tuple[str, str], str]:
    world = LAYOUTS[layout][0]
    first, *others = ranks(world, _run, layout=layout, names=names, formats=formats)
    assert all(other == first for other in others)
    return first


def table(found: dict[tuple[str, str, str], str]) -> str:
    """The table of the documents: a row for each optimizer and format, a column for each layout."""
    rows = [["optimizer", "format", *LAYOUTS], ["---"] * (2 + len(LAYOUTS))]
    for name in OPTIMIZERS:
        rows += [
            [name, format_name, *(found[layout, name, format_name] for layout in LAYOUTS)] for format_name in FORMATS
        ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def documented() -> dict[tuple[str, str, str], str]:
    """What the table in the documents says."""
    pattern = re.compile(r"\| (optimizer|\w+ \| (fp32|bf16|8-bit|masters)) \|")
    lines = [line for line in DOCUMENT.read_text().splitlines() if pattern.match(line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        (layout, row[0], row[1]): cell for row in cells[1:] for layout, cell in zip(cells[0][2:], row[2:], strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_what_the_table_says(ranks: Ranks, layout: str) -> None:
    """An optimizer of two states and one of one, and those that take sums, in the formats that differ most."""
    names, formats = ["AdamW", "SGD", "Adafactor", "StableAdamW"], ["fp32", "masters"]
    found = results(ranks, layout, names, formats)
    expected = documented()
    assert found == {(name, kind): expected[layout, name, kind] for name in names for kind in formats}


@pytest.mark.thorough
def test_the_table_is_what_comes_out(ranks: Ranks) -> None:
    """All of it. FUSEDOPT_WRITE_TABLE=1 writes it to the document."""
    found = {
        (layout, *key): value
        for layout in LAYOUTS
        for key, value in results(ranks, layout, list(OPTIMIZERS), list(FORMATS)).items()
    }
    if os.environ.get("FUSEDOPT_WRITE_TABLE"):
        text = DOCUMENT.read_text()
        begin, end = (f"<!-- table: {word} -->" for word in ("begin", "end"))
        before, after = text.split(begin)[0], text.split(end)[1]
        DOCUMENT.write_text(f"{before}{begin}\n\n{table(found)}\n\n{end}{after}")
    assert documented() == found
