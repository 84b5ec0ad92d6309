"""Parameters of a pretended device that are stepped on the host, whose copies are late: the bits of a usual step."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import assert_same_run, make_params, params_of, saved, set_grads, train
from queued import QueuedRuntime, queued, run  # noqa: F401

import fusedopt
from fusedopt.offload import host

SHAPES = [(40, 256), (3,), (7, 100), (), (0,), (30, 64)]

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows for little."""
    monkeypatch.setattr(host, "_WINDOW_NUMEL", 3000)


def on_host(cls: Any, params: Any, **kwargs: Any) -> Any:
    return cls(params, **{"step_device": "cpu", **kwargs})


def test_in_any_order(queued: QueuedRuntime) -> None:  # noqa: F811
    usual = train(fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=0.3), 2)
    plain = train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 2)
    for seed in range(1, 20):
        ours = run(queued, on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32), max_grad_norm=0.3), 2, seed=seed)
        assert_same_run(ours, usual)
        assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)
        assert_same_run(run(queued, on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32)), 2, seed=seed), plain)


@pytest.mark.parametrize("wait", [1, 2])
def test_a_wait_that_is_missing_is_found(queued: QueuedRuntime, wait: int) -> None:  # noqa: F811
    """The host's for a gradient, and the caller's for its weights."""
    usual = train(fusedopt.AdamW(make_params(SHAPES[:1], torch.float32)), 1)
    found = 0
    for seed in range(1, 20):
        queued.queues.late(seed)
        ours = on_host(fusedopt.AdamW, make_params(SHAPES[:1], torch.float32))
        set_grads(params_of(ours), 0)
        synchronize, queued.waits = queued.synchronize, 0
        if wait == 1:
            queued.synchronize = lambda event: None  # type: ignore[method-assign]
        else:
            queued.forget = {2}
        try:
            ours.step()
            queued.synchronize, queued.forget = synchronize, set()  # type: ignore[method-assign]
            queued.queues.synchronize_stream(queued.stream)  # all that a next kernel would wait for
            assert_same_run(ours, usual)
            queued.queues.synchronize()
        except (AssertionError, RuntimeError):
            found += 1
            queued.queues.drop_all()
        finally:
            queued.synchronize, queued.forget = synchronize, set()  # type: ignore[method-assign]
    assert found > 0


def test_weights_that_somebody_writes_are_what_is_stepped(queued: QueuedRuntime) -> None:  # noqa: F811
    """Also past autograd's count of versions."""
    ours = on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32))
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    for step in range(3):
        for optimizer in (ours, usual):
            for param in params_of(optimizer):
                param.data.mul_(0.5)
        run(queued, ours, 1, first=step)
        train(usual, 1, first=step)
    assert_same_run(ours, usual)


def test_checkpoints_and_options(queued: QueuedRuntime) -> None:  # noqa: F811
    """To a step on the device and back; learning rates and new groups are those of now."""
    usual = fusedopt.AdamW(make_params(SHAPES[:3], torch.float32), state_dtype="8bit")
    ours = on_host(fusedopt.AdamW, make_params(SHAPES[:3], torch.float32), state_dtype="8bit")
    for leg in range(3):
        for optimizer in (ours, usual):
            optimizer.param_groups[0]["lr"] = 0.01 / (leg + 1)
            if leg == 1:
                optimizer.add_param_group({"params": make_params(SHAPES[3:], torch.float32), "lr": 1e-3})
        run(queued, ours, 2, first=2 * leg)
        train(usual, 2, first=2 * leg)
        state = saved(ours.state_dict())
        params = [{**group, "params": [p.detach().clone() for p in group["params"]]} for group in ours.param_groups]
        options = {} if leg == 0 else {"step_device": "cpu"}
        ours = fusedopt.AdamW([{**group, "step_device": options.get("step_device")} for group in params])
        ours.load_state_dict(state)
        if leg == 0:  # as it is on this device
            ours = fusedopt.AdamW([{**group, "step_device": "cpu"} for group in params])
            ours.load_state_dict(state)
    assert_same_run(ours, usual)
    for held in ours.state.values():
        assert all(value.device.type == "cpu" for value in held.values())


def test_after_a_refused_step_options_are_those_of_now(queued: QueuedRuntime) -> None:  # noqa: F811
    ours = on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32))
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    for lr in (0.01, float("nan"), 0.5):
        for optimizer in (ours, usual):
            optimizer.param_groups[0]["lr"] = lr
            for param in params_of(optimizer):
                param.grad = None
            if math.isnan(lr):
                with pytest.raises(ValueError, match="lr"):
                    stepped(optimizer)
            else:
                stepped(optimizer)
            queued.queues.synchronize()
    assert_same_run(ours, usual)


def stepped(optimizer: Any) -> None:
    torch.stack([(param * param).sum() for param in params_of(optimizer)]).sum().backward()
    optimizer.step()


def test_what_stood_for_others_is_gone(queued: QueuedRuntime) -> None:  # noqa: F811
    """Parameters that others replace or reshape, with the pinned memory of what stood for them."""
    ours = on_host(fusedopt.SGD, make_params([(64,), (32,), (16,)], torch.float32), lr=0.5)
    run(queued, ours, 1)
    params = ours.param_groups[0]["params"]
    twins = [weakref.ref(ours._host_side._twins[param].bytes) for param in params]
    old = weakref.ref(params[0])
    ours.state.pop(params[0])
    params[0] = make_params([(48,)], torch.float32)[0]
    params[1].data = params[1].data[:8].clone()
    run(queued, ours, 2)
    gc.collect()
    assert old() is None
    assert [twin() is None for twin in twins] == [True, True, False]
    assert set(ours._host_side._twins) == set(params)
    assert len(ours._host_side._inner.state) == len(params)


def test_a_parameter_on_another_device_has_another_twin(queued: QueuedRuntime) -> None:  # noqa: F811
    ours = on_host(fusedopt.SGD, make_params([(64,)], torch.float32))
    run(queued, ours, 1)
    (param,) = params_of(ours)
    before = ours._host_side._twins[param]
    queued.device_of = lambda tensor: torch.device("cpu", 1)  # type: ignore[method-assign]
    run(queued, ours, 1)
    del queued.device_of
    assert ours._host_side._twins[param] is not before


@pytest.mark.parametrize("releases", [False, True])
def test_gradients_are_sparse_where_the_usual_step_takes_them(queued: QueuedRuntime, releases: bool) -> None:  # noqa: F811
    for cls in (fusedopt.AdamW, fusedopt.SGD):
        tables = [torch.nn.Embedding(5, 3, sparse=True) for _ in range(2)]
        tables[1].load_state_dict(tables[0].state_dict())
        ours, usual = on_host(cls, tables[0].parameters(), lr=0.1), cls(tables[1].parameters(), lr=0.1)
        if releases:
            fusedopt.release_gradients(ours, bucket_numel=1)
        for table, optimizer in zip(tables, (ours, usual)):
            before = table.weight.detach().clone()
            if cls is fusedopt.SGD:
                looked_up(table, optimizer)
                continue
            with pytest.raises(ValueError, match="which cannot be stepped: where a gradient has no number"):
                looked_up(table, optimizer)
            assert torch.equal(table.weight, before)
            assert not any(optimizer.state.values())
        queued.queues.synchronize()
        assert torch.equal(tables[0].weight, tables[1].weight)


def looked_up(table: torch.nn.Embedding, optimizer: Any) -> None:
    table(torch.tensor([1, 2, 1])).sum().backward()
    optimizer.step()


# ---- with the backward pass ------------------------------------------------------------------------------


def test_the_backward_pass_goes_on_meanwhile(queued: QueuedRuntime) -> None:  # noqa: F811
    """A step is taken while the backward pass is stopped in the middle, by a thread of its own."""
    params = make_params([(4000,)] * 3, torch.float32)
    ours = on_host(fusedopt.AdamW, params)
    stepped, thread = threading.Event(), []
    queued.queues.late(3)
    inner_step = fusedopt.AdamW._step_some

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = inner_step(self, *args, **kwargs)
        if self is not ours:
            thread.append(threading.current_thread().name)
            stepped.set()
        return found

    class Stops(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            assert stepped.wait(30)
            return grad

    with pytest.MonkeyPatch.context() as patch, fusedopt.release_gradients(ours, bucket_numel=1):
        patch.setattr(fusedopt.AdamW, "_step_some", noted)
        x = torch.ones(4000)
        for number, param in enumerate(params):
            x = (Stops.apply(x) if number == 1 else x) * param
        x.sum().backward()
        assert all(param.grad is None for param in params)
        ours.step()
    assert all(name.startswith("fusedopt-host") for name in thread)
    assert len(thread) == 3


@pytest.mark.parametrize("clip", [None, "exact", "previous", "parameter"])
def test_with_released_gradients(queued: QueuedRuntime, clip: str | None) -> None:  # noqa: F811
    options = {"max_grad_norm": None if clip is None else 0.2}
    ours = on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32), **options)
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), **options)
    queued.queues.late(7)
    for optimizer in (ours, usual):
        optimizer.record_health()
        with fusedopt.release_gradients(optimizer, bucket_numel=2000, clip=clip) as handle:
            for step in range(3):
                twins = [torch.nn.Parameter(param.detach()) for param in params_of(optimizer)]
                set_grads(twins, step)
                loss = torch.stack([(p * t.grad).sum() for p, t in zip(params_of(optimizer), twins)]).sum()
                handle.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                queued.queues.synchronize()
    assert_same_run(ours, usual)
    assert ours.health_report() == usual.health_report()
    if clip is not None:
        assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)


def test_the_report_counts_what_is_copied(queued: QueuedRuntime) -> None:  # noqa: F811
    ours = on_host(
        fusedopt.AdamW, make_params([(64, 64)], torch.bfloat16), state_dtype="8bit", master_weights="split24"
    )
    for _ in range(2):
        report = ours.memory_report()
        assert report.moved_bytes == 3 * 2 * 4096  # a gradient, and weights there and back
        assert report.places == {"device": 0, "host": 4 + 3 * 4096 + 2 * 64, "disk": 0}
        run(queued, ours, 1)


def test_on_the_cpu_it_changes_nothing() -> None:
    ours = train(on_host(fusedopt.AdamW, make_params(SHAPES, torch.float32), host_threads=1), 2)
    assert_same_run(ours, train(fusedopt.AdamW(make_params(SHAPES, torch.float32)), 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_device": "cuda"}, "step_device='cuda' steps nothing"),
        ({"step_device": "cpu", "state_device": "auto"}, "state_device='auto' asks for another place"),
        ({"step_device": "cpu", "host_threads": 0}, "host_threads=0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(make_params(SHAPES, torch.float32), **options)
