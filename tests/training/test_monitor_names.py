"""Names under which a Monitor records what it is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loops import optimizer_of

pytest.importorskip("pydantic")

from fusedopt.training import Monitor, TrainingWarning, preset, read_run


@pytest.mark.parametrize("name", ["step", "version", "ended", "groups", "time", "anomalies", "update_norm"])
def test_names_that_the_file_uses_itself_are_refused(name: str, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run.jsonl", optimizer_of())
    with pytest.raises(ValueError, match=f"^{name}= is a name that the file of a run uses itself; record it under"):
        monitor.step(1.0, **{name: 1})
    assert monitor.last_step == 0
    assert read_run(tmp_path / "run.jsonl").records == []


def test_all_that_is_written_is_refused_as_a_name(tmp_path: Path) -> None:
    optimizer = optimizer_of(max_grad_norm=1.0)
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, scaler=torch.amp.GradScaler("cpu"), recipe=preset("lora"))
    optimizer.step()
    with pytest.warns(TrainingWarning):
        monitor.step(math.nan, tokens=1)
    run = read_run(tmp_path / "run.jsonl")
    for name in {*run.records[0], "version"} - {"loss", "tokens", "grad_norm", "lr"}:  # all but lr are arguments
        with pytest.raises(ValueError, match=name):
            monitor.step(1.0, **{name: 1})


def test_names_that_do_no_harm_are_recorded(tmp_path: Path) -> None:
    names = ("lr", "scale", "optimizer", "torch", "started", "recipe", "fingerprint")
    monitor = Monitor(tmp_path / "run.jsonl", optimizer_of(), recipe=preset("lora"))
    for _ in range(2):
        monitor.step(1.0, **dict.fromkeys(names, 3.0))
    run = read_run(tmp_path / "run.jsonl")
    assert [run.series(name) for name in names] == [([1, 2], [3.0, 3.0])] * len(names)
    assert run.header["optimizer"] == "AdamW"
    assert run.anomalies == []
