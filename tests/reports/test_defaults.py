"""Whatever device and dtype are the default, ours are named: pytorch/pytorch#113758, deepmodeling/deepmd-kit#3307."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, assert_same_bits, assert_same_run, make_params, set_grads

ROOT = Path(__file__).resolve().parents[2]
FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "scalar_tensor",
    "tensor",
)
SHAPES = [(64, 128), (70,), ()]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default",
    [lambda: torch.device("meta"), lambda: default_dtype(torch.float16), lambda: default_dtype(torch.bfloat16)],
    ids=["meta", "float16", "bfloat16"],
)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"backend": "eager"}], ids=["plain", "clip", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_and_loading_are_the_same(case: Case, options: dict, default: type[AbstractContextManager]) -> None:
    runs = []
    for context in (default, nullcontext):
        optimizer = case.ours(make_params(SHAPES, torch.bfloat16), **case.kwargs, **options, master_weights="kahan")
        params = optimizer.param_groups[0]["params"]
        for step in range(3):
            set_grads(params, step)
            with context():
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        runs.append(optimizer)
    assert_same_run(*runs)
    if "max_grad_norm" in options:
        assert_same_bits(runs[0].last_grad_norm, runs[1].last_grad_norm)


def test_every_tensor_names_its_device_and_dtype() -> None:
    unnamed, found = [], 0
    for folder in ("fusedopt", "triton_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                module = node.func.value
                is_torchs = isinstance(module, ast.Name) and module.id == "torch"
                if not is_torchs or node.func.attr not in FACTORIES:
                    continue
                found += 1
                named = {keyword.arg for keyword in node.keywords}
                # On the meta device nothing is stored, and a dtype says nothing.
                if not {"device", "dtype"} <= named and "meta" not in ast.unparse(node):
                    unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found > 15
    assert unnamed == []
