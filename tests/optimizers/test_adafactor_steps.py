"""Adafactor in the engine: groups of several layouts, norm, health, compiled steps, DTensors, arguments."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch._dynamo.testing
from cases import assert_same_bits, assert_same_run, make_params, set_grads, train
from matrices import ADAFACTOR_LOW as LOW
from matrices import ADAFACTOR_SHAPES as SHAPES
from matrices import EXTERNAL

import fusedopt
from fusedopt import Adafactor
from fusedopt.engine.gather import Gathered
from fusedopt.reference.norm import pairwise_sum


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


def test_a_compiled_step_knows_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a backend may ask: which are signed, and what they extend over."""
    seen = []
    monkeypatch.setattr(
        fusedopt.engine.compiled,
        "Gathered",
        lambda sessions, groups, *rest, **more: seen.append(groups) or Gathered(sessions, groups, *rest, **more),
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


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_complex_parameters_are_refused(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = Adafactor([param], backend=backend)
    with pytest.raises(ValueError, match=r"its dtype is torch\.complex64, for which Adafactor is not defined"):
        optimizer.step()
    assert not optimizer.state


def test_replicated_dtensors_are_stepped() -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        (plain,) = make_params([(6, 4)], torch.float32)
        set_grads([plain], 0)

        def placed(tensor: torch.Tensor) -> DTensor:
            return DTensor.from_local(tensor.detach().clone(), mesh, [Replicate()], run_check=False)

        replicated = torch.nn.Parameter(placed(plain))
        replicated.grad = placed(plain.grad)
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
