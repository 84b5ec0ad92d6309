"""Anomalies: on made series, on trainings that go wrong, and none on trainings that go well."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt

pytest.importorskip("pydantic")

from training_runs import HEALTHY, Made, gpt, regression

from fusedopt.training.anomalies import KINDS, Anomaly, Detector, Limits
from fusedopt.training.monitor import Monitor


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- made series -------------------------------------------------------------------------------------


def noisy(middle: float, share: float, seed: int = 0) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield middle * (1 + share * generator.gauss(0, 1))


def detect(records: list[dict[str, Any]], limits: Limits | None = None) -> list[Anomaly]:
    detector = Detector(limits)
    return [each for i, record in enumerate(records) for each in detector.add({"step": i + 1, **record})]


def healthy(count: int, **more: Any) -> list[dict[str, Any]]:
    losses, norms, updates = noisy(2.0, 0.03, 1), noisy(1.0, 0.1, 2), noisy(1e-3, 0.05, 3)
    return [
        {
            "loss": next(losses) + 2 * math.exp(-i / 200),
            "lr": 1e-3,
            "grad_norm": next(norms),
            "update_norm": next(updates),
            "groups": [{"name": "all", "lr": 1e-3, "update": 1e-3, "expected": 1e-3}],
            **more,
        }
        for i in range(count)
    ]


GROUP = {"name": "all", "lr": 1e-3, "update": 1e-3, "expected": 1e-3}
CHANGES: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "non_finite": lambda i, r: {"loss": math.nan},
    "overflow": lambda i, r: {"scale": 65536.0 / 2**i},
    "loss_spike": lambda i, r: {"loss": r["loss"] * 1.6} if i == 0 else {},
    "divergence": lambda i, r: {"loss": r["loss"] * 1.03 ** (i + 1)},
    "oscillation": lambda i, r: {"loss": 2.0 + 0.2 * (-1) ** i},
    "exploding_gradients": lambda i, r: {"grad_norm": 15.0} if i == 0 else {},
    "vanishing_gradients": lambda i, r: {"grad_norm": 1e-4},
    "update_spike": lambda i, r: {"update_norm": 4e-3} if i == 0 else {},
    "stuck_weights": lambda i, r: {"groups": [{**GROUP, "update": 5e-6}]},
    "dead_parameters": lambda i, r: {"dead": ["a.weight"]},
    "zero_lr": lambda i, r: {"lr": 0.0, "update_norm": 0.0},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_each_kind_is_found_and_no_other_before_it(kind: str) -> None:
    records = healthy(200, **({"scale": 65536.0} if kind == "overflow" else {}))
    assert detect(records) == []
    for i, record in enumerate(records[100:]):
        record.update(CHANGES[kind](i, record))
    found = detect(records)
    if kind == "divergence":  # whose beginning may be a spike
        found = [each for each in found if each.kind != "loss_spike"]
    assert found[0].kind == kind
    assert found[0].step >= 101
    latest = {"divergence": 180, "oscillation": 170, "vanishing_gradients": 107, "overflow": 106}.get(kind, 105)
    assert found[0].step <= latest
    assert sum(each.kind == kind for each in found) == 1  # once, however long it lasts


def test_a_plateau_is_found_where_the_loss_no_longer_falls() -> None:
    def run(falls: Callable[[int], float]) -> list[dict[str, Any]]:
        noise = noisy(1.0, 0.02)
        return [{"loss": falls(i) * next(noise), "lr": 1e-3} for i in range(6_000)]

    assert [each.kind for each in detect(run(lambda i: max(1.0, 3 - i / 100)))] == ["plateau"]
    assert detect(run(lambda i: 1 + 2 * (1 + i / 10) ** -0.3)) == []  # as of language models
    ends = run(lambda i: max(1.0, 3 - i / 100))
    for i, record in enumerate(ends):
        record["lr"] = 1e-3 if i < 250 else 1e-4
    assert detect(ends) == []  # it is meant to settle


def test_losses_below_0_are_compared_by_differences() -> None:
    noise = noisy(1.0, 0.02)
    records = [{"loss": -3.0 * next(noise)} for _ in range(100)]
    assert detect(records) == []
    records[80]["loss"] = -1.0
    assert [(each.kind, each.step) for each in detect(records)] == [("loss_spike", 81)]


def test_a_learning_rate_that_returns_to_what_was_borne_explains_an_update() -> None:
    records = [{"lr": lr, "update_norm": lr} for lr in [1e-3] * 50 + [1e-5] * 50 + [1e-3] * 50]
    assert detect(records) == []
    records = [{"lr": lr, "update_norm": lr} for lr in [1e-3] * 50 + [3e-2] * 50]
    assert [(each.kind, each.step) for each in detect(records)] == [("update_spike", 51)]


def test_an_overflow_now_and_then_is_what_a_loss_scale_is_for() -> None:
    scales = [65536.0, 32768.0, 16384.0, *[8192.0] * 100, 4096.0, *[4096.0] * 50]
    records = [
        {"loss": 1.0, "grad_norm": math.inf if i in (1, 2, 3, 103) else 1.0, "scale": s} for i, s in enumerate(scales)
    ]
    assert detect(records) == []


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match=r"window=0 counts nothing"):
        Limits(window=0)
    with pytest.raises(ValueError, match=r"oscillation=0\.5 is no negative autocorrelation"):
        Limits(oscillation=0.5)
    assert detect(healthy(120), Limits(deviations=0.1, loss_spike=1.001)) != []


# ---- trainings ---------------------------------------------------------------------------------------


def train(
    made: Made,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    disturb: Callable[[int, Tensor], Tensor | None] | None = None,
    **kwargs: Any,
) -> list[Anomaly]:
    _, loss_of = made
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda step: 1.0))
    monitor = Monitor(None, optimizer, on_anomaly=None, **kwargs)
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of()
        if disturb is not None:
            loss = disturb(step, loss)
        loss.backward()
        optimizer.step()
        found += monitor.step(loss)
        scheduler.step()
    return found


def run_healthy(name: str, steps: int, seed: int = 0) -> list[Anomaly]:
    torch.manual_seed(seed)
    make, optimizer, schedule = HEALTHY[name]
    made = make()
    return train(made, optimizer(made[0].parameters()), steps, schedule(steps))


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm_in_a_short_run(name: str) -> None:
    assert run_healthy(name, 120) == []


@pytest.mark.thorough
def test_at_most_one_false_alarm_in_ten_thousand_steps() -> None:
    steps, found = 0, []
    for name in HEALTHY:
        for seed in (1, 2):
            found += [(name, seed, str(each)) for each in run_healthy(name, 1_500, seed)]
            steps += 1_500
    assert len(found) <= steps // 10_000, found


BROKEN = 61  # the step in which a training is broken


@pytest.fixture
def made() -> Made:
    torch.manual_seed(0)
    return gpt()


def adamw(made: Made, **kwargs: Any) -> fusedopt.AdamW:
    return fusedopt.AdamW(made[0].named_parameters(), **{"lr": 3e-3, "max_grad_norm": 1e9, **kwargs})


def first(found: list[Anomaly], *kinds: str) -> int:
    """The step of the first of these, which must come before all others but those that may come with it."""
    assert found, "nothing was found"
    steps = [each.step for each in found if each.kind in kinds]
    assert steps, found
    assert all(each.step >= BROKEN for each in found), found
    return steps[0]


def test_a_learning_rate_thirty_times_too_high(made: Made) -> None:
    found = train(made, adamw(made, lr=1e-2), 81, lambda step: 30.0 if step + 1 >= BROKEN else 1.0, norms_every=1)
    told_by_loss = first(found, "loss_spike", "divergence")
    assert told_by_loss <= BROKEN + 19
    assert first(found, "update_spike") == BROKEN < told_by_loss


def test_a_poisoned_batch(made: Made) -> None:
    found = train(made, adamw(made), 81, disturb=lambda step, loss: loss * 100 if step == BROKEN else loss)
    assert first(found, "loss_spike") == BROKEN
    assert first(found, "exploding_gradients") == BROKEN


def test_a_layer_that_died(made: Made) -> None:
    def kill(step: int, loss: Tensor) -> Tensor:
        if step == BROKEN - 1:  # from the next step on
            made[0].mlp[1] = nn.Threshold(1e9, 0.0)  # as of ReLUs of which all are below 0
        return loss

    found = train(made, adamw(made), 81, disturb=kill)
    assert first(found, "dead_parameters") <= BROKEN + 19
    assert "mlp.0.weight" in next(each.message for each in found if each.kind == "dead_parameters")


def test_weights_that_do_not_move() -> None:
    """Updates far below half the distance of bfloat16 numbers, rounded to nearest."""
    torch.manual_seed(0)
    made = regression()
    made[0].to(torch.bfloat16)

    def loss() -> Tensor:
        return made[0](torch.ones(4, 16, dtype=torch.bfloat16)).float().square().mean()

    found = train((made[0], loss), adamw(made, lr=1e-7), 20)
    assert [each.kind for each in found] == ["stuck_weights"]
    optimizer = adamw(made, lr=1e-7, master_weights="kahan")
    assert train((made[0], loss), optimizer, 20) == []


def test_a_learning_rate_of_0(made: Made) -> None:
    found = train(made, adamw(made), 81, lambda step: 0.0 if step + 1 >= BROKEN else 1.0)
    assert first(found, "zero_lr") <= BROKEN + 19


def test_gradients_that_overflow_float16() -> None:
    torch.manual_seed(0)
    model, loss_of = regression()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", growth_interval=10)
    monitor = Monitor(None, optimizer, scaler=scaler, on_anomaly=None)
    found = []
    for step in range(1, 82):
        optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        if step >= BROKEN:  # what float16 makes of gradients above 65,504
            for param in model.parameters():
                param.grad = param.grad * math.inf
        scaler.step(optimizer)
        scaler.update()
        found += monitor.step(loss)
    assert first(found, "overflow") <= BROKEN + 19


def test_every_kind_is_explained(request: pytest.FixtureRequest) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "training" / "monitor.md"
    rows = [line.split("|")[1].strip(" `") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in KINDS] == list(KINDS)
