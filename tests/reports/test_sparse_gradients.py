"""Sparse gradients, as nn.Embedding(sparse=True) makes them: where torch steps them, ours do; elsewhere it is said.

Report: pytorch/pytorch#4682 lists which of torch's optimizers take them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_run
from torch import nn

import fusedopt

SPARSE = [
    (fusedopt.SGD, torch.optim.SGD, {"lr": 0.1}),
    (fusedopt.SGD, torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    (fusedopt.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (fusedopt.Adagrad, torch.optim.Adagrad, {"lr": 0.1}),
    (fusedopt.Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
]


def trained(cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], sparse: bool = True) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    table, dense = nn.Embedding(50, 80, sparse=sparse), nn.Parameter(torch.randn(4, 80))
    optimizer = cls([table.weight, dense], **kwargs)
    for step in range(4):
        tokens = torch.tensor([3, 7, 3, 11 + step])  # one twice: its rows are to be added
        factors = torch.randn(4, 80)  # gradients do not depend on the weights: no error grows from step to step
        ((table(tokens) + dense) * factors).sum().backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse == sparse
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), SPARSE)
def test_they_are_stepped_as_torch_does(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    found, expected = trained(ours, kwargs), trained(theirs, kwargs)
    for param, twin in zip(found.param_groups[0]["params"], expected.param_groups[0]["params"]):
        # torch subtracts both rows of a token that comes twice, each rounded; ours their sum.
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"state_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), SPARSE)
def test_they_are_zeros_where_they_have_no_number(
    ours: Any, theirs: Any, kwargs: dict[str, Any], options: dict[str, Any]
) -> None:
    assert_same_run(trained(ours, {**kwargs, **options}), trained(ours, {**kwargs, **options}, sparse=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_others_say_so_before_anything_moves(case: Case) -> None:
    if any(case.ours is ours for ours, _, _ in SPARSE):
        kwargs = {**case.kwargs, "weight_decay": 0.1}
    else:
        kwargs = case.kwargs
        if case.is_torchs:
            with pytest.raises(RuntimeError, match="sparse"):
                trained(case.theirs, kwargs)
    with pytest.raises(
        ValueError, match=r"gradient of layout torch\.sparse_coo, which cannot be stepped: .*sparse=False"
    ):
        trained(case.ours, kwargs)


@pytest.mark.parametrize("cls", [fusedopt.SGD, fusedopt.Adagrad])
def test_a_warmup_from_zero_begins(cls: Any) -> None:
    """The step at lr 0 is looked at: it may be torch.distributed.checkpoint's, which only wants states."""
    for tokens, counts in (([3, 7, 3], True), ([], False)):
        table = nn.Embedding(50, 80, sparse=True)
        optimizer = cls(table.parameters(), lr=0.0)
        table(torch.tensor(tokens, dtype=torch.int64)).sum().backward()
        optimizer.step()
        assert float(optimizer.state[table.weight]["step"]) == counts
    table.weight.grad = torch.sparse_coo_tensor([[1, 1]], torch.tensor([[1.0], [-1.0]]).expand(2, 80), (50, 80))
    optimizer = cls(table.parameters(), lr=0.0)
    optimizer.step()
    assert float(optimizer.state[table.weight]["step"]) == 0  # numbers of one element are added
