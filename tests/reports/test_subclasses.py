"""A user's subclass with **kwargs: they reach our constructor, and an unknown one is still a sentence.

As code that wraps an optimizer's class makes them, for example around hydra-ecosystem/hydra#1715.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, make_params, train

import fusedopt


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keywords_reach_our_constructor(case: Case) -> None:
    class Mine(case.ours):  # type: ignore[misc,name-defined]
        def __init__(self, params: Any, **kwargs: Any) -> None:
            self.note = kwargs.pop("note", None)
            super().__init__(params, **kwargs)

    optimizer = Mine(make_params([(3, 4)], torch.float32), lr=0.25, seed=7, note="mine")
    assert optimizer.note == "mine"
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["seed"] == 7
    train(optimizer, 1)
    with pytest.raises(TypeError, match=r"Mine got an unknown argument state_dtyp='8bit'; did you mean 'state_dtype'"):
        Mine(make_params([(3, 4)], torch.float32), state_dtyp="8bit")


def test_an_optimizer_of_ones_own_refuses_what_nobody_knows() -> None:
    class Mine(fusedopt.FusedOptimizer):
        def __init__(self, params: Any, lr: float = 1e-3, **kwargs: Any) -> None:
            super().__init__(params, {"lr": lr}, **kwargs)

        def check_group(self, group: dict[str, Any]) -> None:
            pass

    assert Mine(make_params([(3,)], torch.float32), seed=3).param_groups[0]["seed"] == 3
    with pytest.raises(TypeError, match="Mine got an unknown argument sed=3; did you mean 'seed'"):
        Mine(make_params([(3,)], torch.float32), sed=3)
