"""Several threads and one optimizer: every step whole, one after the other (pytorch/pytorch#8149)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_run, make_params, set_grads

import fusedopt

SHAPES = [(64, 128), (70,), (300, 5)]
STEPS = 25


def run(*targets: Callable[[], None]) -> None:
    """Calls all at once; the first error that one of them ends with is raised here."""
    errors: list[BaseException] = []

    def call(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def new() -> fusedopt.AdamW:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), state_dtype="8bit", max_grad_norm=1.0)
    set_grads(optimizer.param_groups[0]["params"], 0)
    return optimizer


def test_no_step_is_lost() -> None:
    optimizer, expected = new(), new()

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.step()

    run(*[steps] * 4)
    for _ in range(4 * STEPS):
        expected.step()
    assert_same_run(optimizer, expected)


def test_loading_waits_for_a_step() -> None:
    optimizer = new()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.step()

    def loads() -> None:
        for _ in range(STEPS):
            optimizer.load_state_dict(saved)

    run(steps, loads, steps)
    counts = {float(state["step"]) for state in optimizer.state.values()}
    assert len(counts) == 1
    assert counts.pop() <= 1 + 2 * STEPS


@pytest.mark.thorough
def test_a_hundred_runs_of_steps_and_loading() -> None:
    for _ in range(100):
        optimizer = new()
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        done: list[str] = []

        def steps(optimizer: fusedopt.AdamW = optimizer, done: list[str] = done) -> None:
            for _ in range(4):
                optimizer.step()
                done.append("step")

        def loads(optimizer: fusedopt.AdamW = optimizer, saved: dict[str, Any] = saved) -> None:
            for _ in range(4):
                optimizer.load_state_dict(saved)

        run(steps, steps, steps, steps, loads)
        assert len(done) == 16
        assert all(param.isfinite().all() for param in optimizer.param_groups[0]["params"])


def test_copies_have_locks_of_their_own() -> None:
    optimizer = new()
    with optimizer._lock:
        thread = threading.Thread(target=copy.deepcopy(optimizer).step)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()
