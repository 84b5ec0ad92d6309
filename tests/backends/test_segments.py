"""Columns of a matrix, as a rank of tensor parallelism holds them: they draw the random bits of the whole."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from cases import CASES, assert_same_bits, make_params, set_grads

import fusedopt
from fusedopt import backends
from fusedopt.backends import ParamStep
from fusedopt.backends.base import SquareSums

# Formats, and the columns of (9, 320) that are held: at odd places, and of whole blocks. SGD has no states.
PLACES: dict[str, tuple[dict[str, Any], slice]] = {
    "bf16": ({"state_dtype": "bfloat16", "rounding": "stochastic"}, slice(37, 232)),
    "8bit": ({"state_dtype": "8bit", "master_weights": "split24"}, slice(64, 192)),
    "8bit-last": ({"state_dtype": "8bit", "rounding": "stochastic"}, slice(192, 320)),
    "kahan": (
        {"state_dtype": {"exp_avg": "float16"}, "master_weights": "kahan", "rounding": "stochastic"},
        slice(0, 3),
    ),
    "sgd": ({"master_weights": "kahan", "rounding": "stochastic"}, slice(37, 232)),
}
# Of the whole in a larger one: the upper half of the index changes on the way.
FIRST = 2**32 - 1000


def entry_of(optimizer: fusedopt.FusedOptimizer, columns: slice | None) -> ParamStep:
    """The parameter of an optimizer as a backend is given it, or columns of it in memory of their own."""
    (param,) = optimizer.param_groups[0]["params"]
    held = optimizer.state[param]
    width = param.shape[1]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if columns is None:
            return tensor.detach()
        part = columns if tensor.shape[1] == width else slice(columns.start // 64, columns.stop // 64)
        return tensor.detach()[:, part].clone(memory_format=torch.contiguous_format)

    master = next((held[key] for key in ("master_low", "compensation") if key in held), None)
    place = {} if columns is None else {"segment": columns.stop - columns.start, "segment_stride": width}
    specs = optimizer.states(optimizer.param_groups[0])
    return ParamStep(
        group=0,
        position=0,
        param=cut(param),
        grad=cut(param.grad),
        states=tuple(tuple(cut(held[key]) for key in spec.keys_in(held)) for spec in specs),
        step=held["step"].clone(),
        master=None if master is None else cut(master),
        first_index=FIRST + (0 if columns is None else columns.start),
        **place,
    )


def tensors_of(entry: ParamStep) -> list[torch.Tensor]:
    masters = [] if entry.master is None else [entry.master]
    return [entry.param, *masters, *(tensor for held in entry.states for tensor in held)]


def taken(
    backend: str, optimizer: fusedopt.FusedOptimizer, entry: ParamStep, square_sums: SquareSums | None = None
) -> list[torch.Tensor]:
    session = backends.BACKENDS[backend].session()
    session.begin([optimizer.group_step(optimizer.param_groups[0])], [None])
    assert session.add(entry)
    session.step([1.0], square_sums=square_sums)
    return tensors_of(entry)


def stepped_once(name: str) -> tuple[fusedopt.FusedOptimizer, slice]:
    """An optimizer before its second step, and which columns are held."""
    kwargs, columns = PLACES[name]
    (param,) = make_params([(9, 320)], torch.bfloat16)
    cls = fusedopt.SGD if name == "sgd" else CASES[0].ours
    optimizer = cls([param], seed=5, min_quantized_numel=1, **kwargs)
    set_grads([param], 0)
    optimizer.step()
    set_grads([param], 1)
    return optimizer, columns


def compare_sums(backend: str, name: str) -> None:
    """Of updates and weights: blocks do not cross the rows of a shard."""
    optimizer, columns = stepped_once(name)
    found, expected = {}, {}
    taken(backend, optimizer, entry_of(optimizer, columns), found)
    taken("eager", optimizer, entry_of(optimizer, columns), expected)
    assert found == expected
    assert all(update > 0 for update, _ in found.values())


def compare(backend: str, name: str) -> None:
    optimizer, columns = stepped_once(name)
    part, whole = entry_of(optimizer, columns), entry_of(optimizer, None)
    found, expected = taken(backend, optimizer, part), taken("eager", optimizer, whole)
    for ours, theirs in zip(found, expected, strict=True):
        part = columns if theirs.shape[1] == 320 else slice(columns.start // 64, columns.stop // 64)
        assert_same_bits(ours, theirs[:, part])


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_columns_draw_what_the_whole_draws(backend: str, name: str, isa: str) -> None:
    compare(backend, name)
    if backend != "eager":
        compare_sums(backend, name)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", PLACES)
def test_on_cuda(name: str) -> None:
    compare("cuda", name)
    compare_sums("cuda", name)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", PLACES)
def test_on_triton(name: str) -> None:
    compare("triton", name)
    compare_sums("triton", name)


def test_where_nothing_is_regular_the_reference_steps() -> None:
    """Elements at any places of the whole."""
    (param,) = make_params([(9, 320)], torch.bfloat16)
    optimizer = CASES[0].ours([param], seed=5, state_dtype="bfloat16", rounding="stochastic")
    set_grads([param], 0)
    optimizer.step()
    set_grads([param], 1)
    whole = entry_of(optimizer, None)
    places = torch.tensor([0, 319, 5, 640, 2879])

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1)[places]

    states = tuple(tuple(cut(tensor) for tensor in held) for held in whole.states)
    part = ParamStep(
        0, 0, cut(whole.param), cut(whole.grad), states, whole.step.clone(), indices=FIRST + places, first_index=FIRST
    )
    session = backends.BACKENDS["cpu"].session()
    session.begin([optimizer.group_step(optimizer.param_groups[0])], [None])
    assert not session.add(part), "the compiled core would draw other bits"
    found, expected = taken("eager", optimizer, part), taken("eager", optimizer, whole)
    for ours, theirs in zip(found, expected):
        assert_same_bits(ours, cut(theirs))
