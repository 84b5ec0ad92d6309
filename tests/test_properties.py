"""Whatever the shapes, dtypes and hyperparameters: the compiled step is the reference step."""

from __future__ import annotations

import math
import re

import pytest
import torch
from cases import CASES, DTYPES, assert_same_bits, assert_same_run, make_params, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedopt

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4)
names = st.sampled_from(["float32", "bfloat16", "float16"])
roundings = st.sampled_from(["nearest", "stochastic"])
hyper = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 10),
        "betas": st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
        "eps": st.floats(0, 1),
        "weight_decay": st.floats(0, 1),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "state_dtype": st.one_of(names, st.fixed_dictionaries({"exp_avg": names, "exp_avg_sq": names})),
        "state_rounding": st.one_of(st.none(), roundings, st.fixed_dictionaries({"exp_avg_sq": roundings})),
        "seed": st.integers(0, 2**32 - 1),
        "max_grad_norm": st.one_of(st.none(), st.floats(1e-3, 1e3)),
    }
)


@quick
@given(st.sampled_from(CASES), shapes, st.sampled_from(list(DTYPES)), hyper, st.integers(1, 5))
def test_compiled_equals_reference(case, shapes, dtype, kwargs, threads) -> None:
    torch.set_num_threads(threads)
    runs = [
        train(case.ours(make_params(shapes, DTYPES[dtype]), **kwargs, backend=backend), 3)
        for backend in ("cpu", "eager")
    ]
    assert_same_run(*runs)
    if kwargs["max_grad_norm"] is not None:
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)


@quick
@given(st.sampled_from(CASES), shapes, st.sampled_from(list(DTYPES)), hyper)
def test_reloading_anywhere_changes_nothing(case, shapes, dtype, kwargs) -> None:
    optimizer = train(case.ours(make_params(shapes, DTYPES[dtype]), **kwargs), 2)
    resumed = case.ours(make_params(shapes, DTYPES[dtype]))
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
