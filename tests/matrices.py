"""Which combinations of rules, formats, dtypes and masters are tested: nowhere else are they multiplied.

Of a product, `make test` takes combinations in which any two values of different axes meet, and `make test-all` takes
all of them. CONTRIBUTING.md says why.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, FORMATS, MASTERS, SANITIZED, Case, each_variant


@functools.cache
def cover(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Positions on axes of these sizes, so that any two of different axes meet: greedily, the first of the best."""
    rows = list(itertools.product(*map(range, sizes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing, found = set().union(*pairs.values()), []
    while missing:
        found.append(max(rows, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[found[-1]]
    return found


def product(*axes: Iterable[Any]) -> list[Any]:
    """All combinations, as parameters of a test; those that pairs do not need are marked thorough.

    An axis holds values, tuples of values, or pytest's parameters. Combinations of one that is marked are marked.
    """
    values = [[_parameter(value) for value in axis] for axis in axes]
    quick = [[at for at, value in enumerate(axis) if not value.marks] for axis in values]
    chosen = {tuple(axis[at] for axis, at in zip(quick, row)) for row in cover(tuple(map(len, quick)))}
    found = []
    for row in itertools.product(*(range(len(axis)) for axis in values)):
        parts = [axis[at] for axis, at in zip(values, row)]
        flat = itertools.chain.from_iterable(part.values for part in parts)
        marks = () if row in chosen else pytest.mark.thorough
        found.append(pytest.param(*flat, id="-".join(part.id for part in parts), marks=marks))
    return found


def _parameter(value: Any) -> Any:
    if hasattr(value, "marks"):
        return value
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, id="-".join(getattr(part, "name", str(part)) for part in values))


def each_rule() -> list[Any]:
    """(case, kwargs) for every compiled rule, of the last variant that uses it."""
    found = _last_of(each_variant(), lambda optimizer, group: optimizer.rule(group))
    return [row._replace(id=name) for name, row in found.items()]


def _last_of(rows: list[Any], key: Callable[..., Any]) -> dict[Any, Any]:
    """Of rows whose optimizers have the same key, the last one."""
    found = {}
    for row in rows:
        case, kwargs = row.values
        optimizer = case.ours([torch.zeros(1)], **kwargs)
        found[key(optimizer, optimizer.param_groups[0])] = row
    return found


def _one_of(rows: list[Any], key: Callable[..., Any]) -> list[Any]:
    """Of rows whose optimizers have the same key all but the last are marked thorough."""
    kept = {row.id for row in _last_of(rows, key).values()}
    return [row if row.id in kept else row._replace(marks=[pytest.mark.thorough]) for row in rows]


def _by_rule(rows: list[Any]) -> list[Any]:
    """The same compiled loop with other numbers is one row."""
    return _one_of(rows, lambda optimizer, group: optimizer.rule(group))


def _by_memory(rows: list[Any]) -> list[Any]:
    """Weights are decoded before a rule, and encoded after it: rules with as many and such states are one row."""
    return _one_of(rows, lambda optimizer, group: tuple(bool(s.unquantized) for s in optimizer.states(group)))


def of_memory(cases: list[Case]) -> list[Case]:
    """Sanitizers look at memory, of which rules see nothing: under them, one of the cases that are one row."""
    if not SANITIZED:
        return cases
    rows = _by_memory([pytest.param(case, case.kwargs, id=case.name) for case in cases])
    return [row.values[0] for row in rows if not row.marks]


# Of each optimizer the variant with most states.
_MOST_STATES = [pytest.param(case, {**case.kwargs, **case.variants[-1]}, id=case.name) for case in CASES]

rules_and_formats = pytest.mark.parametrize(
    ("case", "kwargs", "dtype", "state_format"),
    product((_by_memory if SANITIZED else _by_rule)(each_variant()), DTYPES, FORMATS),
)
compiled_rules_and_formats = pytest.mark.parametrize(
    ("case", "kwargs", "dtype", "state_format"), product(each_rule(), DTYPES, FORMATS)
)
masters_of_all = pytest.mark.parametrize(
    ("case", "kwargs", "dtype", "rounding", "master", "state_format"),
    product(_by_memory(_MOST_STATES), MASTERS, ("fp32", "bf16-stochastic", "8bit-stochastic")),
)
MASTERED = (MASTERS, ("fp32", "8bit-stochastic"))  # masters, beside states of two formats
masters = pytest.mark.parametrize(("dtype", "rounding", "master", "state_format"), product(*MASTERED))

# Of Adafactor, for bits. Rows of whole vectors and not, several slabs, several panels, both; stacks of matrices; what
# has fewer dimensions.
FACTORED_SHAPES = [
    (700, 100),
    (7, 257),
    (3, 4, 400),
    (2, 9000),
    (641, 4100),
    (16, 3, 4100),
    (6, 0),
    (64, 8, 3, 3),
    (1, 1),
    (5, 1),
    (9000,),
    (),
]

FACTORED_VARIANTS: dict[str, dict[str, Any]] = {
    "relative": {},
    "warmup": {"warmup_init": True, "scale_parameter": False, "maximize": True},
    "external": {
        "lr": 1e-2,
        "relative_step": False,
        "weight_decay": 0.1,
        "clip_threshold": 0.5,
        "decay_rate": -0.5,
        "max_grad_norm": 1.0,
    },
    "momentum": {"beta1": 0.9, "weight_decay": 0.1},
    "compat": {"beta1": 0.9, "compat": True, "lr": 1e-2, "relative_step": False, "scale_parameter": False},
    "folded": {"fold_conv": True, "beta1": 0.5},
    "torch": {"variant": "torch", "weight_decay": 0.1, "max_grad_norm": 1.0},
    "torch-eps": {"variant": "torch", "eps": (1e-3, 1e-2)},
}

# The others differ in numbers from one of these, whose passes over memory they share; folded matrices in their rows.
EVERY_PASS = ("relative", "momentum", "torch")


def _is_quick(variant: str, dtype: str) -> bool:
    return variant in EVERY_PASS or (dtype == "fp32" and (variant == "folded" or not SANITIZED))


factored_dtypes = pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        pytest.param(*row, marks=() if _is_quick(*row) else pytest.mark.thorough)
        for row in itertools.product(FACTORED_VARIANTS, DTYPES)
    ],
)
factored_formats = pytest.mark.parametrize(
    ("variant", "dtype", "state_format"),
    product(FACTORED_VARIANTS, DTYPES, ("fp32", "bf16-stochastic", "8bit-stochastic")),
)

# Of its other tests: vectors, matrices, several of them, convolutions; a learning rate from outside; few bits.
ADAFACTOR_SHAPES = [(300,), (), (33, 20), (200, 64), (3, 5, 70), (8, 4, 3, 3)]
EXTERNAL = {"lr": 1e-2, "relative_step": False}
ADAFACTOR_LOW: dict[str, Any] = {
    "beta1": 0.9,
    "state_dtype": "8bit",
    "min_quantized_numel": 1,
    "master_weights": "split24",
    "rounding": "stochastic",
    "seed": 3,
}
