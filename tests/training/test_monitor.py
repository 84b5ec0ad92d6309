"""Monitor: its file survives what happens to trainings, and says what they did."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import optimizer_of

import fusedopt

pytest.importorskip("pydantic")

from fusedopt.training import Monitor, StopTraining, TrainingWarning, preset, read_run
from fusedopt.training.monitor_runs import Reader


def test_what_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    optimizer = optimizer_of(max_grad_norm=1.0)
    recipe = preset("text-classification")
    with Monitor(path, optimizer, recipe=recipe) as monitor:
        for step in range(3):
            optimizer.step()
            monitor.step(torch.tensor(1.5 + step), tokens=100, accuracy=0.5)
    run = read_run(path)
    assert run.ended
    assert run.header["optimizer"] == "AdamW"
    assert run.header["fingerprint"] == recipe.fingerprint
    assert run.series("loss") == ([1, 2, 3], [1.5, 2.5, 3.5])
    assert run.series("lr")[1] == [1e-3] * 3
    assert run.series("accuracy")[1] == [0.5] * 3
    assert run.series("grad_norm")[1] == pytest.approx([math.sqrt(10)] * 3)  # of float32 squares
    assert all(speed > 0 for speed in run.series("tokens_per_second")[1])
    assert run.anomalies == []


def test_the_norm_is_measured_where_nobody_has_found_it(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(optimizer_of().param_groups[0]["params"], lr=0.1)
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, norms_every=2)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    for _ in range(4):
        monitor.step(1.0)
    assert read_run(tmp_path / "run.jsonl").series("grad_norm") == ([1, 3], pytest.approx([math.sqrt(10)] * 2))
    monitor.step(1.0, grad_norm=torch.tensor(7.0))
    assert read_run(tmp_path / "run.jsonl").series("grad_norm")[1][-1] == 7.0


def test_several_learning_rates_and_a_skipped_step(tmp_path: Path) -> None:
    params = optimizer_of().param_groups[0]["params"]
    optimizer = fusedopt.SGD(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}], skip_step_above=1.0
    )
    monitor = Monitor(tmp_path / "run.jsonl", optimizer)
    optimizer.step()
    monitor.step(1.0)
    (record,) = read_run(tmp_path / "run.jsonl").records
    assert (record["lr"], record["lrs"], record["skipped"]) == (0.2, [0.1, 0.2], True)


def test_the_loss_scale(tmp_path: Path) -> None:
    optimizer = optimizer_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))  # which makes the scale
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, scaler=scaler)
    for value in (1.0, math.inf):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
        monitor.step(1.0)
    records = read_run(tmp_path / "run.jsonl").records
    assert [(r["scale"], r.get("skipped", False)) for r in records] == [(1024.0, False), (512.0, True)]


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("kind", [fusedopt.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_the_norm_is_that_of_gradients_without_their_scale(kind: Any, unscales: bool, tmp_path: Path) -> None:
    params = optimizer_of().param_groups[0]["params"]
    optimizer = kind(params, lr=1e-3, **({"fused": True} if kind is torch.optim.AdamW else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)  # its scale doubles after each step
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, scaler=scaler, norms_every=1)
    for _ in range(2):
        for param in params:
            param.grad = None
        scaler.scale(sum(param.sum() for param in params)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        monitor.step(1.0)
    monitor.close()
    assert read_run(tmp_path / "run.jsonl").series("grad_norm")[1] == pytest.approx([math.sqrt(10)] * 2)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_norm_of_a_captured_step_is_without_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of()
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, scaler=torch.amp.GradScaler("cpu"), norms_every=1)
    optimizer.grad_scale = torch.tensor(2.0)  # as scaler.step gives it
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monitor._before_step(optimizer)
    monitor.step(1.0)  # after a replay, which calls no hook
    assert read_run(tmp_path / "run.jsonl").series("grad_norm")[1] == pytest.approx([math.sqrt(10) / 2])


def test_a_monitor_that_nobody_holds_leaves_its_optimizer(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(optimizer_of().param_groups[0]["params"], lr=0.1)
    for _ in range(2):  # a cell of a notebook that is run again
        monitor = Monitor(None, optimizer, scaler=torch.amp.GradScaler("cpu"))
    monitor.itself = monitor  # type: ignore[attr-defined]  (a cycle, as `save` may make one)
    gone = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert gone() is None
    optimizer.step()
    optimizer.step()  # one leaves in a step
    assert not optimizer._optimizer_step_pre_hooks


def test_what_a_warmup_saw_is_not_taken_for_a_captured_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optimizer_of()
    monitor = Monitor(tmp_path / "run.jsonl", optimizer, scaler=torch.amp.GradScaler("cpu"), norms_every=1)
    optimizer.grad_scale = torch.tensor(2.0)
    monitor._before_step(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monitor._before_step(optimizer)
    for param in optimizer.param_groups[0]["params"]:
        param.grad.fill_(3.0)
    monitor.step(1.0)
    assert read_run(tmp_path / "run.jsonl").series("grad_norm")[1] == pytest.approx([3 * math.sqrt(10) / 2])


def test_what_it_asks_of_an_optimizer_ends_with_it(tmp_path: Path) -> None:
    optimizer = fusedopt.AdamW(optimizer_of().param_groups[0]["params"], lr=0.1)
    with Monitor(tmp_path / "run.jsonl", optimizer, norms_every=1):
        assert optimizer.records_norms
    assert not optimizer.records_norms
    optimizer.record_norms()
    with Monitor(tmp_path / "other.jsonl", optimizer, norms_every=1):
        pass
    assert optimizer.records_norms  # a user's own wish


def test_every_tenth_step(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run.jsonl", optimizer_of(), every=10, norms_every=None)
    for _ in range(25):
        monitor.step(1.0, tokens=10)
    run = read_run(tmp_path / "run.jsonl")
    assert run.series("step")[0] == [1, 11, 21]
    assert run.series("tokens")[1] == [10, 100, 100]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    monitor = Monitor(path, optimizer_of(), on_anomaly=None)
    for value in (math.nan, math.inf, -math.inf):
        monitor.step(value)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    values = read_run(path).series("loss")[1]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf]


# ---- kills and resumes -------------------------------------------------------------------------------

_FOREVER = """
import sys, time, torch
from fusedopt.training import Monitor
param = torch.nn.Parameter(torch.ones(1))
monitor = Monitor(sys.argv[1], torch.optim.SGD([param], lr=0.1), norms_every=None)
for i in range(10_000):
    monitor.step(float(monitor.last_step + 1))
    if i == 20:
        print("on", flush=True)
    time.sleep(0.001)
"""


def test_it_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", _FOREVER, str(path)], stdout=subprocess.PIPE, cwd=tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    run = read_run(path)
    steps, losses = run.series("loss")
    assert len(steps) >= 40
    assert steps == list(range(1, len(steps) + 1))
    assert losses == [float(step) for step in steps]
    assert (run.resumes, run.ended) == (1, False)


def test_a_cut_line_is_left_out_and_removed_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Monitor(path, optimizer_of(), on_anomaly=None) as monitor:
        for _ in range(3):
            monitor.step(1.0)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[-1]) + 1):
        path.write_bytes(whole[:-cut])
        run = read_run(path)
        assert len(run.records) == 3
        assert run.is_cut == (cut < len(lines[-1]))
    path.write_bytes(whole[:-5])
    monitor = Monitor(path, optimizer_of())
    monitor.step(1.0)
    run = read_run(path)
    assert run.series("step")[0] == [1, 2, 3, 4]
    assert run.resumes == 1
    assert not run.is_cut


def test_a_run_that_goes_on_from_an_older_step_supersedes_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    monitor = Monitor(path, optimizer_of())
    for _ in range(10):
        monitor.step(1.0)
    monitor = Monitor(path, optimizer_of(), start=6)
    for _ in range(2):
        monitor.step(2.0)
    assert read_run(path).series("loss") == ([1, 2, 3, 4, 5, 6, 7], [1.0] * 5 + [2.0] * 2)


def test_a_resumed_run_finds_what_a_whole_one_does(tmp_path: Path) -> None:
    losses = [1.0 + 0.01 * (step % 7) for step in range(60)]
    losses[40] = 3.0
    found = []
    for kind in ("whole", "resumed"):
        path = tmp_path / f"{kind}.jsonl"
        monitor = Monitor(path, optimizer_of(), on_anomaly=None)
        for step, loss in enumerate(losses):
            if kind == "resumed" and step == 35:
                monitor = Monitor(path, optimizer_of(), on_anomaly=None)
            monitor.step(loss)
        found.append(read_run(path).anomalies)
    assert found[0] == found[1]
    assert [(each.kind, each.step) for each in found[0]] == [("loss_spike", 41)]


def test_a_reader_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    monitor = Monitor(path, optimizer_of())
    reader = Reader(path)
    for step in range(1, 4):
        monitor.step(1.0)
        assert len(reader.read().records) == step
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
        file.flush()
        assert len(reader.read().records) == 3
        file.write('ss": 2.0}\n')
        file.flush()
        assert reader.read().series("loss") == ([1, 2, 3, 4], [1.0, 1.0, 1.0, 2.0])


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"step": 1}\n{"loss": 2}\n', '{"version": 2}\n'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no record of a run|version 2 of run files is not known"):
        read_run(path)
    with pytest.raises(ValueError, match=r"is no record of a run|version 2 of run files is not known"):
        Monitor(path, optimizer_of())
    assert path.read_text() == text


# ---- actions -----------------------------------------------------------------------------------------


def test_warnings_and_calls(tmp_path: Path) -> None:
    with pytest.warns(TrainingWarning, match="step 1: the loss is nan"):
        Monitor(None, optimizer_of()).step(math.nan)
    called: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Monitor(None, optimizer_of(), on_anomaly=called.append).step(math.nan)
    assert called == found
    assert found[0].kind == "non_finite"


def test_it_stops_with_a_checkpoint(tmp_path: Path) -> None:
    saved: list[int] = []
    monitor = Monitor(
        tmp_path / "run.jsonl",
        optimizer_of(),
        on_anomaly=None,
        stop_on=["non_finite"],
        save=lambda: saved.append(monitor.last_step),
    )
    monitor.step(1.0)
    with pytest.raises(StopTraining, match="step 2: the loss is inf") as stopped:
        monitor.step(math.inf)
    assert stopped.value.anomaly.kind == "non_finite"
    assert saved == [2]
    assert [each.kind for each in read_run(tmp_path / "run.jsonl").anomalies] == ["non_finite"]


def test_arguments_are_checked(tmp_path: Path) -> None:
    path, optimizer = tmp_path / "run.jsonl", optimizer_of()
    with pytest.raises(TypeError, match=r"optimizer=3 is a int; pass a torch\.optim\.Optimizer"):
        Monitor(path, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"every=0 counts nothing"):
        Monitor(path, optimizer, every=0)
    with pytest.raises(ValueError, match=r"stop_on='divergent'.*divergence"):
        Monitor(path, optimizer, stop_on=["divergent"])
    with pytest.raises(TypeError, match=r"stop_on='divergence' is a text"):
        Monitor(path, optimizer, stop_on="divergence")
    with pytest.raises(ValueError, match=r"on_anomaly='shout'"):
        Monitor(path, optimizer, on_anomaly="shout")
    assert not path.exists()


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Monitor(None, optimizer_of(), on_anomaly=None, tensorboard=tmp_path) as monitor:
        for value in (1.0, 2.0, math.nan):
            monitor.step(value)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("train/loss")][:2] == [1.0, 2.0]
    assert [event.step for event in events.Scalars("train/lr")] == [1, 2, 3]


def test_without_tensorboard_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="needs TensorBoard; install it with: pip install tensorboard"):
        Monitor(None, optimizer_of(), tensorboard=os.fspath(tmp_path))


def test_what_no_monitor_has_written_is_looked_at_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": {2 / step}}}\n' for step in range(1, 20)))
    assert read_run(path).anomalies == []
    with path.open("a") as file:
        file.write('{"step": 20, "loss": "NaN"}\n')
    (found,) = read_run(path).anomalies
    assert (found.kind, found.step) == ("non_finite", 20)
