"""Adafactor against transformers', torch's, and the formula in float64."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import assert_same_bits, assert_same_run, make_params, set_grads, train
from transformers.optimization import Adafactor as Transformers
from transformers.optimization import AdafactorSchedule as TransformersSchedule

import fusedopt
from fusedopt import Adafactor
from fusedopt.engine.gather import Gathered
from fusedopt.reference import factored
from fusedopt.reference.norm import pairwise_sum, square_sums

sys.path.append(str(Path(__file__).resolve().parents[1]))
from bench.workloads import WORKLOADS

SHAPES = [(300,), (), (33, 20), (200, 64), (3, 5, 70), (8, 4, 3, 3)]
EXTERNAL = {"lr": 1e-2, "relative_step": False}


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    memory = io.BytesIO()
    torch.save(state_dict, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def copied(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


# ---- the formula -------------------------------------------------------------------------------------


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def as_matrices(shape: tuple[int, ...], fold: bool) -> tuple[int, ...]:
    return (shape[0], math.prod(shape[1:])) if fold and len(shape) > 2 else shape


def formula(shape: tuple[int, ...], kwargs: dict[str, Any], momentum_has_lr: bool = False) -> Iterator[Callable]:
    """The paper's algorithms 4 and 5 in float64, with transformers' defaults: a generator of steps."""
    k = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None, "weight_decay": 0.0}
    k = {**k, "scale_parameter": True, "relative_step": True, "warmup_init": False, "lr": None, **kwargs}
    row = col = v = m = 0.0
    shape = as_matrices(shape, k.get("fold_conv", False))
    t = 0
    while True:
        t += 1

        def step(p: torch.Tensor, g: torch.Tensor, t: int = t) -> torch.Tensor:
            nonlocal row, col, v, m
            q, g = p.reshape(shape), g.reshape(shape)
            alpha = min(1e-6 * t if k["warmup_init"] else 1e-2, t**-0.5) if k["relative_step"] else k["lr"]
            if k["scale_parameter"]:
                alpha *= max(k["eps"][1], rms(q))
            beta2 = 1 - t ** k["decay_rate"]
            square = g * g + k["eps"][0]
            if g.dim() > 1:
                row = beta2 * row + (1 - beta2) * square.mean(-1, keepdim=True)
                col = beta2 * col + (1 - beta2) * square.mean(-2, keepdim=True)
                estimate = row * col / row.mean(-2, keepdim=True)
            else:
                estimate = v = beta2 * v + (1 - beta2) * square
            u = g / estimate.sqrt()
            u = u / max(1.0, rms(u) / k["clip_threshold"])
            q = q * (1 - alpha * k["weight_decay"])
            if k["beta1"] is None:
                return (q - alpha * u).reshape(p.shape)
            m = k["beta1"] * m + (1 - k["beta1"]) * (alpha * u if momentum_has_lr else u)
            return (q - (m if momentum_has_lr else alpha * m)).reshape(p.shape)

        yield step


def torchs_formula(shape: tuple[int, ...], kwargs: dict[str, Any]) -> Iterator[Callable]:
    """The same as torch's documentation has it."""
    k = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0, "weight_decay": 0.0, **kwargs}
    eps = torch.finfo(torch.float32).eps if k["eps"][0] is None else k["eps"][0]
    row = col = v = 0.0
    t = 0
    while True:
        t += 1

        def step(p: torch.Tensor, g: torch.Tensor, t: int = t) -> torch.Tensor:
            nonlocal row, col, v
            alpha = max(k["eps"][1], rms(p)) * min(k["lr"], t**-0.5)
            beta2 = 1 - t ** k["beta2_decay"]
            p = p * (1 - k["lr"] * k["weight_decay"])
            if g.dim() > 1:
                row = beta2 * row + (1 - beta2) * (g * g).mean(-1, keepdim=True)
                col = beta2 * col + (1 - beta2) * (g * g).mean(-2, keepdim=True)
                estimate = row * col / row.mean(-2, keepdim=True).clamp(min=eps)
            else:
                estimate = v = beta2 * v + (1 - beta2) * g * g
            u = g / estimate.sqrt().clamp(min=eps)
            return p - alpha / max(1.0, rms(u) / k["d"]) * u

        yield step


def errors(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, formulas: list[Iterator[Callable]], steps: int
) -> tuple[float, float]:
    """The rms error of each run over all elements, against the formula."""
    params, twins = (o.param_groups[0]["params"] for o in (ours, theirs))
    exact = [param.detach().double() for param in params]
    for step in range(steps):
        set_grads(params, step)
        for param, twin in zip(params, twins):
            twin.grad = param.grad.clone()
        exact = [next(f)(p, param.grad.double()) for f, p, param in zip(formulas, exact, params)]
        ours.step()
        theirs.step()
    judge = torch.cat([p.flatten() for p in exact])
    return tuple(rms(torch.cat([p.detach().flatten() for p in run]) - judge) for run in (params, twins))


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"warmup_init": True, "clip_threshold": 0.5},
        {**EXTERNAL, "weight_decay": 0.1, "decay_rate": -0.5},
    ],
    ids=["relative", "warmup", "external"],
)
def test_error_is_that_of_transformers(how: dict, scale_parameter: bool, beta1: float | None) -> None:
    kwargs = {**how, "scale_parameter": scale_parameter, "beta1": beta1}
    params = make_params(SHAPES, torch.float32)
    theirs = Transformers(copied(params), **kwargs)
    formulas = [formula(shape, kwargs, momentum_has_lr=True) for shape in SHAPES]
    ours, others = errors(Adafactor(params, **kwargs, compat=True), theirs, formulas, 50)
    assert 0 < ours <= 1.1 * others


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"lr": 1e-3, "weight_decay": 0.1, "beta2_decay": -0.5, "d": 2.0}, {"lr": 0.5, "eps": (1e-2, 2.0)}],
    ids=["default", "knobs", "eps"],
)
def test_error_is_that_of_torchs(kwargs: dict) -> None:
    params = make_params(SHAPES, torch.float32)
    theirs = torch.optim.Adafactor(copied(params), **kwargs, foreach=False)
    formulas = [torchs_formula(shape, kwargs) for shape in SHAPES]
    ours, others = errors(Adafactor(params, variant="torch", **kwargs), theirs, formulas, 50)
    assert 0 < ours <= 1.1 * others


@pytest.mark.parametrize("kwargs", [{"beta1": 0.9}, {"fold_conv": True}], ids=["momentum", "fold"])
def test_what_others_do_not_have_follows_the_formula(kwargs: dict) -> None:
    """The corrected momentum and folded convolutions, in float64 and, to some ulps, in float32."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        params = make_params(SHAPES, dtype)
        exact = [param.detach().double() for param in params]
        formulas = [formula(shape, kwargs) for shape in SHAPES]
        optimizer = Adafactor(params, **kwargs)
        for step in range(20):
            set_grads(params, step)
            exact = [next(f)(p, param.grad.double()) for f, p, param in zip(formulas, exact, params)]
            optimizer.step()
        for param, value in zip(params, exact):
            torch.testing.assert_close(param.detach().double(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_16_bit_parameters_follow_the_others(variant: str) -> None:
    """Torch's epsilon is that of the parameter's dtype: of a bfloat16, 2**-7, which some gradients are below."""
    params = make_params([(40, 30), (50,)], torch.bfloat16)
    cls = Transformers if variant == "transformers" else torch.optim.Adafactor
    # torch computes in the parameter's dtype, so its judge is itself in float32, with that epsilon
    kwargs = {} if variant == "transformers" else {"eps": (2.0**-7, 1e-3)}
    twins = [torch.nn.Parameter(p.detach().float()) for p in params] if kwargs else copied(params)
    ours, theirs = (
        Adafactor(params, variant=variant, master_weights="float32" if kwargs else None),
        cls(twins, **kwargs),
    )
    for step in range(3):
        set_grads(params, step, scale=1e-2)
        for param, twin in zip(params, twins):
            twin.grad = param.grad.to(twin.dtype)
        ours.step()
        theirs.step()
    for param, twin in zip(params, twins):
        value = ours.state[param]["master"] if kwargs else param
        torch.testing.assert_close(value, twin.detach(), rtol=1e-2 if not kwargs else 1e-6, atol=1e-6)


# ---- what is not as with transformers ----------------------------------------------------------------


def test_parameters_stop_when_the_learning_rate_is_0() -> None:
    for compat in (False, True):
        optimizer = train(Adafactor(make_params(SHAPES, torch.float32), **EXTERNAL, beta1=0.9, compat=compat), 3)
        params = optimizer.param_groups[0]["params"]
        before = [param.detach().clone() for param in params]
        optimizer.param_groups[0]["lr"] = 0.0
        train(optimizer, 2, first=3)
        assert all(torch.equal(p, value) for p, value in zip(params, before)) == (not compat)


@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_empty_parameters_count_steps_only(variant: str) -> None:
    params = make_params([(0,), (3, 0), (0, 3), (2, 0, 3), (5, 4)], torch.float32)
    optimizer = train(Adafactor(params, variant=variant), 2)
    assert all(optimizer.state[param]["step"] == 2 for param in params)
    assert params[-1].isfinite().all()
    assert all(value.isfinite().all() for held in optimizer.state.values() for value in held.values())


def test_closures_run_with_gradients() -> None:
    params = make_params([(4, 3)], torch.float32)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    optimizer = Adafactor(params)
    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_state_stays_float32_when_it_is_reloaded(beta1: float | None) -> None:
    optimizer = train(Adafactor(make_params(SHAPES, torch.bfloat16), beta1=beta1, state_dtype="bfloat16"), 3)
    resumed = Adafactor(make_params(SHAPES, torch.bfloat16))
    for param, twin in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"]):
        twin.data.copy_(param.data)
    state_dict = saved(optimizer.state_dict())
    resumed.load_state_dict(state_dict)
    assert_same_run(resumed, optimizer)
    for held in resumed.state.values():
        for key, value in held.items():
            assert value.dtype == (torch.bfloat16 if key == "exp_avg" else torch.float32), key
    # state that was rounded by another loader is float32 again
    for held in state_dict["state"].values():
        held.update({key: value.bfloat16() for key, value in held.items() if key != "step"})
    resumed.load_state_dict(state_dict)
    assert all(v.dtype == torch.float32 for h in resumed.state.values() for k, v in h.items() if "_sq" in k)


# ---- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"beta1": 0.9, **EXTERNAL}], ids=["relative", "momentum"])
def test_a_run_of_transformers_is_continued_and_goes_back(kwargs: dict) -> None:
    theirs = train(Transformers(make_params(SHAPES, torch.float32), **kwargs), 4)
    ours = Adafactor(copied(theirs.param_groups[0]["params"]), compat=True)
    ours.load_state_dict(saved(theirs.state_dict()))
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        held = theirs.state[twin]
        assert ours.state[param].keys() == held.keys() - {"RMS"}
        for key, value in ours.state[param].items():
            assert torch.equal(value, torch.tensor(4.0) if key == "step" else held[key])
    for name, value in theirs.param_groups[0].items():
        assert name == "params" or ours.param_groups[0][name] == value
    back = Transformers(copied(theirs.param_groups[0]["params"]))
    back.load_state_dict(saved(ours.state_dict()))
    for run in (ours, theirs, back):
        train(run, 3, first=4)
    for param, *twins in zip(*(run.param_groups[0]["params"] for run in (ours, theirs, back))):
        for twin in twins:
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_run_with_the_schedule_of_transformers_is_continued() -> None:
    """Which leaves in the param groups what it reports."""
    theirs = Transformers(make_params(SHAPES, torch.float32), warmup_init=True)
    schedule = TransformersSchedule(theirs)
    train(theirs, 1)
    schedule.step()
    state_dict = saved(theirs.state_dict())
    assert state_dict["param_groups"][0]["lr"] > 0
    ours = Adafactor(copied(theirs.param_groups[0]["params"]))
    ours.load_state_dict(state_dict)
    assert ours.param_groups[0]["lr"] is None
    train(ours, 1, first=1)
    train(theirs, 1, first=1)
    for param, twin in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_run_of_torch_is_continued() -> None:
    theirs = train(torch.optim.Adafactor(make_params(SHAPES, torch.float32), lr=0.1, beta2_decay=-0.5, d=2.0), 4)
    ours = Adafactor(copied(theirs.param_groups[0]["params"]), variant="torch")
    ours.load_state_dict(saved(theirs.state_dict()))
    (group,) = ours.param_groups
    assert (group["lr"], group["decay_rate"], group["clip_threshold"]) == (0.1, -0.5, 2.0)
    assert not {"d", "beta2_decay"} & group.keys()
    train(ours, 3, first=4)
    train(theirs, 3, first=4)
    for param, twin in zip(group["params"], theirs.param_groups[0]["params"]):
        assert not {"row_var", "col_var", "variance"} & ours.state[param].keys()
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
    other = Adafactor(make_params(SHAPES, torch.float32))
    with pytest.raises(ValueError, match="is a knob of torch's; pass variant='torch'"):
        other.load_state_dict(saved(theirs.state_dict()))
    assert not other.state


LOW = {
    "beta1": 0.9,
    "state_dtype": "8bit",
    "min_quantized_numel": 1,
    "master_weights": "split24",
    "rounding": "stochastic",
    "seed": 3,
}


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("kwargs", [{}, {**LOW, "fold_conv": True}], ids=["default", "low"])
def test_copies_continue_bit_for_bit(kwargs: dict, how: str) -> None:
    optimizer = train(Adafactor(make_params([*SHAPES, (64, 65)], torch.bfloat16), **kwargs), 4)
    if how == "state_dict":
        twin = Adafactor(copied(optimizer.param_groups[0]["params"]))
        twin.load_state_dict(saved(optimizer.state_dict()))
    else:
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    train(optimizer, 3, first=4)
    train(twin, 3, first=4)
    assert_same_run(optimizer, twin)
    assert ("exp_avg_codes" in optimizer.state[optimizer.param_groups[0]["params"][-1]]) == bool(kwargs)


def test_a_state_of_another_layout_is_refused() -> None:
    params = [(8, 4, 3, 3)]
    folded = train(Adafactor(make_params(params, torch.float32), fold_conv=True), 1).state_dict()
    folded["param_groups"][0]["fold_conv"] = False
    with pytest.raises(ValueError, match=r"'exp_avg_sq_row' of shape \(8,\); it must be .* \(8, 4, 3\)"):
        Adafactor(make_params(params, torch.float32)).load_state_dict(folded)


# ---- layouts -----------------------------------------------------------------------------------------


def test_shapes_of_the_states() -> None:
    params = make_params(SHAPES, torch.float16)
    optimizer = train(Adafactor(params, beta1=0.9), 1)
    folded = train(Adafactor(copied(params), fold_conv=True), 1)
    for param, twin in zip(params, folded.param_groups[0]["params"]):
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[param].items()}
        if param.dim() < 2:
            assert shapes == {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
            continue
        row, col = param.shape[:-1], (*param.shape[:-2], param.shape[-1])
        assert shapes == {"step": (), "exp_avg": param.shape, "exp_avg_sq_row": row, "exp_avg_sq_col": col}
        held = folded.state[twin]
        assert held["exp_avg_sq_row"].shape == (row if param.dim() == 2 else param.shape[:1])
        assert held["exp_avg_sq_col"].shape == (col if param.dim() == 2 else (param.shape[1:].numel(),))


@pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")
def test_each_parameter_of_a_mixed_group_steps_as_alone() -> None:
    optimizer = train(Adafactor(make_params(SHAPES, torch.bfloat16), **LOW), 3)
    for i, param in enumerate(optimizer.param_groups[0]["params"]):
        params = make_params(SHAPES, torch.bfloat16)
        alone = Adafactor([params[i]], **LOW)
        for step in range(3):
            set_grads(params, step)
            alone.step()
        assert_same_bits(param, params[i])


def test_norm_is_taken_in_list_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over layouts and groups, as another optimizer takes it."""
    params = make_params([*SHAPES, (7000,), (70, 70)], torch.float32)
    seen = []

    def spy(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums)
        return pairwise_sum(sums)

    monkeypatch.setattr(fusedopt.engine.gather, "pairwise_sum", spy)
    for cls in (Adafactor, fusedopt.AdamW):
        train(cls([{"params": params[:3]}, {"params": params[3:]}], max_grad_norm=0.1), 1)
    assert len(seen[0]) > len(params)
    assert_same_bits(*seen)


def test_health_is_counted_by_parameter() -> None:
    params = make_params([(3,), (4, 5), (6,)], torch.float32)
    optimizer = Adafactor(params)
    optimizer.record_health()
    set_grads(params, 0)
    params[2].grad[1] = float("nan")
    optimizer.step()
    counts = optimizer.health_report().by_parameter
    assert {name: c["nonfinite_grads"] for name, c in counts.items()} == {"0.0": 0, "0.1": 0, "0.2": 1}


def test_memory_of_gpt2() -> None:
    # Without values: only shapes count.
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in WORKLOADS["W2"].shapes()]
    report = Adafactor(params, state_dtype="8bit").memory_report()
    assert report.numel == WORKLOADS["W2"].numel
    assert report.state_bytes / report.numel <= 0.02
    assert report.unquantized.keys() == {"Adafactor's second moments are few numbers, or those of a vector"}
    assert Adafactor(params, state_dtype="8bit", beta1=0.9).memory_report().bytes_per_param["exp_avg"] < 1.02


def test_memory_report_counts_the_bytes_that_are_there() -> None:
    optimizer = Adafactor(make_params(SHAPES, torch.bfloat16), beta1=0.9, fold_conv=True)
    planned = optimizer.memory_report()
    train(optimizer, 1)
    held = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert optimizer.memory_report() == planned
    assert planned.state_bytes == sum(v.numel() * v.element_size() for v in held)


def test_a_compiled_step_knows_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a backend may ask: which are signed, and what they extend over."""
    seen = []
    monkeypatch.setattr(
        fusedopt.engine.compiled,
        "Gathered",
        lambda sessions, groups, *rest: seen.append(groups) or Gathered(sessions, groups, *rest),
    )
    torch.compiler.reset()
    params = make_params([(3,), (2, 3, 4)], torch.float32)
    optimizer = Adafactor([{"params": params[:1]}, {"params": params[1:], "fold_conv": True, "beta1": 0.9}])
    set_grads(params, 0)
    torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)()
    groups, _ = fusedopt.engine.members.parts(optimizer)
    assert len(seen[0]) == len(groups) == 4
    for ours, theirs in zip(seen[0], groups):
        assert (ours.rule, ours.layout, ours.param_group) == (theirs.rule, theirs.layout, theirs.param_group)
        assert ours.hyper.keys() == theirs.hyper.keys()
        assert [dataclasses.replace(spec, always_float32="") for spec in theirs.states] == list(ours.states)


@pytest.mark.parametrize("kwargs", [{}, {**EXTERNAL, "beta1": 0.9, "max_grad_norm": 0.1}], ids=["relative", "external"])
def test_compiled_steps_have_the_same_bits(kwargs: dict) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    runs = []
    for is_compiled in (False, True):
        groups = [
            {"params": make_params([(16, 8), (16,), (3, 30)], torch.float32)},
            {"params": make_params([(7,), (2, 3, 4)], torch.bfloat16), "fold_conv": True},
        ]
        if "lr" in kwargs:
            kwargs = {**kwargs, "lr": torch.tensor(0.01)}
        optimizer = Adafactor(groups, **kwargs)
        params = [param for group in optimizer.param_groups for param in group["params"]]

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        take = torch.compile(step, backend=counter, fullgraph=True) if is_compiled else step
        for i in range(5):
            set_grads(params, i)
            take()
            if "lr" in kwargs:
                optimizer.param_groups[0]["lr"].mul_(0.9)
        runs.append(optimizer)
    assert_same_run(*runs)
    assert counter.frame_count == 1
    if "max_grad_norm" in kwargs:
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": 0.1}, ValueError, r"lr=0\.1 together with relative_step=True.*pass scale_parameter=False and relative"),
        ({"lr": -0.1}, ValueError, r"lr=-0\.1 is negative"),
        ({"lr": "1", "relative_step": False}, TypeError, "lr='1' is a str"),
        ({"relative_step": False}, ValueError, "lr=None with relative_step=False leaves no learning rate; pass lr"),
        ({**EXTERNAL, "warmup_init": True}, ValueError, "warmup_init=True with relative_step=False"),
        ({"decay_rate": 0.8}, ValueError, r"decay_rate=0\.8 would not average.*pass a number < 0"),
        ({"decay_rate": 0}, ValueError, r"decay_rate=0\.0 would not average"),
        ({"beta1": 1.0}, ValueError, r"beta1=1\.0 is outside \[0, 1\)"),
        ({"beta1": -0.1}, ValueError, r"beta1=-0\.1 is outside"),
        ({"clip_threshold": 0}, ValueError, "clip_threshold=0 would make every update zero"),
        ({"clip_threshold": -1}, ValueError, r"clip_threshold=-1\.0 is negative"),
        ({"eps": 1e-8}, ValueError, "eps=1e-08 must be a pair; pass for example"),
        ({"eps": (1e-8,)}, ValueError, r"eps=\(1e-08,\) must be a pair"),
        ({"eps": (-1.0, 1e-3)}, ValueError, r"eps\[0\]=-1\.0 is negative"),
        ({"eps": (1e-30, -1.0)}, ValueError, r"eps\[1\]=-1\.0 is negative"),
        ({"eps": (None, 1e-3)}, ValueError, "has None, which only variant='torch' takes"),
        ({"weight_decay": -1}, ValueError, r"weight_decay=-1\.0 is negative"),
        ({"scale_parameter": 1}, TypeError, "scale_parameter=1 is a int; pass True or False"),
        ({"variant": "fairseq"}, ValueError, "variant='fairseq' is not known; pass one of 'transformers', 'torch'"),
        ({"d": 2.0}, ValueError, r"d=2\.0 is a knob of torch's; pass variant='torch' with it, or clip_threshold"),
        ({"beta2_decay": -0.5}, ValueError, "or decay_rate instead"),
        (
            {"variant": "torch", "d": 2.0, "clip_threshold": 3.0},
            ValueError,
            r"d=2\.0 and clip_threshold=3\.0 are the s",
        ),
        ({"variant": "torch", "compat": True}, ValueError, "compat=True is no knob of variant='torch'; leave it out"),
        ({"variant": "torch", "warmup_init": True}, ValueError, "warmup_init=True is no knob"),
        ({"variant": "torch", "beta1": 0.9}, ValueError, r"beta1=0\.9 is no knob"),
        ({"variant": "torch", "relative_step": False}, ValueError, "relative_step=False is no knob"),
        ({"variant": "torch", "scale_parameter": False}, ValueError, "scale_parameter=False is no knob"),
        ({"state_dtype": {"exp_avg_sq_row": "bfloat16"}}, ValueError, "'bfloat16' is not possible: Adafactor's second"),
        ({"state_dtype": {"exp_avg_sq": "8bit"}}, ValueError, "'8bit' is not possible: Adafactor's second"),
        ({"betas": (0.9, 0.99)}, TypeError, r"unknown argument betas=\(0\.9, 0\.99\)"),
    ],
)
def test_bad_knobs(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Adafactor(make_params([(3,)], torch.float32), **kwargs)
    if error is ValueError:  # the same in a group
        variant = "torch" if kwargs.get("variant") == "torch" else "transformers"
        optimizer = Adafactor(make_params([(3,)], torch.float32), variant=variant)
        if "d" in kwargs and "clip_threshold" in kwargs:
            return  # a group has our name for it from the defaults in any case
        message = "variant='fairseq' in a group" if kwargs.get("variant") == "fairseq" else message
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": make_params([(4,)], torch.float32), **kwargs})
        assert len(optimizer.param_groups) == 1


def test_groups_of_their_own_settings() -> None:
    params = make_params([(3,), (4, 5)], torch.float32)
    optimizer = Adafactor([{"params": params[:1], **EXTERNAL}, {"params": params[1:], "beta1": 0.5}])
    train(optimizer, 1)
    assert [list(optimizer.state[param]) for param in params] == [
        ["step", "exp_avg_sq"],
        ["step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"],
    ]
    torchs = Adafactor([{"params": params[:1], "d": 2.0}, {"params": params[1:], "lr": None}], variant="torch")
    assert [(g["clip_threshold"], g["lr"], "d" in g) for g in torchs.param_groups] == [
        (2.0, 1e-2, False),
        (1.0, 1e-2, False),
    ]


def test_a_learning_rate_that_a_scheduler_wrote_stops_the_step() -> None:
    optimizer = train(Adafactor(make_params([(3,)], torch.float32)), 1)
    twin = copy.deepcopy(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match=r"lr=0\.1 together with relative_step=True"):
        train(optimizer, 1, first=1)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"lr=.* together with relative_step=True"):
        torch.compile(lambda: optimizer.step(), backend="aot_eager")()
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("kwargs", [{}, {"variant": "torch"}, {**EXTERNAL, "beta1": 0.9}], ids=["own", "torch", "lr"])
def test_state_is_made_for_a_distributed_checkpoint(kwargs: dict) -> None:
    """By a step with gradients of 0 and lr 0, which weight decay must not see either."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    models, optimizers = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(torch.nn.Linear(5, 4))
        optimizers.append(Adafactor(models[-1].parameters(), weight_decay=0.1, **kwargs))
    train(optimizers[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    before = [param.detach().clone() for param in models[1].parameters()]
    state_dict = get_optimizer_state_dict(models[0], optimizers[0])
    set_optimizer_state_dict(models[1], optimizers[1], state_dict)
    assert all(torch.equal(param, value) for param, value in zip(models[1].parameters(), before))
    assert optimizers[1].param_groups[0]["lr"] == kwargs.get("lr", 1e-2 if kwargs else None)
    for optimizer in optimizers:
        train(optimizer, 1, first=2)
    assert_same_run(*optimizers)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_complex_parameters_are_refused(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = Adafactor([param], backend=backend)
    with pytest.raises(ValueError, match=r"its dtype is torch\.complex64, for which Adafactor is not defined"):
        optimizer.step()
    assert not optimizer.state


def test_sharded_parameters_are_refused_and_replicated_ones_stepped() -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        (plain,) = make_params([(6, 4)], torch.float32)
        set_grads([plain], 0)

        def placed(placement: Any, tensor: torch.Tensor) -> DTensor:
            rows = slice(0, 3) if placement == Shard(0) else slice(None)
            return DTensor.from_local(tensor.detach()[rows].clone(), mesh, [placement], run_check=False)

        sharded, replicated = (torch.nn.Parameter(placed(p, plain)) for p in (Shard(0), Replicate()))
        sharded.grad, replicated.grad = placed(Shard(0), plain.grad), placed(Replicate(), plain.grad)
        with pytest.raises(ValueError, match=r"is a sharded DTensor, and Adafactor's means.*use Replicate"):
            Adafactor([sharded]).step()
        ours, theirs = Adafactor([replicated]), Adafactor([plain])
        ours.step()
        theirs.step()
        assert_same_bits(replicated.to_local(), plain)
        for key, value in theirs.state[plain].items():
            held = ours.state[replicated][key]
            assert_same_bits(held.to_local() if isinstance(held, DTensor) else held, value)
            assert held.shape == value.shape
    finally:
        torch.distributed.destroy_process_group()


def test_packages_that_have_no_such_states_are_refused() -> None:
    optimizer = train(Adafactor(make_params([(64, 64)], torch.float32)), 1)
    for convert in (fusedopt.to_bitsandbytes, fusedopt.to_torchao):
        with pytest.raises((ValueError, ImportError), match=r"exp_avg_sq_row|is written with"):
            convert(optimizer)
    dense = fusedopt.to_torch_state_dict(optimizer)
    twin = Adafactor(make_params([(64, 64)], torch.float32))
    twin.load_state_dict(saved(dense))
    for held, other in zip(optimizer.state.values(), twin.state.values()):
        assert held.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in held.items())


# ---- presets and the schedule ------------------------------------------------------------------------


def test_presets() -> None:
    params = make_params([(3,)], torch.float32)
    t5 = fusedopt.recommended_adafactor(params).defaults
    assert (t5["lr"], t5["scale_parameter"], t5["relative_step"], t5["warmup_init"]) == (None, True, True, True)
    external = fusedopt.recommended_adafactor(params, "external_lr", lr=1e-4, beta1=0.9).defaults
    assert (external["lr"], external["beta1"], external["clip_threshold"]) == (1e-4, 0.9, 1.0)
    assert not external["scale_parameter"] | external["relative_step"] | external["warmup_init"]
    assert fusedopt.recommended_adafactor(params, "external_lr").defaults["lr"] == 1e-3
    with pytest.raises(ValueError, match="preset='t6' is not known; pass one of 't5', 'external_lr'"):
        fusedopt.recommended_adafactor(params, "t6")
    with pytest.raises(ValueError, match="together with relative_step=True"):
        fusedopt.recommended_adafactor(params, "t5", lr=1e-3)


@pytest.mark.parametrize("master", [None, "split32"])
def test_schedule_reports_the_learning_rates_and_changes_nothing(master: str | None) -> None:
    def groups() -> list[dict[str, Any]]:
        params = make_params([(20, 30), (7,), (5, 5), (3,)], torch.bfloat16)
        return [
            {"params": params[:2], "warmup_init": True},
            {"params": params[2:3], **EXTERNAL, "scale_parameter": False},
            {"params": params[3:], "scale_parameter": False},
        ]

    optimizer, plain = Adafactor(groups(), master_weights=master), Adafactor(groups(), master_weights=master)
    before = [dict(group) for group in optimizer.param_groups]
    schedule = fusedopt.AdafactorSchedule(optimizer, initial_lr=0.5)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.get_last_lr() == [0.5, 0.5, 0.5]
    for step in range(4):
        train(optimizer, 1, first=step)
        schedule.step()
    train(plain, 4)
    assert_same_run(optimizer, plain)
    assert before == [dict(group) for group in optimizer.param_groups]
    params = [group["params"][0] for group in optimizer.param_groups]
    weights = params[0].detach().float()
    if master:
        held = optimizer.state[params[0]]["master_low"]
        weights = fusedopt.reference.master.join(master, params[0].detach(), held)
    assert schedule.get_last_lr() == pytest.approx([4e-6 * rms(weights), 1e-2, 1e-2], rel=1e-12)
    # through a checkpoint, into a new process
    resumed = fusedopt.AdafactorSchedule(copy.deepcopy(optimizer))
    resumed.load_state_dict(saved(schedule.state_dict()))
    assert (resumed.last_epoch, resumed.initial_lr) == (4, 0.5)
    assert resumed.get_last_lr() == schedule.get_last_lr()


def test_schedule_of_torchs_variant_and_of_another_optimizer() -> None:
    params = make_params([(4, 4)], torch.float32)
    optimizer = train(Adafactor(params, variant="torch", lr=0.4), 25)
    assert optimizer.actual_lrs() == pytest.approx([0.2 * rms(params[0])], rel=1e-12)
    with pytest.raises(TypeError, match=r"optimizer is a SGD.*pass a fusedopt\.Adafactor"):
        fusedopt.AdafactorSchedule(fusedopt.SGD(params))


def test_schedulers_drive_an_external_learning_rate() -> None:
    optimizer = Adafactor(make_params([(4, 4)], torch.float32), **EXTERNAL)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3


# ---- sums --------------------------------------------------------------------------------------------


def pairs(values: list[float]) -> float:
    while len(values) > 1:
        values = [sum(values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def lanes(row: list[float]) -> float:
    totals = [0.0] * 16
    for i, value in enumerate(row):
        totals[i % 16] += value
    return pairs(totals)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 4096), (5, 9000), (161, 33), (641, 17), (22000, 3)])
def test_sums_have_their_order(shape: tuple[int, int]) -> None:
    """As written once more in plain loops, which is what the core does."""
    rows, columns = shape
    values = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = []
    for matrix, row_sums, column_sums in zip(values, factored.row_sums(values), factored.column_sums(values)):
        table = matrix.tolist()
        slabs = max(1, min(64, rows // 320))
        height = math.ceil(rows / slabs)
        parts = [table[i : i + height] for i in range(0, rows, height)]
        assert row_sums.tolist() == [pairs([lanes(r[i : i + 4096]) for i in range(0, columns, 4096)]) for r in table]
        assert column_sums.tolist() == [pairs([sum((r[c] for r in p), 0.0) for p in parts]) for c in range(columns)]
        units += [sum((lanes(r[i : i + 4096]) for r in p), 0.0) for p in parts for i in range(0, columns, 4096)]
    assert factored.unit_sums(values).tolist() == units
    flat = values.flatten().sqrt()
    chunks = [lanes((c * c).tolist()) for c in flat.split(4096)]
    assert square_sums(flat).tolist() == chunks
    assert pairwise_sum(square_sums(flat)).item() == pairs(chunks)
