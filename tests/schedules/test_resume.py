"""Saved at any step and loaded in a new process, a schedule goes on with the same bits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import get_scheduler
from fusedopt.schedules import (
    Cosine,
    GradientNorm,
    GradientSparsity,
    Greedy,
    Linear,
    Plateau,
    Polynomial,
    constant,
    decay,
    warmup,
)

STEPS = 60
# Nothing is optimized here, which torch's schedulers would remark.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")
LRS = (0.5, 0.03)


def cases() -> dict[str, Any]:
    """Arguments of get_scheduler, without the optimizer."""
    low = {"min_lr_rate": 0.1}
    return {
        "constant": ("constant",),
        "constant_with_warmup": ("constant_with_warmup", 7),
        "linear": ("linear", 7, 40),
        "cosine": ("cosine", 0.1, 40, {"num_cycles": 1.3}),
        "cosine_with_restarts": ("cosine_with_restarts", 7, 40, {"num_cycles": 3}),
        "polynomial": ("polynomial", 7, 40, {"lr_end": 1e-3, "power": 1.7}),
        "inverse_sqrt": ("inverse_sqrt", 7),
        "cosine_with_min_lr": ("cosine_with_min_lr", 7, 40, {"min_lr": 1e-3}),
        "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", 7, 40, low | {"warmup_lr_rate": 0.3}),
        "warmup_stable_decay": ("warmup_stable_decay", 7, 40, {"num_decay_steps": 9, "decay_type": "1-sqrt"}),
        "sequence": (warmup(0.1, "exponential") >> constant() >> decay("1-sqrt", 0.2), None, 50),
        "product": (0.5 * Cosine(3, 40) * Polynomial(0, 50, lr_end=1e-4),),
        "late": (constant(9, 0.1) >> warmup(9, "cosine") >> decay("exponential", 30, end=0.01),),
        "groups": ([Linear(3, 40), warmup(9, "1-sqrt")],),
        "plateau": ("reduce_lr_on_plateau", 7, None, {"patience": 1, "factor": 0.7, "cooldown": 2}),
        "greedy": (warmup(5) >> Greedy(patience=0, smooth=True, window_size=5, min_lr=1e-4, factor=0.9),),
        "gradient_norm": (warmup(5) >> GradientNorm(beta=0.8, recovery=0.7),),
        "gradient_sparsity": (Cosine(3, 55) * GradientSparsity(beta=0.7),),
        "plateau_product": (Cosine(3, 55) * Plateau(patience=0, factor=0.9),),
    }


def make(case: str) -> Any:
    """A scheduler whose optimizer has a Tensor lr in its second group."""
    lrs = (LRS[0], torch.tensor(LRS[1], dtype=torch.float64))
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in lrs]
    return get_scheduler(cases()[case][0], fusedopt.SGD(groups, lr=0.1), *cases()[case][1:])


def measurement(step: int) -> float:
    """In [0, 1], so that it may be a loss, a norm or a fraction of zeros; with spikes and calm stretches."""
    return abs(math.sin(0.7 * step)) ** 3 if step % 20 < 12 else 0.25


def train(scheduler: Any, begin: int, end: int) -> list[list[str]]:
    """The bits of every group's lr at every step."""
    seen = []
    for step in range(begin, end):
        seen.append([float(group["lr"]).hex() for group in scheduler.optimizer.param_groups])
        if not hasattr(scheduler, "rule"):
            scheduler.step()
        else:
            scheduler.step(measurement(step))
            if step % 7 == 0 and not scheduler.rule.measures_gradients:
                scheduler.step()  # as a loop would that evaluates now and then
    return seen


def save(case: str, path: Path, step: int) -> list[list[str]]:
    """Trains up to a step and writes everything down."""
    scheduler = make(case)
    begun = train(scheduler, 0, step)
    torch.save({"optimizer": scheduler.optimizer.state_dict(), "scheduler": scheduler.state_dict()}, path)
    return begun


def resume(case: str, path: Path, step: int) -> list[list[str]]:
    """Goes on from there. The optimizer comes first or last: schedulers must not mind."""
    saved = torch.load(path, weights_only=True)
    scheduler = make(case)
    order = ("optimizer", "scheduler") if step % 2 else ("scheduler", "optimizer")
    for what in order:
        (scheduler if what == "scheduler" else scheduler.optimizer).load_state_dict(saved[what])
    return train(scheduler, step, STEPS)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("case", cases())
def test_resuming_at_any_step_changes_nothing(case: str, every: int, tmp_path: Path) -> None:
    whole = train(make(case), 0, STEPS)
    # A Tensor lr starts at another value than the base lr, or the case would show nothing.
    assert case == "constant" or len({lr for lr, _ in whole}) > 5
    for step in range(0, STEPS, every):
        assert save(case, tmp_path / "saved", step) + resume(case, tmp_path / "saved", step) == whole, step


@pytest.mark.parametrize("case", ["plateau", "greedy", "gradient_norm", "gradient_sparsity"])
def test_rules_bring_their_lr_along_without_the_optimizer(case: str, tmp_path: Path) -> None:
    whole = train(make(case), 0, STEPS)
    save(case, tmp_path / "saved", 33)
    scheduler = make(case)
    scheduler.load_state_dict(torch.load(tmp_path / "saved", weights_only=True)["scheduler"])
    assert train(scheduler, 33, STEPS) == whole[33:]


def test_resuming_in_a_new_process(tmp_path: Path) -> None:
    """All cases at once, saved by one process and gone on with by another."""
    steps = {case: 5 + 2 * i for i, case in enumerate(cases())}
    whole = {case: train(make(case), 0, STEPS) for case in steps}
    begun = {case: save(case, tmp_path / case, step) for case, step in steps.items()}
    code = (
        "import json, pathlib, sys; sys.path.append(sys.argv[3]); import test_resume as t; "
        "folder = pathlib.Path(sys.argv[1]);"
        "print(json.dumps({c: t.resume(c, folder / c, s) for c, s in json.loads(sys.argv[2]).items()}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(steps), str(Path(__file__).parent)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not where the sources of the package are
    ).stdout
    resumed = json.loads(output.splitlines()[-1])
    assert {case: begun[case] + resumed[case] for case in steps} == whole


def test_every_name_is_resumed() -> None:
    named = {arguments[0] for arguments in cases().values() if isinstance(arguments[0], str)}
    rules = {"greedy", "gradient_norm", "gradient_sparsity"}  # composed, above
    assert named | rules == set(fusedopt.schedules.scheduler_names())
