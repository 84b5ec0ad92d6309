"""Shards stepped by the kernels of GPUs, emulated and interpreted: the bits of one process that the CPU steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same_bits
from emulated import FOLDER, EmulatedBackend
from interpreted import hasten
from sharded.models import EIGHT_BIT, full_params, placed, step_both, whole
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import fusedopt
from fusedopt import backends
from fusedopt.backends import eager, triton

# Whole blocks of columns in every layout, fewer rows than blocks, rows that no world divides, a vector.
SHAPES = ((5, 256), (3, 128), (67, 128), (31,))
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(-1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(-1)]),
    "replicas": ((2,), [Replicate()]),
}
KWARGS: dict[str, dict[str, Any]] = {
    "8bit": EIGHT_BIT,
    "bf16 + split24 + 8bit": {**EIGHT_BIT, "master_weights": "split24", "dtype": torch.bfloat16},
    "bf16, stochastic": {"state_dtype": "bfloat16", "rounding": "stochastic", "dtype": torch.bfloat16},
}


def _stepped(
    rank: int, world: int, backend: str, layout: str, name: str, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> None:
    kwargs = dict(KWARGS.get(name, {}))
    dtype = kwargs.pop("dtype", torch.float32)
    sizes, placements = PLACEMENTS[layout]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("rows", "columns")[: len(sizes)])
    full = full_params(shapes, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delattr(eager, "step_param")  # nothing is left to plain torch
        if backend == "cuda":
            monkeypatch.setitem(backends.BACKENDS, "cuda", EmulatedBackend())
        else:
            hasten(monkeypatch)
        params = [torch.nn.Parameter(placed(p, mesh, [_for(p, each) for each in placements])) for p in full]
        ours = fusedopt.AdamW(params, lr=1e-2, seed=3, backend=backend, **kwargs)
        theirs = fusedopt.AdamW([torch.nn.Parameter(p.clone()) for p in full], lr=1e-2, seed=3, backend="cpu", **kwargs)
        step_both(ours, theirs, range(2), dtype)
        others = fusedopt.AdamW(
            [torch.nn.Parameter(param.detach().clone()) for param in params], lr=1e-2, seed=3, backend="cpu", **kwargs
        )
        others.load_state_dict({**ours.state_dict(), "param_groups": others.state_dict()["param_groups"]})
        for optimizer in (ours, others):  # what is reported of shards is the same, whoever steps them
            optimizer.record_health()
            optimizer.record_norms()
        step_both(ours, theirs, [2], dtype)
        step_both(others, None, [2], dtype)
        assert ours.health_report() == others.health_report()
        assert ours.norms_report() == others.norms_report()
        for i, (param, twin) in enumerate(zip(params, theirs.param_groups[0]["params"])):
            assert_same_bits(whole(param), twin, f"parameter {i}")
            for key, value in theirs.state[twin].items():
                assert_same_bits(whole(ours.state[param][key]), value, f"{key} of parameter {i}")


def _for(param: torch.Tensor, placement: Any) -> Any:
    """The placement in a tensor of that many dimensions; a vector has no columns."""
    if not placement.is_shard() or placement.dim == 0:
        return placement
    return Shard(param.dim() - 1) if param.dim() > 1 else Replicate()


# Interpreted, a program takes milliseconds: `make test` takes one format for each layout.
COMBINATIONS = [
    pytest.param(backend, layout, name, marks=() if backend == "cuda" or i == j else pytest.mark.thorough)
    for backend in ("cuda", "triton")
    for i, layout in enumerate(PLACEMENTS)
    for j, name in enumerate(KWARGS)
]


@pytest.mark.parametrize(("backend", "layout", "name"), COMBINATIONS)
def test_shards_have_the_bits_of_the_whole(ranks: Ranks, backend: str, layout: str, name: str) -> None:
    if backend == "cuda" and not FOLDER:
        pytest.skip("FUSEDOPT_EMULATED does not say where the kernels for the CPU are; `make test` builds them")
    if backend == "triton" and (triton.missing() is not None or not triton.is_interpreting()):
        pytest.skip("Triton's kernels are not interpreted here")
    world = torch.Size(PLACEMENTS[layout][0]).numel()
    ranks(world, _stepped, backend=backend, layout=layout, name=name)


@pytest.mark.skipif(not FOLDER, reason="needs the kernels for the CPU, which `make test` builds")
def test_norms_of_many_rows_whose_columns_are_no_whole_blocks(ranks: Ranks) -> None:
    """A block of each row's own makes one chunk more of their sums than the elements in one row would."""
    ranks(2, _stepped, backend="cuda", layout="columns", name="float32", shapes=((2049, 130),))
