"""Steps that a CUDA graph captures, on the pretended device: replays are steps, or a sentence says why not."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from cases import FORMATS, Case, assert_same_run, format_kwargs, make_params, params_of, set_grads, train
from queued import QueuedRuntime, queued  # noqa: F401

import fusedopt

SHAPES = [(60, 256), (3,), (9, 1500)]
ADAMW = Case("adamw", fusedopt.AdamW, torch.optim.AdamW)

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


def made(runtime: QueuedRuntime, steps: int, **kwargs: Any) -> Any:
    """An optimizer on the pretended device that has taken steps and has gradients for another."""
    place = {} if "step_device" in kwargs else {"state_device": "cpu", "stream_bytes": 1 << 16}
    if kwargs.get("state_device") == "disk":
        kwargs["state_device"] = f"disk:{tempfile.gettempdir()}"
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cuda", **{**place, **kwargs})
    set_grads(params_of(optimizer), 0)
    for step in range(steps):
        give(optimizer, step)
        optimizer.step()
        runtime.queues.synchronize()
        runtime.alive.clear()
    return optimizer


def give(optimizer: Any, step: int) -> None:
    """Gradients of a step, in the memory that the graph reads."""
    grads = [param.grad for param in params_of(optimizer)]
    set_grads(params_of(optimizer), step)
    for param, grad in zip(params_of(optimizer), grads):
        grad.copy_(param.grad)
        param.grad = grad


@pytest.mark.parametrize("state_format", FORMATS)
def test_replays_are_steps(queued: QueuedRuntime, state_format: str) -> None:  # noqa: F811
    options = format_kwargs(ADAMW, {}, state_format)
    ours = made(queued, 1, **options)
    queued.queues.late(7)
    with queued.capture() as replay:
        ours.step()
    assert float(ours.state[params_of(ours)[0]]["step"]) == 1
    for step in range(1, 4):
        give(ours, step)
        replay()
        # Whoever reads states finds those of the replay, which an optimizer is not told of.
        assert float(ours.state[params_of(ours)[0]]["step"]) == step + 1
    for step, is_captured in ((4, False), (5, True)):  # with a usual step in between, and other buffers
        ours.param_groups[0]["stream_bytes"] = 1 << 17
        give(ours, step)
        replay() if is_captured else ours.step()
        queued.queues.synchronize()
    assert_same_run(ours, train(fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu", **options), 6))


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"max_grad_norm": 1.0}, 1, "a step that clips and has states on the host waits for the gradients' norm"),
        ({"found_inf": 0.0}, 1, "it reads found_inf and grad_scale on the host"),
        ({"grad_scale": 2.0}, 1, "it reads found_inf and grad_scale on the host"),
        ({"counts": True}, 1, "reports of health and of norms look at states and weights after a step"),
        ({"state_device": "disk"}, 1, "the host copies states in files during a step"),
        ({}, 0, "states are made in the first step.*take a step, or load a state dict, before capturing"),
        ({"step_device": "cpu"}, 1, "step_device='cpu' steps in a thread of the host"),
        ({"step_device": "cpu"}, 0, "step_device='cpu' steps in a thread of the host"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_record(
    queued: QueuedRuntime,  # noqa: F811
    options: dict[str, Any],
    steps: int,
    message: str,
) -> None:
    options = dict(options)
    scaling = {key: torch.tensor(options.pop(key)) for key in ("found_inf", "grad_scale") if key in options}
    counts = options.pop("counts", False)
    ours = made(queued, steps, **options)
    before = [param.detach().clone() for param in params_of(ours)]
    vars(ours).update(scaling)
    if counts:
        ours.record_health()
    with queued.capture(), pytest.raises(ValueError, match=message):
        ours.step()
    queued.queues.synchronize()
    assert all(torch.equal(param, old) for param, old in zip(params_of(ours), before))
    assert [float(held["step"]) for held in ours.state.values()] == [float(steps)] * len(SHAPES) * bool(steps)
