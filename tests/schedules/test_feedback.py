"""Rules that are driven by measurements: against torch and transformers, by hand, with a warmup, and their errors."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import fusedopt
from fusedopt import get_scheduler
from fusedopt.schedules import (
    Cosine,
    GradientLR,
    GradientNorm,
    GradientSparsity,
    Greedy,
    Guided,
    MetricLR,
    Plateau,
    constant,
    gradient_sparsity,
    mode_of_metric,
    warmup,
)

BASE = (0.5, 0.02)


def make_optimizer(*lrs: Any, **kwargs: Any) -> fusedopt.SGD:
    groups = [{"params": [torch.nn.Parameter(torch.ones(4))], "lr": lr} for lr in lrs or BASE]
    return fusedopt.SGD(groups, lr=0.1, **kwargs)


def lrs_of(scheduler: LRScheduler) -> list[float]:
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def noisy_losses(seed: int, count: int = 400) -> list[float]:
    """Falls, stalls, rises and has a NaN: everything that a rule distinguishes."""
    random = np.random.default_rng(seed)
    trend = np.concatenate([np.linspace(3, 1, count // 2), np.full(count // 4, 1.0), np.linspace(1, 2, count // 4)])
    losses = trend + 0.2 * random.standard_normal(count)
    losses[count // 3] = math.nan
    return losses.tolist()


PLATEAUS = [
    {"mode": mode, "threshold_mode": kind, "patience": patience, "cooldown": cooldown, "factor": factor, **more}
    for mode, kind, patience, cooldown, factor in itertools.product(
        ("min", "max"), ("rel", "abs"), (0, 3), (0, 2), (0.1, 0.7)
    )
    for more in ({}, {"min_lr": [1e-3, 1e-4], "threshold": 0.05}, {"eps": 1e-3, "min_lr": 1e-3})
]


@pytest.mark.parametrize("kwargs", PLATEAUS, ids=[str(i) for i in range(len(PLATEAUS))])
def test_plateau_has_torchs_bits(kwargs: dict[str, Any]) -> None:
    theirs = ReduceLROnPlateau(make_optimizer(), **kwargs)
    ours = get_scheduler("reduce_lr_on_plateau", make_optimizer(), scheduler_specific_kwargs=kwargs)
    seen = set()
    for loss in noisy_losses(1):
        theirs.step(loss)
        ours.step(metrics=torch.tensor(loss, dtype=torch.float64))
        assert lrs_of(ours) == lrs_of(theirs)
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "in_cooldown"):
            assert getattr(ours, name) == getattr(theirs, name), name
        seen.add(lrs_of(ours)[0])
    assert len(seen) > 2


GREEDY = [
    {"mode": mode, "threshold_mode": kind, "patience": patience, **waits, **more}
    for mode, kind, patience, waits in itertools.product(
        ("min", "max"), ("rel", "abs"), (0, 2), ({}, {"cooldown": 2, "warmup": 3})
    )
    for more in (
        {"min_lr": 1e-4},
        {"smooth": True, "window_size": 7, "min_lr": 0.01},
        {"min_lr": [0.4, 0.01], "max_lr": [0.6, 0.1], "reset_start": 3, "factor": 0.8},
        {"min_lr": 0.02, "reset_start": 0, "factor": 0.5, "smooth": True},
    )
]


@pytest.mark.parametrize("kwargs", GREEDY, ids=[str(i) for i in range(len(GREEDY))])
def test_greedy_has_the_bits_of_transformers(kwargs: dict[str, Any]) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    theirs = optimization.get_scheduler("greedy", make_optimizer(), scheduler_specific_kwargs=kwargs)
    ours = get_scheduler("greedy", make_optimizer(), scheduler_specific_kwargs=kwargs)
    seen = set()
    for loss in noisy_losses(2):
        theirs.step(loss)
        ours.step(loss)
        assert lrs_of(ours) == lrs_of(theirs)
        for name in ("best", "num_bad_epochs", "num_good_epochs", "cooldown_counter", "warmup_counter", "reset_start"):
            assert ours.state[name] == getattr(theirs, name), name
        seen.add(lrs_of(ours)[0])
    assert len(seen) > 2


# transformers' Greedy replaces a tensor by a number.
@pytest.mark.parametrize(
    ("name", "kind"), [("reduce_lr_on_plateau", "float"), ("reduce_lr_on_plateau", "tensor"), ("greedy", "float")]
)
def test_a_rule_alone_changes_the_lr_that_it_finds(name: str, kind: str) -> None:
    """As the original, to the bit: another scheduler warms up meanwhile, and the optimizer comes from a checkpoint."""
    optimization = pytest.importorskip("transformers.optimization")
    kwargs = {"patience": 2, "min_lr": 1e-5}
    optimizers = [make_optimizer(), make_optimizer()]
    schedulers: list[Any] = [None, None]
    for resumes in (False, True):
        for i, optimizer in enumerate(optimizers):
            if kind == "tensor" and not resumes:
                for group in optimizer.param_groups:
                    group["lr"] = torch.tensor(group["lr"])
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 60) if not resumes else None
            before = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
            make = optimization.get_scheduler if i == 0 else get_scheduler
            made = make(name, optimizer, scheduler_specific_kwargs=kwargs)
            assert [group["lr"] for group in optimizer.param_groups] == before
            assert made.get_last_lr() == before
            optimizer.step()
            schedulers[i] = made, warmup
        for loss in noisy_losses(4)[:200]:
            for made, warmup in schedulers:
                made.step(loss)
                if warmup is not None:
                    warmup.step()
            lrs = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
            assert lrs[0] == lrs[1]
        if not resumes:
            for i in range(2):
                fresh = make_optimizer()
                fresh.load_state_dict(optimizers[i].state_dict())
                optimizers[i] = fresh


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_checkpoint_of_theirs_goes_on(name: str) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    kwargs = {"patience": 1, "factor": 0.9, "min_lr": 0.01}
    kwargs |= {"smooth": True, "window_size": 5} if name == "greedy" else {}
    theirs = optimization.get_scheduler(name, make_optimizer(), scheduler_specific_kwargs=kwargs)
    losses = noisy_losses(3)
    for loss in losses[:100]:
        theirs.step(loss)
    min_lr = {"min_lr": 1e-9} if name == "greedy" else {}
    ours = get_scheduler(name, make_optimizer(), scheduler_specific_kwargs=min_lr)
    ours.load_state_dict(theirs.state_dict())
    assert lrs_of(ours) == lrs_of(theirs)
    for loss in losses[100:]:
        theirs.step(loss)
        ours.step(loss)
        assert lrs_of(ours) == lrs_of(theirs)
    other = {"reduce_lr_on_plateau": "greedy", "greedy": "reduce_lr_on_plateau"}[name]
    with pytest.raises(ValueError, match="another kind of scheduler"):
        get_scheduler(other, make_optimizer(), scheduler_specific_kwargs=min_lr or {"min_lr": 1e-9}).load_state_dict(
            theirs.state_dict()
        )


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"),
        ("eval_loss", "min"),
        ("val/perplexity", "min"),
        ("eval_wer", "min"),
        ("accuracy", "max"),
        ("eval_f1", "max"),
        ("eval_rougeL", "max"),
        ("test-top1-acc", "max"),
        ("loss_score", "max"),
    ],
)
def test_the_mode_follows_from_the_metrics_name(metric: str, mode: str) -> None:
    assert mode_of_metric(metric) == Plateau(metric=metric).mode == Greedy(metric=metric).mode == mode
    assert Plateau(metric=metric, mode="max").mode == "max"


def test_a_metric_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="metric='eval_foo' does not say"):
        Plateau(metric="eval_foo")
    assert Plateau(metric="eval_foo", mode="max").mode == "max"


def test_plateau_after_a_warmup_does_not_count_its_steps_as_bad() -> None:
    scheduler = get_scheduler(warmup(4) >> Plateau(patience=1, factor=0.5), make_optimizer(0.8))
    seen = []
    for _ in range(9):
        seen += lrs_of(scheduler)
        scheduler.step(1.0)
    # The best is that of the first; bad ones count from step 4, and the second in a row is one too many for patience 1.
    assert seen == [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 0.8, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("rule", [Greedy(patience=0, factor=0.5), GradientNorm(), GradientSparsity(reference=1.0)])
def test_no_rule_reacts_in_a_warmup(rule: Any) -> None:
    scheduler = get_scheduler(warmup(4) >> rule, make_optimizer(0.8))
    seen = []
    for value in (0.2, 0.1, 0.9, 0.05):
        seen += lrs_of(scheduler)
        scheduler.optimizer.step()
        scheduler.step(value)
    assert seen == [0.0, 0.2, 0.4, 0.6000000000000001]
    assert lrs_of(scheduler) == [0.8]
    scheduler.step(0.99)
    assert lrs_of(scheduler) != [0.8]


def test_get_scheduler_warms_a_rule_up() -> None:
    for name in ("reduce_lr_on_plateau", "gradient_norm"):
        scheduler = get_scheduler(name, make_optimizer(0.8), 0.25, 16)
        assert scheduler.guided == (warmup(4) >> scheduler.rule)
    assert get_scheduler("reduce_lr_on_plateau", make_optimizer(), 0, 16).guided == Guided.of(Plateau())


def test_a_rule_times_a_schedule() -> None:
    schedule = Cosine(0, 10)
    scheduler = get_scheduler(schedule * Plateau(patience=0, factor=0.5), make_optimizer(0.8))
    seen = []
    for loss in (1.0, 0.9, 0.9, 0.8, 0.8):
        seen += lrs_of(scheduler)
        scheduler.step(loss)
    levels = (0.8, 0.8, 0.8, 0.4, 0.4)
    assert seen == [level * schedule(s) for s, level in enumerate(levels)]


def test_evaluations_between_training_steps_are_no_steps_of_their_own() -> None:
    scheduler = get_scheduler(warmup(4) >> Plateau(patience=0, factor=0.5), make_optimizer(0.8))
    for _ in range(3):
        scheduler.step()
        scheduler.step()
        scheduler.step(1.0)
    assert scheduler.last_epoch == 6
    assert lrs_of(scheduler) == [0.2]  # bad after four steps and after six
    scheduler.step(1.0)
    assert scheduler.last_epoch == 7


def test_gradient_norm_by_hand() -> None:
    rule = GradientNorm(beta=0.5, threshold=2.0, recovery=0.5, min_scale=0.25)
    scheduler = get_scheduler(rule, make_optimizer(0.8))
    scheduler.optimizer.step()
    seen = []
    for norm in (1.0, 1.0, 4.0, 1.5, 1.5, math.inf, math.nan, 1.5):
        scheduler.step(norm)
        seen.append((scheduler.state["scale"], scheduler.state["average"]))
        assert lrs_of(scheduler) == [0.8 * scheduler.state["scale"]]
    assert seen[:5] == [(1.0, 1.0), (1.0, 1.0), (0.5, 1.5), (0.75, 1.5), (0.875, 1.5)]
    assert seen[5:] == [(0.25, 1.5), (0.25, 1.5), (0.625, 1.5)]


def test_gradient_sparsity_by_hand() -> None:
    scheduler = get_scheduler(GradientSparsity(beta=0.5, power=2, min_scale=0.1), make_optimizer(0.8))
    scheduler.optimizer.step()
    seen = []
    for zeros in (0.0, 0.5, 1.0, 1.0, 1.0, 0.0):
        scheduler.step(zeros)
        seen.append((scheduler.state["average"], scheduler.state["scale"]))
    assert seen[:3] == [(1.0, 1.0), (0.75, 0.5625), (0.375, 0.140625)]
    assert seen[3:5] == [(0.1875, 0.1), (0.09375, 0.1)]
    assert seen[5] == (0.546875, 0.546875**2)
    opposite = get_scheduler(GradientSparsity(beta=0, power=-1, max_scale=1.5), make_optimizer(0.8))
    opposite.optimizer.step()
    for zeros, scale in ((0.0, 1.0), (0.2, 1.25), (0.9, 1.5), (1.0, 1.5)):
        opposite.step(zeros)
        assert opposite.state["scale"] == scale
    assert GradientSparsity(power=-500, max_scale=2)._scale(1e-3) == 2  # beyond the largest double


def test_measurements_are_taken_from_the_optimizer() -> None:
    optimizer = make_optimizer(0.1, 0.1)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    first.grad, second.grad = torch.tensor([3.0, 0, 0, 0]), torch.tensor([0.0, 4, 0, 0])
    scheduler = get_scheduler("gradient_norm", optimizer)
    optimizer.step()
    scheduler.step()
    assert scheduler.state["average"] == 5
    scheduler = get_scheduler("gradient_sparsity", optimizer)
    scheduler.step()
    assert scheduler.state["average"] == 0.25
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        scheduler.step()
    assert gradient_sparsity([torch.eye(4).to_sparse(), torch.zeros(4)]) == 0.8
    with pytest.raises(ValueError, match="no element"):
        gradient_sparsity([torch.zeros(0)])


def test_the_norm_of_a_step_that_clips_is_not_taken_again() -> None:
    optimizer = make_optimizer(0.1, max_grad_norm=1.0)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.full((4,), 2.0)
    scheduler = get_scheduler("gradient_norm", optimizer)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    assert scheduler.state["average"] == 4


def test_values_and_round_trips() -> None:
    rules = [Plateau(min_lr=[0.1, 0.2]), Greedy(max_lr=(2, 3)), GradientNorm(threshold=3), GradientSparsity(power=1)]
    for rule in rules:
        for guided in (Guided.of(rule), warmup(3) >> rule, Cosine(0, 9) * rule, (warmup(3) >> constant(2)) >> rule):
            again = Guided.from_dict(guided.to_dict())
            assert again == guided
            assert hash(again) == hash(guided)
    assert len({*rules, Plateau()}) == 5
    assert (warmup(0.1) >> Plateau()).resolve(50) == (warmup(5) >> Plateau())


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: Plateau(mode="mean"), ValueError, "mode='mean'"),
    (lambda: Plateau(threshold_mode="relative"), ValueError, "threshold_mode='relative'"),
    (lambda: Plateau(patience=1.5), TypeError, "patience=1.5"),
    (lambda: Plateau(metric=3), TypeError, "metric=3"),
    (lambda: Greedy(smooth=1), TypeError, "smooth=1"),
    (lambda: get_scheduler(Plateau(min_lr=[0.1]), make_optimizer()), ValueError, "min_lr has 1 values for 2"),
    (lambda: get_scheduler(Greedy(min_lr=0.1), make_optimizer()), ValueError, "min_lr=0.1 .* param group 1"),
    (lambda: get_scheduler(Greedy(max_lr=0.1), make_optimizer()), ValueError, "max_lr=0.1 .* param group 0"),
    (lambda: get_scheduler("greedy", make_optimizer(), None, None, {"smoth": True}), TypeError, "mean 'smooth'"),
    (lambda: constant() >> Plateau(), ValueError, "no end"),
    (lambda: get_scheduler("gradient_norm", make_optimizer()).step(-1.0), ValueError, "norm -1.0"),
    (lambda: get_scheduler("gradient_sparsity", make_optimizer()).step(1.5), ValueError, "sparsity 1.5"),
    (lambda: get_scheduler("greedy", make_optimizer()).step(), ValueError, "lacks its measurement"),
    (lambda: MetricLR(make_optimizer(), 3), TypeError, "guided=3"),
    (lambda: Guided.from_dict({"name": "cosine"}), ValueError, "guided"),
    (lambda: Guided(3, Plateau()), TypeError, "schedule=3"),
    (lambda: Guided(Cosine(0, 9), 3), TypeError, "rule=3"),
]


@pytest.mark.parametrize("row", range(len(BAD)))
def test_errors_are_sentences(row: int) -> None:
    make, error, message = BAD[row]
    with pytest.raises(error, match=message):
        make()


def test_state_of_another_rule_is_refused() -> None:
    scheduler = get_scheduler("gradient_norm", make_optimizer())
    for name in ("gradient_sparsity", "reduce_lr_on_plateau", "constant"):
        with pytest.raises(ValueError, match="the state_dict is of"):
            scheduler.load_state_dict(get_scheduler(name, make_optimizer()).state_dict())


def test_greedy_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = get_scheduler(Greedy(patience=0, factor=0.5, verbose=True), make_optimizer(0.2))
    scheduler.step(1.0)
    scheduler.step(math.nan)
    assert capsys.readouterr().out.splitlines() == [
        "step 1: the lr goes from [0.2] to [0.4]",
        "step 2: the lr goes from [0.4] to [0.2]",
    ]


def test_gradient_rules_go_into_torchs_containers_and_metric_rules_are_plateaus() -> None:
    optimizer = make_optimizer(0.8)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    parts = [get_scheduler("gradient_norm", optimizer), get_scheduler("linear", optimizer, 0, 4)]
    assert isinstance(parts[0], GradientLR)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
    optimizer.step()
    for lr in (0.8, 0.8, 0.6):
        scheduler.step()
        assert lrs_of(scheduler) == [pytest.approx(lr, rel=1e-15)]
    assert isinstance(get_scheduler("greedy", optimizer), ReduceLROnPlateau)
