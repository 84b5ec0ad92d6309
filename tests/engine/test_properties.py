"""Whatever the shapes, dtypes and hyperparameters: the compiled step is the reference step."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from cases import CASES, DTYPES, assert_same_bits, assert_same_run, make_params, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt.storage.masters import KEYS

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.lists(
    st.one_of(st.lists(st.integers(0, 40), max_size=3), st.lists(st.integers(0, 200), min_size=2, max_size=2)).map(
        tuple
    ),
    min_size=1,
    max_size=4,
)
formats = st.sampled_from(["float32", "bfloat16", "float16", "8bit"])
roundings = st.sampled_from(["nearest", "stochastic"])


def decays(least: float = 0.0) -> st.SearchStrategy[float]:
    return st.floats(least, 0.9999)


# What arguments may be, by name; an optimizer is given those that it has.
arguments = {
    "lr": st.floats(0, 10),
    "eps": st.floats(0, 1),
    "weight_decay": st.floats(0, 1),
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
    "alpha": decays(),
    "momentum": decays(),
    "dampening": decays(),
    "centered": st.booleans(),
    "lr_decay": st.floats(0, 1),
    "initial_accumulator_value": st.floats(0, 10),
    "t_alpha": st.one_of(st.none(), st.integers(1, 5)),
    "t_beta3": st.one_of(st.none(), st.integers(1, 5)),
    "state_rounding": st.one_of(st.none(), roundings),
    "min_quantized_numel": st.integers(0, 5000),
    "rounding": st.one_of(st.none(), roundings),
    "seed": st.integers(0, 2**32 - 1),
    "max_grad_norm": st.one_of(st.none(), st.floats(1e-3, 1e3)),
}


@st.composite
def runs(draw: st.DrawFn) -> tuple:
    """(case, its arguments, dtype)."""
    case = draw(st.sampled_from(CASES))
    known = inspect.signature(case.ours).parameters
    kwargs = {name: draw(strategy) for name, strategy in arguments.items() if name in known and name not in case.least}
    if "betas" in known:
        least = case.least.get("betas", (0.0,) * len(known["betas"].default))
        kwargs["betas"] = draw(st.tuples(*map(decays, least)))
    if "momentum" in case.least:
        kwargs["momentum"] = draw(decays(case.least["momentum"]))
    dense = {spec.name for spec in case.ours.STATES if spec.unquantized or kwargs.get("centered")}
    each = {
        spec.name: st.sampled_from(["float32", "bfloat16"]) if spec.name in dense else formats
        for spec in case.ours.STATES
    }
    kwargs["state_dtype"] = draw(st.one_of(formats, st.fixed_dictionaries({}, optional=each)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    masters = [None, "float32"] if dtype == "fp16" else [None, *KEYS]
    kwargs["master_weights"] = draw(st.sampled_from(masters))
    return case, kwargs, DTYPES[dtype]


@pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing")
@quick
@given(runs(), shapes, st.integers(1, 5))
def test_compiled_equals_reference(run, shapes, threads) -> None:
    case, kwargs, dtype = run
    torch.set_num_threads(threads)
    both = [train(case.ours(make_params(shapes, dtype), **kwargs, backend=backend), 3) for backend in ("cpu", "eager")]
    assert_same_run(*both)
    if kwargs["max_grad_norm"] is not None:
        assert_same_bits(both[0].last_grad_norm, both[1].last_grad_norm)


@pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing")
@quick
@given(runs(), shapes)
def test_reloading_anywhere_changes_nothing(run, shapes) -> None:
    case, kwargs, dtype = run
    optimizer = train(case.ours(make_params(shapes, dtype), **kwargs), 2)
    resumed = case.ours(make_params(shapes, dtype))
    for param, twin in zip(resumed.param_groups[0]["params"], optimizer.param_groups[0]["params"]):
        param.data.copy_(twin.data)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_run(train(resumed, 2, first=2), train(optimizer, 2, first=2))


@quick
@given(
    st.sampled_from(["lr", "eps", "weight_decay", "max_grad_norm"]),
    st.one_of(st.floats(max_value=-1e-300), st.sampled_from([math.nan, math.inf])),
)
def test_numbers_out_of_range_are_named(name, value) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        fusedopt.AdamW(make_params([(2,)], torch.float32), **{name: value})
