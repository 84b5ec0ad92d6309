"""A parameter that a group lists more than once is stepped once for each listing: pytorch/pytorch#40967.

torch's for-loop implementation (foreach=False) does so, one after the other, with one state; its others need not.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_run, make_params, set_grads
from torch import Tensor

import fusedopt

pytestmark = [
    pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate"),
    pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here"),
]

SHAPES = [(64, 128), (70,), (3, 5000)]
# First, in between and last; three times; not at all.
LISTED = [0, 1, 0, 2, 0, 2]


def listed_twice(cls: type[torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    params = make_params(SHAPES, dtype)
    return cls([params[i] for i in LISTED], **kwargs)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(dict.fromkeys(param for group in optimizer.param_groups for param in group["params"]))


def steps(optimizer: Any, count: int, first: int = 0) -> Any:
    for step in range(first, first + count):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    return optimizer


def one_after_the_other(case: Case, dtype: torch.dtype, count: int, **kwargs: Any) -> list[Any]:
    """An optimizer for each parameter, which is stepped as often as it is listed, with the settings of one step."""
    params = make_params(SHAPES, dtype)
    optimizers = [case.ours([param], **kwargs) for param in params]
    for step in range(count):
        set_grads(params, step)
        for optimizer, param in zip(optimizers, range(len(params))):
            (group,) = optimizer.param_groups
            before = dict(group)
            for _ in range(LISTED.count(param)):
                group.update(before)
                optimizer.step()
    return optimizers


def assert_same_as_singly(optimizer: Any, singles: list[Any]) -> None:
    for param, single in zip(params_of(optimizer), singles):
        (other,) = params_of(single)
        assert torch.equal(param, other)
        assert optimizer.state[param].keys() == single.state[other].keys()
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, single.state[other][key]), key


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit", "min_quantized_numel": 1}], ids=["fp32", "8bit"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_often_as_listed(case: Case, kwargs: dict[str, Any], backend: str) -> None:
    kwargs = {**case.kwargs, **kwargs, "backend": backend}
    optimizer = steps(listed_twice(case.ours, **kwargs), 3)
    assert_same_as_singly(optimizer, one_after_the_other(case, torch.float32, 3, **kwargs))


def test_bfloat16_with_masters_and_copies() -> None:
    """Also where a parameter is not contiguous, and is copied and written back."""
    kwargs = {"state_dtype": "8bit", "min_quantized_numel": 1, "master_weights": "kahan"}
    optimizer = steps(listed_twice(fusedopt.AdamW, torch.bfloat16, **kwargs), 3)
    assert_same_as_singly(optimizer, one_after_the_other(CASES[0], torch.bfloat16, 3, **kwargs))
    runs = []
    for listings, times in (([0, 0], 1), ([0], 2)):
        param = torch.nn.Parameter(make_params([(64, 96)], torch.float32)[0].detach().t())
        optimizer = fusedopt.AdamW([param for _ in listings])
        set_grads([param], 0)
        for _ in range(times):
            optimizer.step()
        runs.append((param.detach(), optimizer.state[param]["exp_avg"]))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_adafactor_with_layouts() -> None:
    runs = []
    for listings, times in ((LISTED, 1), ([0], 3)):
        params = make_params(SHAPES, torch.float32)
        optimizer = fusedopt.Adafactor([params[i] for i in listings], lr=1e-2, relative_step=False)
        for step in range(2):
            set_grads(params, step)
            for _ in range(times):
                optimizer.step()
        runs.append((params[0], optimizer.state[params[0]]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


SGD_KWARGS = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("AdamW", {}), ("SGD", SGD_KWARGS), ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}), ("RMSprop", {})],
)
def test_torchs_result(name: str, kwargs: dict[str, Any]) -> None:
    runs = []
    for cls, more in ((getattr(torch.optim, name), {"foreach": False}), (getattr(fusedopt, name), {})):
        runs.append(params_of(steps(listed_twice(cls, weight_decay=0.1, **kwargs, **more), 5)))
    for theirs, ours in zip(*runs):
        # torch computes the scalars in another order: a few units in the last place per step, of numbers up to 4
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit"}, {"master_weights": "kahan"}], ids=str)
def test_torch_makes_some_states_in_the_first_step_for_each_listing(kwargs: dict[str, Any]) -> None:
    """Momentum then begins with the gradient as often as the parameter is listed; masters go on."""
    param = make_params([(64, 128)], torch.bfloat16)[0]
    twin = torch.nn.Parameter(param.detach().clone())
    optimizer, single = (
        fusedopt.SGD(listings, **SGD_KWARGS, weight_decay=0.1, **kwargs) for listings in ([param, param], [twin])
    )
    for step in range(3):
        for each in (param, twin):
            set_grads([each], step)
        optimizer.step()
        single.step()
        if step == 0:
            for key, value in single.state[twin].items():
                if key.startswith("momentum") or key == "step":
                    value.zero_()
        single.step()
        assert torch.equal(param, twin)


def test_torchs_warning() -> None:
    (param,) = make_params([(4,)], torch.float32)
    messages = []
    for cls in (torch.optim.AdamW, fusedopt.AdamW):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = cls([param, param])
        messages.append([(w.category, str(w.message)) for w in caught])
        assert optimizer.param_groups[0]["params"] == [param, param]
    assert messages[0] == messages[1]
    assert len(messages[0]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedopt.AdamW([param])


def test_the_norm_counts_a_gradient_once() -> None:
    runs = []
    for clips_itself in (True, False):
        optimizer = listed_twice(fusedopt.AdamW, **({"max_grad_norm": 0.5} if clips_itself else {}))
        params = params_of(optimizer)
        for step in range(3):
            set_grads(params, step)
            if clips_itself:
                optimizer.step()
            else:
                norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
                optimizer.step()
        runs.append((params, optimizer.last_grad_norm if clips_itself else norm))
    # torch sums squares in float32 and in another order
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=0)
    for ours, theirs in zip(runs[0][0], runs[1][0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_clipped_steps_of_the_backends_agree() -> None:
    runs = [steps(listed_twice(fusedopt.AdamW, max_grad_norm=0.5, backend=backend), 3) for backend in ("cpu", "eager")]
    assert_same_run(*runs)
    assert torch.equal(runs[0].last_grad_norm, runs[1].last_grad_norm)


def test_checkpoints_and_copies() -> None:
    kwargs: dict[str, Any] = {"state_dtype": "8bit", "min_quantized_numel": 1}
    expected = steps(listed_twice(fusedopt.AdamW, **kwargs), 4)
    begun = steps(listed_twice(fusedopt.AdamW, **kwargs), 2)
    torchs = listed_twice(torch.optim.AdamW)
    assert begun.state_dict()["param_groups"][0]["params"] == torchs.state_dict()["param_groups"][0]["params"]
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    loaded = listed_twice(fusedopt.AdamW, **kwargs)
    loaded.load_state_dict(torch.load(file))
    for param, other in zip(params_of(loaded), params_of(begun)):
        param.data.copy_(other.data)
    pickled = io.BytesIO()
    torch.save(begun, pickled)
    pickled.seek(0)
    unpickled = torch.load(pickled, weights_only=False)
    for optimizer in (loaded, unpickled, copy.deepcopy(begun), begun):
        assert_same_run(steps(optimizer, 2, first=2), expected)


def test_torchs_state_dict() -> None:
    theirs = steps(listed_twice(torch.optim.AdamW, foreach=False), 2)
    ours = listed_twice(fusedopt.AdamW)
    ours.load_state_dict(theirs.state_dict())
    for number, (param, other) in enumerate(zip(params_of(ours), params_of(theirs))):
        assert torch.equal(ours.state[param]["exp_avg"], theirs.state[other]["exp_avg"])
        assert float(ours.state[param]["step"]) == 2 * LISTED.count(number)


def test_added_groups() -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = fusedopt.AdamW([params[1]])
    optimizer.add_param_group({"params": [params[0], params[2], params[0]]})
    set_grads(params, 0)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [2, 1, 1]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})


def test_compiled_steps_are_taken_uncompiled() -> None:
    expected = steps(listed_twice(fusedopt.AdamW), 3)
    optimizer = listed_twice(fusedopt.AdamW)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(3):
        set_grads(params_of(optimizer), number)
        step()
    assert_same_run(optimizer, expected)


def test_errors_come_before_anything_has_changed() -> None:
    optimizer = steps(listed_twice(fusedopt.AdamW), 1)
    params = params_of(optimizer)
    before = [param.detach().clone() for param in params]
    set_grads(params, 1)
    params[2].grad = torch.ones(3, 5000).to_sparse()
    with pytest.raises(ValueError, match="parameter 3 of group 0"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before))


def test_reports() -> None:
    """Memory is counted once, a step of each listing is."""
    optimizer = listed_twice(fusedopt.AdamW)
    optimizer.record_health()
    steps(optimizer, 1)
    numel = [param.numel() for param in params_of(optimizer)]
    assert optimizer.memory_report().numel == sum(numel)
    report = optimizer.health_report()
    assert report.elements == sum(numel[i] for i in LISTED)
    assert list(report.by_parameter) == ["0.0", "0.1", "0.3", "0.2", "0.5", "0.4"]
