"""Schedule-free optimizers: modes, averages, checkpoints, and the schedulefree package on the demo's GPT."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_run, copied, make_params, peer, saved, set_grads, train

import fusedopt

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from gpt import Config, Training

CLASSES = [fusedopt.SGDScheduleFree, fusedopt.AdamWScheduleFree, fusedopt.RAdamScheduleFree]
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"state_dtype": {"exp_avg_sq": "8bit"}, "min_quantized_numel": 1},
    "split24": {"master_weights": "split24", "dtype": torch.bfloat16},
}


def make(cls: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    if cls is fusedopt.SGDScheduleFree and isinstance(kwargs.get("state_dtype"), dict):
        del kwargs["state_dtype"]
    return cls(make_params([(64, 64), (7,)], dtype), lr=1e-2, **kwargs)


def values(optimizer: Any) -> list[torch.Tensor]:
    model = torch.nn.ParameterList(optimizer.param_groups[0]["params"])
    return list(fusedopt.fp32_parameters(optimizer, model).values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_eval_is_the_average_and_train_goes_back(cls: Any, form: str) -> None:
    """The weights of evaluation are the weighted mean of z, which is what the paper evaluates."""
    optimizer = make(cls, **FORMS[form], weight_decay=0.01)
    sums, weights = [torch.zeros_like(v, dtype=torch.float64) for v in values(optimizer)], 0.0
    before = 0.0
    for step in range(12):
        train(optimizer, 1, first=step)
        weight = optimizer.param_groups[0]["weight_sum"] - before
        before += weight
        weights += weight
        for total, state in zip(sums, optimizer.state.values()):
            total += weight * state["z"].double()
    y = values(optimizer)
    optimizer.eval()
    x = values(optimizer)
    # Each step rounds its weights in float32, or to 16 and 8 bits.
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if form == "split24" else {"rtol": 1e-4, "atol": 1e-5}
    for average, total in zip(x, sums):
        torch.testing.assert_close(average.double(), total / weights, **tolerance)
    assert any(not torch.equal(a, b) for a, b in zip(x, y))
    with pytest.raises(ValueError, match=r"the weights are the averages that eval\(\) put there.*call the optimizer's"):
        optimizer.step()
    optimizer.eval()  # again: nothing
    assert all(torch.equal(a, b) for a, b in zip(values(optimizer), x))
    optimizer.train()
    back = values(optimizer)
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(values(optimizer), back))
    # Both ways round: three operations on numbers of this size, and what is kept of them.
    unit = 2.0**-16 if form == "split24" else 2.0**-23
    for again, was, average, state in zip(back, y, x, optimizer.state.values()):
        size = torch.stack([was.abs(), average.abs(), state["z"].abs()]).amax(0)
        assert ((again - was).abs() <= 4 * unit * size).all()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpoints_in_either_mode(cls: Any, form: str, mode: str) -> None:
    """What is loaded goes on as what was saved, bit for bit; the weights come with the model's own state dict."""
    optimizer = train(make(cls, **FORMS[form]), 6)
    getattr(optimizer, mode)()
    state = saved(optimizer.state_dict())
    other = make(cls, **FORMS[form])
    for param, source in zip(other.param_groups[0]["params"], optimizer.param_groups[0]["params"]):
        param.data.copy_(source.data)
    other.load_state_dict(state)
    assert other.param_groups[0]["train_mode"] == (mode == "train")
    for each in (optimizer, other):
        each.train()
        train(each, 4, first=6)
    for a, b in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"]):
        assert torch.equal(a, b)
    assert optimizer.param_groups[0]["k"] == other.param_groups[0]["k"] == 10


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_checkpoint_of_the_package_goes_on(cls: Any) -> None:
    theirs_class = getattr(peer("schedulefree"), cls.__name__)
    params = make_params([(64, 64), (7,)], torch.float32)
    theirs = theirs_class(params, lr=1e-2)
    theirs.train()
    train(theirs, 5)
    ours = cls(copied(params), lr=1.0)
    ours.load_state_dict(saved(theirs.state_dict()))
    train(theirs, 5, first=5)
    train(ours, 5, first=5)
    ours.eval(), theirs.eval()
    for a, b in zip(ours.param_groups[0]["params"], params):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # ten steps, rounded in another order
    assert {float(state["step"]) for state in ours.state.values()} == {10}


def test_warmup_and_weights() -> None:
    optimizer = make(fusedopt.AdamWScheduleFree, warmup_steps=4)
    seen = []
    for step in range(6):
        train(optimizer, 1, first=step)
        seen.append(optimizer.param_groups[0]["scheduled_lr"])
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(sum(lr**2 for lr in seen))


def test_a_parameter_that_comes_later_begins_with_its_own_weights() -> None:
    """Its averages and its second moment count the steps that it took; the weights of averages are its group's."""
    optimizer, alone = (make(fusedopt.AdamWScheduleFree, weight_lr_power=0.0, r=1.0) for _ in range(2))
    first, later = optimizer.param_groups[0]["params"]
    for step in range(6):
        set_grads([first, later], step)
        later.grad = later.grad if step >= 4 else None
        optimizer.step()
    param = alone.param_groups[0]["params"][1]
    for step, weight in ((4, 5.0), (5, 6.0)):
        set_grads([alone.param_groups[0]["params"][0], param], step)
        alone.param_groups[0].update(k=step, weight_sum=sum(range(1, step + 1)))
        alone.step()
        assert alone.param_groups[0]["weight_sum"] == sum(range(1, step + 1)) + weight
    assert torch.equal(later, param)
    assert float(optimizer.state[later]["step"]) == 2


def test_a_step_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would average with the weights of the step that was captured."""
    optimizer = train(make(fusedopt.AdamWScheduleFree), 1)
    before = copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"AdamWScheduleFree cannot be captured in a CUDA graph.*outside of the graph"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_a_step_that_fails_counts_nothing() -> None:
    optimizer = train(make(fusedopt.AdamWScheduleFree), 2)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(64, 64).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
@pytest.mark.parametrize("why", ["found_inf", "norm"])
def test_a_step_that_is_left_out_counts_nothing(why: str, backend: str) -> None:
    """Also where kernels find it out: what a group has seen is known to the host."""
    runs = []
    for forbids in (False, True):
        optimizer = train(make(fusedopt.AdamWScheduleFree, backend=backend, max_grad_norm=1e3), 2)
        if forbids:
            if why == "norm":
                optimizer.param_groups[0]["skip_step_above"] = 1e-3
            else:
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.grad_scale = torch.tensor(1.0)
            train(optimizer, 1, first=7)
            assert optimizer.param_groups[0]["k"] == 2
            optimizer.param_groups[0]["skip_step_above"] = None
            optimizer.grad_scale = optimizer.found_inf = None
        runs.append(train(optimizer, 1, first=2))
    assert_same_run(*runs)
    assert runs[0].param_groups[0]["weight_sum"] == runs[1].param_groups[0]["weight_sum"]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (fusedopt.AdamWScheduleFree, {"betas": (0.0, 0.9)}, r"betas\[0\]=0\.0 leaves no average in the weights"),
        (fusedopt.SGDScheduleFree, {"momentum": 0.0}, r"momentum=0\.0 leaves no average"),
        (fusedopt.RAdamScheduleFree, {"betas": (0.9, 0.6)}, r"betas\[1\]=0\.6 averages over too few steps"),
        (fusedopt.AdamWScheduleFree, {"nonfinite": "skip_block"}, "its weight would be missing from the averages"),
        (fusedopt.AdamWScheduleFree, {"warmup_steps": -1}, "warmup_steps=-1.0 is negative"),
        (fusedopt.AdamWScheduleFree, {"state_dtype": {"z": "8bit"}}, "z is the weights themselves"),
    ],
)
def test_errors(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([torch.nn.Parameter(torch.ones(3))], **kwargs)


SMALL = Config(batch=2, context=32, width=48, depth=1, heads=2)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((cls.__name__, SMALL) for cls in CLASSES),
        *(pytest.param(cls.__name__, Config(), marks=pytest.mark.thorough) for cls in CLASSES),
    ],
)
def test_losses_are_those_of_the_package_on_the_demos_gpt(name: str, config: Config) -> None:
    """In training and of the averages, on a text that neither saw."""
    module = peer("schedulefree")
    runs = []
    for cls in (getattr(fusedopt, name), getattr(module, name)):
        lr = 0.1 if name.startswith("SGD") else 5e-3
        training = Training(lambda groups, config, cls=cls, lr=lr: cls(groups, lr=lr), config)
        training.scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1.0)
        training.optimizer.train()
        losses = [training.step() for _ in range(20)]
        training.optimizer.eval()
        windows = training.validation_data[: 8 * (config.context + 1)].view(8, -1)
        runs.append([*losses, training.model.loss(windows[:, :-1], windows[:, 1:]).item()])
    assert runs[0][0] > runs[0][-2] + 0.1  # it learns
    # What the two round differently is amplified by each step after it.
    assert runs[0] == pytest.approx(runs[1], rel=2e-6)
