"""Where states and steps are, beside other options: the bits of a usual step, or a sentence before anything moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, assert_same_bits, assert_same_run, make_params, params_of, saved, set_grads
from queued import QueuedRuntime, queued  # noqa: F401

import fusedopt
from fusedopt.offload import disk, host

SHAPES = [(40, 256), (3,), (30, 64), (70, 100)]
PLACES = ["cpu", "auto", "disk", "host", "files"]
STREAMED = ("cpu", "auto", "files")  # by kernels of the device; "files" are its states on a disk
LIES_IN = {"cpu": "host", "auto": "host", "disk": "disk", "host": "host", "files": "disk"}

pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows for little."""
    monkeypatch.setattr(host, "_WINDOW_NUMEL", 5000)
    monkeypatch.setattr(disk.windows, "__defaults__", (1 << 16,))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> QueuedRuntime | None:
    """The pretended device; none for "disk", which is for parameters on the CPU."""
    place = request.node.callspec.params["place"]
    return None if place == "disk" else request.getfixturevalue("queued")


def options_of(place: str, tmp_path: Path) -> dict[str, Any]:
    if place == "host":
        return {"step_device": "cpu"}
    where = {"state_device": f"disk:{tmp_path}" if place in ("disk", "files") else place}
    return where if place == "disk" else {**where, "stream_bytes": 1 << 16, "reserve_bytes": 1 << 62}


def backward(params: list[torch.nn.Parameter], step: int, spoils: bool) -> None:
    """A backward pass that gives parameters the gradients of `set_grads`."""
    twins = [torch.nn.Parameter(param.detach()) for param in params]
    set_grads(twins, step)
    if spoils:
        twins[0].grad[3, 70] = float("nan")
        twins[2].grad[1, 5] = float("inf")
    torch.stack([(param * twin.grad).sum() for param, twin in zip(params, twins)]).sum().backward()


def run(
    optimizer: Any, device: QueuedRuntime | None, steps: int, spoilt: int | None = None, releases: bool = False
) -> Any:
    optimizer.record_health()
    handle = fusedopt.release_gradients(optimizer, bucket_numel=9000) if releases else None
    for step in range(steps):
        if device is not None:
            device.queues.late(step + 3)
        backward(params_of(optimizer), step, step == spoilt)
        optimizer.step()
        if device is not None:
            device.queues.synchronize()
            device.alive.clear()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    return optimizer


def assert_states_lie(optimizer: Any, place: str) -> None:
    """States are where the test means them to be, so that nothing is proven of another place."""
    held = optimizer.memory_report().places
    assert max(held, key=held.__getitem__) == LIES_IN[place], held


@pytest.mark.parametrize("releases", [False, True], ids=["whole steps", "released"])
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
@pytest.mark.parametrize("place", PLACES)
def test_skipped_blocks(
    place: str, state_dtype: str, releases: bool, device: QueuedRuntime | None, tmp_path: Path
) -> None:
    kwargs = {"nonfinite": "skip_block", "state_dtype": state_dtype}
    own = {"backend": "cuda"} if place in STREAMED else {}  # streamed, by kernels of the device
    ours = fusedopt.AdamW(make_params(SHAPES, torch.float32), **kwargs, **own, **options_of(place, tmp_path))
    run(ours, device, 3, spoilt=1, releases=releases)
    assert_states_lie(ours, place)
    usual = run(fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu", **kwargs), None, 3, spoilt=1)
    assert_same_run(ours, usual)
    assert ours.health_report() == usual.health_report()
    assert ours.health_report().totals["skipped"] == (
        2 if state_dtype == "float32" else 64 + 1
    )  # one has too few elements for 8 bits


@pytest.mark.parametrize("place", PLACES)
def test_states_made_before_steps(place: str, device: QueuedRuntime | None, tmp_path: Path) -> None:
    ours = fusedopt.AdamW(make_params(SHAPES, torch.float32), **options_of(place, tmp_path))
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu")
    for optimizer in (ours, usual):
        optimizer.init_state()
    kept = saved(ours.state_dict())
    run(ours, device, 2)
    ours.load_state_dict(kept)  # to the beginning
    for param, fresh in zip(params_of(ours), make_params(SHAPES, torch.float32)):
        param.data.copy_(fresh)
    assert_same_run(run(ours, device, 2), run(usual, None, 2))


@pytest.mark.parametrize("place", ["cpu", "disk", "files"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_compiled_steps(place: str, max_grad_norm: float | None, device: QueuedRuntime | None, tmp_path: Path) -> None:
    kwargs = {"max_grad_norm": max_grad_norm}
    own = {} if device is None else {"backend": "cuda"}
    ours = fusedopt.AdamW(make_params(SHAPES, torch.float32), **kwargs, **own, **options_of(place, tmp_path))
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu", **kwargs)
    step = torch.compile(ours.step, backend="eager", fullgraph=False)
    for number in range(3):
        set_grads(params_of(ours), number)
        set_grads(params_of(usual), number)
        step()
        usual.step()
        if device is not None:
            device.queues.synchronize()
            device.alive.clear()
    assert_same_run(ours, usual)
    assert [ring.size for ring in ours._streamer()._rings.values()] == ([] if device is None else [1 << 16])


@pytest.mark.parametrize("clip", [None, "exact", "previous"])
def test_groups_here_and_on_the_host(queued: QueuedRuntime, clip: str | None) -> None:  # noqa: F811
    """Of one optimizer: a norm goes over both, and each is stepped where its group says."""

    def make(*options: dict[str, Any]) -> Any:
        params = make_params(SHAPES, torch.float32)
        groups = [{"params": params[k : k + 2], **each} for k, each in zip((0, 2), options)]
        return fusedopt.AdamW(groups, lr=1e-2, max_grad_norm=None if clip is None else 0.3)

    ours = make({"step_device": "cpu"}, {"state_device": "cpu", "stream_bytes": 1 << 16})
    usual = make({}, {})
    for optimizer in (ours, usual):
        optimizer.record_health()
        for releases in (False, True):
            handle = fusedopt.release_gradients(optimizer, bucket_numel=9000, clip=clip) if releases else None
            for step in range(3):
                queued.queues.late(step + 3)
                twins = [torch.nn.Parameter(param.detach()) for param in params_of(optimizer)]
                set_grads(twins, step)
                loss = torch.stack([(p * t.grad).sum() for p, t in zip(params_of(optimizer), twins)]).sum()
                loss.backward() if handle is None else handle.backward(loss)
                optimizer.step()
                queued.queues.synchronize()
                optimizer.zero_grad()
            if handle is not None:
                handle.remove()
    assert_same_run(ours, usual)
    assert ours.health_report() == usual.health_report()
    on_host = [queued.is_host(ours.state[param]["exp_avg"]) for param in params_of(ours)]
    assert on_host[2:] == [True, True]  # pinned, to be streamed
    if clip is not None:
        assert torch.equal(ours.last_grad_norm, usual.last_grad_norm)


def test_a_backward_pass_that_raises(queued: QueuedRuntime) -> None:  # noqa: F811
    """What the host was to step is stepped, the next pass does not get in its way, and zero_grad waits for weights."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a failure in the backward pass")

    params = make_params([(4000,)] * 3, torch.float32)
    ours = fusedopt.SGD(params, lr=1.0, step_device="cpu")
    fusedopt.release_gradients(ours, bucket_numel=1)
    for clears, seed in [(True, 5), *((False, seed) for seed in range(1, 12))]:
        queued.queues.late(seed)
        before = [param.detach().clone() for param in params]
        x = torch.ones(4000)
        for number, param in enumerate(params):
            x = (Fails.apply(x) if number == 1 else x) * 1.0 + param
        with pytest.raises(RuntimeError, match="a failure in the backward pass"):
            x.sum().backward()
        if clears:
            ours.zero_grad()
            queued.queues.synchronize_stream(queued.stream)  # all that the next forward pass would wait for
            assert all(torch.equal(param, old - 1) for param, old in zip(params[1:], before[1:]))
        # The last that was stepped is the first of this pass: its weights are on their way.
        (params[0].sum() + params[2].sum() + params[1].sum()).backward()
        ours.step()
        queued.queues.synchronize()
        ours.zero_grad()
        assert torch.equal(params[0], before[0] - 1)
        assert all(torch.equal(param, old - 1 - 1) for param, old in zip(params[1:], before[1:]))


def test_a_second_pass_that_raises(queued: QueuedRuntime) -> None:  # noqa: F811
    """Gradients that were measured and not stepped are not those of the next pass."""

    class FailsTheSecondTime(torch.autograd.Function):
        passes = 0

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            FailsTheSecondTime.passes += 1
            if FailsTheSecondTime.passes == 2:
                raise RuntimeError("a failure in the second pass")
            return grad

    ours = fusedopt.SGD(make_params([(4000,)] * 2, torch.float32), lr=1.0, step_device="cpu", max_grad_norm=1e9)
    params = params_of(ours)
    handle = fusedopt.release_gradients(ours, bucket_numel=1, clip="exact")
    queued.queues.late(5)
    with pytest.raises(RuntimeError, match="a failure in the second pass"):
        handle.backward(FailsTheSecondTime.apply(params[0] * 3).sum() + params[1].sum())
    ours.zero_grad()
    queued.queues.synchronize()
    before = [param.detach().clone() for param in params]
    handle.backward(sum(param.sum() for param in params))
    ours.step()
    queued.queues.synchronize()
    assert all(torch.equal(param, old - 1) for param, old in zip(params, before))


def test_what_the_host_steps_is_waited_for_by_who_reads_states(queued: QueuedRuntime) -> None:  # noqa: F811
    ours = fusedopt.SGD(make_params(SHAPES, torch.float32), lr=1.0, momentum=0.9, step_device="cpu")
    with fusedopt.release_gradients(ours, bucket_numel=1):
        for step in range(2):
            queued.queues.late(5)
            backward(params_of(ours), step, False)
            assert all(float(held["step"]) == step + 1 for held in ours.state.values())
            ours.step()
            queued.queues.synchronize()


# ---- processes -------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[None]:
    """A group of one process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def sharded(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    params = make_params(shapes, torch.float32)
    return [torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])) for param in params]


def set_sharded_grads(params: list[Any], step: int) -> None:
    from torch.distributed.tensor import DTensor

    twins = [torch.nn.Parameter(param.to_local().detach()) for param in params]
    set_grads(twins, step)
    for param, twin in zip(params, twins):
        param.grad = DTensor.from_local(twin.grad, param.device_mesh, param.placements)


@pytest.mark.parametrize("options", [{"state_device": "disk"}, {"state_device": "cpu"}, {"step_device": "cpu"}])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_shards_on_the_cpu(world: None, options: dict[str, Any], max_grad_norm: float | None, tmp_path: Path) -> None:
    """As FSDP2's CPUOffloadPolicy has them."""
    options = {key: f"disk:{tmp_path}" if value == "disk" else value for key, value in options.items()}
    runs = []
    for each in (options, {}):
        optimizer = fusedopt.AdamW(sharded(SHAPES), max_grad_norm=max_grad_norm, **each)
        for step in range(2):
            set_sharded_grads(params_of(optimizer), step)
            optimizer.step()
        runs.append(optimizer)
    for param, twin in zip(*map(params_of, runs)):
        assert_same_bits(param.to_local(), twin.to_local())
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(runs[0].state[param][key].to_local(), runs[1].state[twin][key].to_local())
    if max_grad_norm is not None:
        assert torch.equal(*(optimizer.last_grad_norm for optimizer in runs))


def test_a_norm_over_other_processes_is_refused(world: None, queued: QueuedRuntime) -> None:  # noqa: F811
    kwargs = {"max_grad_norm": 1.0, "grad_norm_group": torch.distributed.group.WORLD}
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), **kwargs)
    with pytest.raises(ValueError, match=r"clip='previous'.*grad_norm_group"):
        fusedopt.release_gradients(optimizer, clip="previous")
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), step_device="cpu", **kwargs)
    before = [param.detach().clone() for param in params_of(optimizer)]
    set_grads(params_of(optimizer), 0)
    with pytest.raises(ValueError, match=r"step_device='cpu' steps parameters that are on one device.*grad_norm_group"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params_of(optimizer), before))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_device": "cpu"}, r"step_device='cpu' steps parameters that are on one device.*has DTensors"),
        ({"state_device": "cpu", "backend": "cuda"}, r"it is a DTensor on cpu, whose states must be there, too"),
        ({"state_device": "auto", "backend": "cuda"}, r"it is a DTensor on cpu, .*pass None, or FSDP2's CPUOffload"),
    ],
)
def test_shards_on_a_device_are_refused_before_anything_changes(
    world: None,
    queued: QueuedRuntime,  # noqa: F811
    options: dict[str, Any],
    message: str,
) -> None:
    optimizer = fusedopt.AdamW(sharded(SHAPES), **options)
    before = [param.to_local().clone() for param in params_of(optimizer)]
    set_sharded_grads(params_of(optimizer), 0)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(param.to_local(), old) for param, old in zip(params_of(optimizer), before))
    assert not any(optimizer.state.values())


def test_sums_over_shards_are_not_released(world: None) -> None:
    optimizer = fusedopt.Adafactor(sharded(SHAPES))
    with pytest.raises(ValueError, match=r"Adafactor sums over the shards of DTensors.*do not release them"):
        fusedopt.release_gradients(optimizer)
    set_sharded_grads(params_of(optimizer), 0)
    optimizer.step()  # nobody has hooked anything


def test_a_norm_that_is_asked_for_later_is_refused() -> None:
    """Where gradients are released already, and nobody said how to clip."""
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    before = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 needs the norm of all gradients"):
        backward(params_of(optimizer), 0, False)
    assert all(torch.equal(param, old) for param, old in zip(params_of(optimizer), before))


@pytest.mark.parametrize("clips", [None, 0.3])
@pytest.mark.parametrize("place", PLACES)
def test_steps_above_a_norm_are_left_out(
    place: str, clips: float | None, device: QueuedRuntime | None, tmp_path: Path
) -> None:
    """The second step has gradients that are not finite, and therefore no norm to clip to either."""
    kwargs = {"skip_step_above": 1e6, "max_grad_norm": clips, "state_dtype": "8bit"}
    own = {"backend": "cuda"} if place in STREAMED else {}
    ours = fusedopt.AdamW(make_params(SHAPES, torch.float32), **kwargs, **own, **options_of(place, tmp_path))
    run(ours, device, 3, spoilt=1)
    usual = run(fusedopt.AdamW(make_params(SHAPES, torch.float32), backend="cpu", **kwargs), None, 3, spoilt=1)
    assert_same_run(ours, usual)
    assert {float(ours.state[param]["step"]) for param in params_of(ours)} == {2.0}


def test_released_gradients_are_stepped_before_their_norm_is_known() -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), skip_step_above=10.0)
    with pytest.raises(ValueError, match=r"skip_step_above=10.0 needs the norm of all gradients before the first"):
        fusedopt.release_gradients(optimizer)


@pytest.mark.parametrize("releases", [False, True], ids=["whole steps", "released"])
@pytest.mark.parametrize("place", PLACES)
def test_steps_that_change_param_groups(
    place: str, releases: bool, device: QueuedRuntime | None, tmp_path: Path
) -> None:
    """Once each, after all parameters."""
    cls = next(case.ours for case in CASES if case.ours.changes_groups)
    own = {"backend": "cuda"} if place in STREAMED else {}
    ours = cls(make_params(SHAPES, torch.float32), **own, **options_of(place, tmp_path))
    run(ours, device, 3, releases=releases)
    usual = run(cls(make_params(SHAPES, torch.float32), backend="cpu"), None, 3)
    assert_same_run(ours, usual)
    same = [key for key, value in usual.param_groups[0].items() if not isinstance(value, (list, torch.Tensor))]
    kept = {"state_device", "stream_bytes", "reserve_bytes", "step_device", "backend"}
    assert {key: ours.param_groups[0][key] for key in same if key not in kept} == {
        key: usual.param_groups[0][key] for key in same if key not in kept
    }
