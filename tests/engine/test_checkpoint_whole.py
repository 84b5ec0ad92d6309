"""Loading is whole or not at all, shares nothing, and hooks and notes of users are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_run, make_params, saved, train

import fusedopt
from fusedopt.engine import checkpoint

SHAPES = [(65, 99), (300,), (), (1, 7)]


@pytest.mark.parametrize("fails", ["place", "copy"])
def test_loading_that_fails_changes_nothing(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk or a device is full, when some states are made or when they are filled."""
    optimizer = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), lr=0.5, master_weights="kahan"), 2)
    twin = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), lr=0.5, master_weights="kahan"), 2)
    state_dict = train(fusedopt.AdamW(make_params(SHAPES, torch.bfloat16), lr=0.1), 1).state_dict()
    state_dict["state"][3]["note"] = torch.zeros(3)
    before = saved(state_dict)
    held = {param: dict(state) for param, state in optimizer.state.items()}

    class Full(torch.Tensor):
        def copy_(self, *args: Any) -> Any:
            raise OSError("no space left")

    def failing(wanted: Any) -> list[torch.Tensor]:
        if fails == "place":
            raise torch.OutOfMemoryError("no room")
        return [*place(wanted)[:-1], torch.zeros(1).as_subclass(Full)]

    place = checkpoint.place
    monkeypatch.setattr(checkpoint, "place", failing)
    with pytest.raises((OSError, torch.OutOfMemoryError)):
        optimizer.load_state_dict(state_dict)
    monkeypatch.undo()
    assert optimizer.param_groups[0]["lr"] == 0.5
    for param, state in held.items():
        assert optimizer.state[param].keys() == state.keys()
        assert all(optimizer.state[param][key] is value for key, value in state.items())
    optimizer = train(optimizer, 1, first=2)
    assert_same_run(optimizer, train(twin, 1, first=2))
    optimizer.load_state_dict(state_dict)
    next(reversed(optimizer.state.values()))["note"].fill_(1)
    train(optimizer, 1, first=3)
    for number, state in before["state"].items():  # nothing of the state dict is shared
        for key, value in state.items():
            assert_same_bits(state_dict["state"][number][key], value)


def test_notes_on_parameters_that_were_never_stepped() -> None:
    optimizer = fusedopt.AdamW(make_params([(3,), (3,)], torch.float32))
    first, second = optimizer.param_groups[0]["params"]
    optimizer.state[second]["note"] = torch.ones(2)
    first.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert torch.equal(optimizer.state[second]["note"], torch.ones(2))
    first.grad, second.grad = None, torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.state[second]["note"], torch.ones(2))
    assert_same_bits(optimizer.state[second]["exp_avg"], optimizer.state[first]["exp_avg"])


def test_a_hook_may_return_another_state_dict() -> None:
    """Hooks see what would be returned without them, and what the last of them returns is returned."""
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32))
    usual = optimizer.state_dict()
    assert "seed" not in usual["param_groups"][0]
    optimizer.register_state_dict_post_hook(lambda _, found: {"mine": found})
    assert optimizer.state_dict() == {"mine": usual}
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


@pytest.mark.parametrize("stepped", [False, True])
def test_adagrads_states_may_be_shared(stepped: bool) -> None:
    optimizer = fusedopt.Adagrad(make_params([(64, 64)], torch.float32), state_dtype="8bit", master_weights="kahan")
    if stepped:
        train(optimizer, 1)
    optimizer.share_memory()
    (held,) = optimizer.state.values()
    assert held.keys() == {"step", "sum_codes", "sum_scales"}
    assert held["sum_codes"].is_shared()
    assert held["sum_scales"].is_shared()
    twin = train(fusedopt.Adagrad(make_params([(64, 64)], torch.float32), state_dtype="8bit"), 2)
    assert_same_run(train(optimizer, 1 if stepped else 2, first=int(stepped)), twin)
    assert held["sum_codes"].is_shared()
