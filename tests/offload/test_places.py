"""Every rule and format with its states elsewhere, on a device that runs late: the bits of resident states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ADAFACTOR, DTYPES, FORMATS, Case, assert_same_run, format_kwargs, make_params, train
from matrices import MASTERED, each_rule, product
from queued import QueuedRuntime, queued, run  # noqa: F401

import fusedopt
from fusedopt.offload import disk, host

SHAPES = [(40, 256), (3,), (7, 100), (), (0,), (30, 64)]
PLACES = ["host", "files", "stepped there"]
RULES = [*each_rule(), pytest.param(ADAFACTOR, {**ADAFACTOR.kwargs, "beta1": 0.9}, id="adafactor")]

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows, and files, for little."""
    monkeypatch.setattr(host, "_WINDOW_NUMEL", 3000)
    monkeypatch.setattr(disk, "SLAB_BYTES", 1 << 15)


def elsewhere(place: str, folder: Path) -> dict[str, Any]:
    if place == "stepped there":
        return {"step_device": "cpu"}
    return {"state_device": "cpu" if place == "host" else f"disk:{folder}", "backend": "cuda", "stream_bytes": 1 << 16}


def place_of(runtime: QueuedRuntime, tensor: torch.Tensor) -> str:
    if disk.slab_of(tensor) is not None:
        return "files"
    return "host" if runtime.is_host(tensor) else "device"


def check(runtime: QueuedRuntime, place: str, cls: Any, dtype: torch.dtype, folder: Path, **options: Any) -> None:
    ours = cls(make_params(SHAPES, dtype), **options, **elsewhere(place, folder))
    run(runtime, ours, 2)
    assert_same_run(ours, train(cls(make_params(SHAPES, dtype), backend="cpu", **options), 2))
    if place == "stepped there":  # in memory that nobody copies
        return
    for held in ours.state.values():
        found = {place_of(runtime, value) for key, value in held.items() if key != "step" and value.numel() > 0}
        assert found <= {place}
        assert place_of(runtime, held["step"]) == "device"


@pytest.mark.parametrize(("place", "case", "kwargs", "dtype", "state_format"), product(PLACES, RULES, DTYPES, FORMATS))
def test_every_rule_and_format(
    queued: QueuedRuntime,  # noqa: F811
    place: str,
    case: Case,
    kwargs: dict[str, Any],
    dtype: str,
    state_format: str,
    tmp_path: Path,
) -> None:
    if case is ADAFACTOR and state_format == "mixed":
        pytest.skip("its states have other shapes")
    options = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    check(queued, place, case.ours, DTYPES[dtype], tmp_path, **options)


@pytest.mark.parametrize(("place", "dtype", "rounding", "master", "state_format"), product(PLACES, *MASTERED))
def test_masters(
    queued: QueuedRuntime,  # noqa: F811
    place: str,
    dtype: str,
    rounding: str,
    master: str | None,
    state_format: str,
    tmp_path: Path,
) -> None:
    options = {"rounding": rounding, "master_weights": master, **FORMATS[state_format]}
    check(queued, place, fusedopt.AdamW, DTYPES[dtype], tmp_path, **options)
