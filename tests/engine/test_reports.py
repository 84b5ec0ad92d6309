"""What state takes, and what goes wrong quietly."""

from __future__ import annotations

import pytest
import torch
from cases import make_params, set_grads, train

import fusedopt

SHAPES = [(128, 256), (256,), (64, 64), (10, 10)]


def test_memory_report_counts_the_bytes_that_are_there() -> None:
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = fusedopt.AdamW(params, state_dtype="8bit", master_weights="split24")
    planned = optimizer.memory_report()
    train(optimizer, 1)
    report = optimizer.memory_report()
    assert report == planned
    numel = sum(param.numel() for param in params)
    held = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert report.numel == numel
    assert report.state_bytes == sum(v.numel() * v.element_size() for v in held)
    assert report.ours["parameters"] == report.ours["gradients"] == 2 * numel
    assert report.ours["master_low"] == numel
    quantized = 128 * 256 + 64 * 64
    assert report.ours["exp_avg"] == quantized + quantized // 64 + 4 * (256 + 100)
    assert report.torch == {
        "parameters": 2 * numel,
        "gradients": 2 * numel,
        "exp_avg": 2 * numel,
        "exp_avg_sq": 2 * numel,
    }
    assert report.unquantized == {"1-dimensional": (2, 512), "fewer than 4096 elements": (2, 200)}
    assert report.bytes_per_param["master_low"] == 1.0


def test_memory_report_is_a_table() -> None:
    params = make_params(SHAPES, torch.float32)
    text = str(fusedopt.AdamW(params, state_dtype="8bit").memory_report())
    lines = text.splitlines()
    assert lines[0] == "37,220 parameters"
    assert [line.split()[0] for line in lines[3:8]] == ["parameters", "gradients", "exp_avg", "exp_avg_sq", "total"]
    assert len({len(line) for line in lines[1:8]}) == 1  # columns line up
    assert lines[8] == "not in 8 bits, 2 states of 512 elements: 1-dimensional"


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_stalled_weights_are_counted(backend: str, isa: str) -> None:
    """Of 1,000 bfloat16 weights of 1, those with a small gradient stay, those without one do not count."""
    param = torch.nn.Parameter(torch.ones(10, 100, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
    optimizer.record_health()
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        param.grad[0] = 1e-5
        param.grad[1] = 1.0
        optimizer.step()
    report = optimizer.health_report()
    assert (report.steps, report.elements) == (3, 3000)
    assert report.totals["stalled"] == 300
    assert report.by_parameter == {"0.0": report.totals}
    # with more of the weight kept the same updates arrive
    moving = torch.nn.Parameter(torch.ones(10, 100, dtype=torch.bfloat16))
    moving.grad = torch.full_like(moving, 1e-5)
    optimizer = fusedopt.SGD([moving], lr=1.0, master_weights="split32", backend=backend)
    optimizer.record_health()
    optimizer.step()
    assert optimizer.health_report().totals["stalled"] == 0


@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit"}, {"state_dtype": "8bit", "master_weights": "kahan"}])
def test_counts_are_the_same_in_every_path(kwargs: dict, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for backend, threads in (("cpu", 1), ("cpu", 5), ("eager", 1)):
        torch.set_num_threads(threads)
        optimizer = fusedopt.AdamW(
            make_params([(3, 70_000), (7,), (64, 65)], torch.bfloat16), lr=1e-5, **kwargs, backend=backend
        )
        optimizer.record_health()
        params = optimizer.param_groups[0]["params"]
        for step in range(2):
            set_grads(params, step)
            params[0].grad[1, 5] = float("inf")
            params[1].grad[3] = float("nan")
            optimizer.step()
        reports.append(optimizer.health_report())
    assert reports[0] == reports[1] == reports[2]
    totals = reports[0].totals
    assert totals["nonfinite_grads"] == 4
    assert totals["stalled"] > 0
    if kwargs:
        assert totals["nonfinite_blocks"] == 4  # a block of each state, in each step
        assert 0 < totals["saturated_codes"] < totals["codes"] / 64
    else:
        assert totals["codes"] == 0


def test_counting_changes_no_bit_and_is_off_by_default() -> None:
    from cases import assert_same_run

    runs = []
    for counts in (False, True):
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), state_dtype="8bit", master_weights="kahan")
        if counts:
            optimizer.record_health()
        else:
            with pytest.raises(ValueError, match=r"nothing was counted; call record_health\(\)"):
                optimizer.health_report()
        runs.append(train(optimizer, 3))
    assert_same_run(*runs)
    runs[1].record_health(False)
    with pytest.raises(ValueError, match="nothing was counted"):
        runs[1].health_report()


def test_health_report_is_a_table_and_names_parameters() -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = fusedopt.AdamW(model.named_parameters(), state_dtype="8bit")
    optimizer.record_health()
    train(optimizer, 2)
    report = optimizer.health_report()
    assert list(report.by_parameter) == ["weight"]
    lines = str(report).splitlines()
    assert lines[0] == "2 steps, 8,192 elements"
    assert lines[3].startswith("weights that their gradient did not move")
    assert len(lines) == 8
