"""Warnings point to the line of the user's that they are about, however deep they come up."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt


class Own(fusedopt.AdamW):
    """A subclass of a user's is the user's code; the line that calls its base is what can be changed."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(*shape, dtype=dtype))


def misspelled() -> list[dict[str, Any]]:
    return [{"params": [parameter(3)], "weight_decai": 1}]


def adds() -> None:
    fusedopt.AdamW([parameter(3)]).add_param_group(misspelled()[0])


def steps() -> None:
    optimizer = fusedopt.AdamW([parameter(3)], state_dtype="8bit")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()


def loads() -> None:
    saved = fusedopt.AdamW([parameter(3, dtype=torch.bfloat16)], master_weights="split24")
    saved.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.bfloat16)
    saved.step()
    fusedopt.AdamW([parameter(3)], master_weights="split24").load_state_dict(saved.state_dict())


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (lambda: fusedopt.AdamW(misspelled()), "weight_decai"),
    "a class of a user's": (lambda: Own(misspelled()), "weight_decai"),
    "a name": (lambda: fusedopt.create_optimizer("adamw", misspelled()), "weight_decai"),
    "a group": (adds, "weight_decai"),
    "a note": (lambda: fusedopt.create_optimizer("adamw_torch_4bit", [parameter(3)]), "8 bits, not in 4"),
    "a step": (steps, "changes nothing here"),
    "a checkpoint": (loads, "it is dropped"),
    "a schedule": (
        lambda: fusedopt.get_scheduler("constant", torch.optim.SGD([parameter(3)]), num_warmup_steps=10),
        "num_warmup_steps=10 means nothing",
    ),
    "a schedule's length": (
        lambda: fusedopt.get_scheduler(
            "warmup_stable_decay", torch.optim.SGD([parameter(3)]), 1, 9,
            scheduler_specific_kwargs={"num_stable_steps": 2, "num_decay_steps": 3},
        ),
        "num_stable_steps wins",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "said"), CASES.values(), ids=CASES)
def test_a_warning_points_here(call: Callable[[], object], said: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [each for each in caught if said in str(each.message)]
    assert [each.filename for each in found] == [__file__]


def test_every_warning_does() -> None:
    others = []
    for path in Path(fusedopt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                levels = [ast.unparse(word.value) for word in node.keywords if word.arg == "stacklevel"]
                if levels != ["checks.callers_level()"]:
                    others.append(f"{path.name}:{node.lineno}")
    assert others == []
