"""Random histories of an optimizer: ours, torch's, and torch's in float64, which judges the two, in lockstep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import saved
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import fusedopt

SHAPES = st.sampled_from([(), (1,), (7,), (3, 5), (64, 70), (2, 3, 4), (0, 4)])
OPTIONS: dict[str, Any] = {
    "AdamW": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 1e-1, 0.0]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    "SGD": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-2, 1.0]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "dampening": st.sampled_from([0.0, 0.1]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    "RMSprop": st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 1e-2]),
            "alpha": st.sampled_from([0.99, 0.5]),
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "eps": st.just(1e-3),
        }
    ),
}
SCHEDULES = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "ConstantLR": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, 4),
}


TRAINING: dict[str, Any] = {
    "count": st.integers(1, 4),
    "seed": st.integers(0, 99),
    "scale": st.sampled_from([1.0, 1e-3, 100.0]),
    "without": st.integers(0, 5),
}


class Run:
    """An optimizer and all that belongs to it."""

    def __init__(self, cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
        self.cls, self.dtype = cls, dtype
        self.is_ours = issubclass(cls, fusedopt.FusedOptimizer)
        self.optimizer: torch.optim.Optimizer
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

    def made(self, values: list[Tensor]) -> dict[str, Any]:
        return {"params": [torch.nn.Parameter(value.to(self.dtype, copy=True)) for value in values]}

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def step(self, max_grad_norm: float | None) -> None:
        if self.is_ours:
            for group in self.optimizer.param_groups:
                group["max_grad_norm"] = max_grad_norm
        elif max_grad_norm is not None:
            with_grads = [param for param in self.params if param.grad is not None]
            kept = [param.grad.clone() for param in with_grads]  # ours are not written to
            torch.nn.utils.clip_grad_norm_(with_grads, max_grad_norm)
        self.optimizer.step()
        if not self.is_ours and max_grad_norm is not None:
            for param, grad in zip(with_grads, kept):
                param.grad = grad
        if self.scheduler is not None:
            self.scheduler.step()


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Histories(RuleBasedStateMachine):
    name: str

    def __init__(self) -> None:
        super().__init__()
        ours, theirs = getattr(fusedopt, self.name), getattr(torch.optim, self.name)
        self.ours, self.theirs = Run(ours, torch.float32), Run(theirs, torch.float32)
        self.runs = [self.ours, self.theirs, Run(theirs, torch.float64)]
        self.steps = 0
        self.clip: float | None = None

    def draw_group(self, data: st.DataObject) -> tuple[list[Tensor], dict[str, Any]]:
        shapes = data.draw(st.lists(SHAPES, min_size=0 if hasattr(self.ours, "optimizer") else 1, max_size=3))
        values = [numbers(shape, seed) for seed, shape in enumerate(shapes, start=data.draw(st.integers(0, 99)))]
        return values, data.draw(OPTIONS[self.name])

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        values, options = self.draw_group(data)
        for run in self.runs:
            run.optimizer = run.cls([run.made(values)], **options)

    @precondition(lambda self: len(self.ours.optimizer.param_groups) < 4 and self.ours.scheduler is None)
    @rule(data=st.data())
    def add_param_group(self, data: st.DataObject) -> None:
        values, options = self.draw_group(data)
        for run in self.runs:
            run.optimizer.add_param_group({**run.made(values), **options})

    @precondition(lambda self: self.ours.params)
    @rule()
    def add_what_is_there(self) -> None:
        for run in self.runs:
            with pytest.raises(ValueError, match="more than one parameter group"):
                run.optimizer.add_param_group({"params": run.params[:1]})

    # Most of what happens is training, so it stands here under several names.
    @rule(**TRAINING)
    def train(self, **drawn: Any) -> None:
        self.take_steps(**drawn)

    @rule(**TRAINING)
    def train_on(self, **drawn: Any) -> None:
        self.take_steps(**drawn)

    @rule(clip=st.sampled_from([0.5, 5.0]), **TRAINING)
    def train_clipped(self, clip: float, **drawn: Any) -> None:
        self.clip = clip
        self.take_steps(**drawn)

    def take_steps(self, count: int, seed: int, scale: float, without: int) -> None:
        """Steps with random gradients; each third parameter from the `without`-th on has none."""
        for step in range(count):
            for i in range(len(self.ours.params)):
                for run in self.runs:
                    param = run.params[i]
                    grad = scale * numbers(param.shape, 1000 * seed + 100 * step + i)
                    param.grad = None if i % 3 == without else grad.to(run.dtype)
            self.step_once()

    @rule()
    def step_once(self) -> None:
        for run in self.runs:
            run.step(self.clip)
        self.steps += 1

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        for run in self.runs:
            run.optimizer.zero_grad(set_to_none=set_to_none)

    @rule()
    def clip_no_more(self) -> None:
        self.clip = None

    @rule(lr=st.sampled_from([1e-3, 3e-2]), as_tensor=st.booleans())
    def set_lr(self, lr: float, as_tensor: bool) -> None:
        if self.ours.scheduler is None:
            for run in self.runs:
                for group in run.optimizer.param_groups:
                    group["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor and run.is_ours else lr

    @rule(kind=st.sampled_from(sorted(SCHEDULES)))
    def schedule(self, kind: str) -> None:
        for run in self.runs:
            for group in run.optimizer.param_groups:
                group.pop("initial_lr", None)
                group["lr"] = float(group["lr"])
            run.scheduler = SCHEDULES[kind](run.optimizer)

    @rule(**TRAINING)
    def reload_in_mid_run(self, **drawn: Any) -> None:
        self.take_steps(**drawn)
        for run in self.runs:
            run.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
        self.take_steps(**drawn)

    @rule(**TRAINING)
    def load_torchs_in_mid_run(self, **drawn: Any) -> None:
        self.take_steps(**drawn)
        self.ours.optimizer.load_state_dict(saved(self.theirs.optimizer.state_dict()))
        with torch.no_grad():
            for param, twin in zip(self.ours.params, self.theirs.params):
                param.copy_(twin)
        self.take_steps(**drawn)

    @rule()
    def load_what_does_not_fit(self) -> None:
        for run in self.runs:
            state_dict = run.optimizer.state_dict()
            state_dict["param_groups"] = [*state_dict["param_groups"], state_dict["param_groups"][0]]
            with pytest.raises(ValueError, match="group"):
                run.optimizer.load_state_dict(state_dict)

    @rule()
    def go_on_with_a_copy(self) -> None:
        for run in self.runs:
            grads = [param.grad for param in run.params]
            run.optimizer, run.scheduler = copy.deepcopy((run.optimizer, run.scheduler))
            for param, grad in zip(run.params, grads):
                param.grad = grad

    @rule()
    def move_state(self) -> None:
        """To another place of the same device, as when it has been away."""
        for run in self.runs:
            for held in run.optimizer.state.values():
                for key, value in held.items():
                    held[key] = value.clone() if isinstance(value, Tensor) else value

    @precondition(lambda self: any(param.grad is not None and param.numel() > 0 for param in self.ours.params))
    @rule()
    def state_of_a_dtype_that_does_not_fit(self) -> None:
        if all(len(held.keys() - {"step"}) == 0 for held in self.ours.optimizer.state.values()):
            return
        for run in self.runs[:2]:
            trial = copy.deepcopy(run)
            for param, original in zip(trial.params, run.params):
                param.grad = None if original.grad is None else original.grad.clone()
            stepped = [param for param in trial.params if param.grad is not None and param.numel() > 0]
            moments = [
                (held, key)
                for held in (trial.optimizer.state.get(param, {}) for param in stepped)
                for key, value in held.items()
                if key != "step" and isinstance(value, Tensor)
            ]
            if not moments:
                return
            for held, key in moments:
                held[key] = held[key].to(torch.int32)
            with pytest.raises((RuntimeError, ValueError)):
                trial.step(None)

    @invariant()
    def ours_errs_no_more_than_torchs(self) -> None:
        if not hasattr(self.ours, "optimizer"):
            return
        for param, theirs, exact in zip(*(run.params for run in self.runs)):
            if param.numel() == 0:
                continue
            errors = [float((found.detach().double() - exact.detach()).abs().max()) for found in (param, theirs)]
            # One of the two may be lucky in a few numbers: twice torch's error, and two roundings for each step.
            rounding = torch.finfo(torch.float32).eps * max(1.0, float(exact.detach().abs().max()))
            assert errors[0] <= 2 * errors[1] + 2 * (self.steps + 1) * rounding, errors


@pytest.mark.filterwarnings(
    "ignore:Seems like `optimizer.step"
)  # a copy of the scheduler does not know the copy's step
@pytest.mark.parametrize("examples", [50, pytest.param(200, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_history_is_torchs(name: str, examples: int) -> None:
    machine = type(name, (Histories,), {"name": name})
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
