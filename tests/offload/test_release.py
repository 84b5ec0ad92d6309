"""Gradient release: the bits of the usual step, with a bucket of gradients at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import (
    ADAFACTOR,
    DTYPES,
    FORMATS,
    Case,
    assert_same_bits,
    assert_same_run,
    format_kwargs,
    make_params,
    params_of,
    saved,
    set_grads,
)
from matrices import each_rule, masters, product
from torch import Tensor

import fusedopt
from fusedopt.offload.passes import check_reducers

SHAPES = [(40, 100), (7, 257), (65,), (3,), (), (30, 64), (0,)]
BUCKET = 3000


def backward(params: list[torch.nn.Parameter], step: int, handle: Any = None, scale: float = 1.0) -> None:
    """A backward pass that gives parameters the gradients of `set_grads`, the last ones first."""
    twins = [torch.nn.Parameter(param.detach()) for param in params]
    set_grads(twins, step, scale)
    # In float32 the gradient of each product is the other factor, and its sum's is 1.
    loss = torch.stack([(param * twin.grad).sum().float() for param, twin in zip(params, twins)]).sum()
    loss.backward() if handle is None else handle.backward(loss)


def train(optimizer: Any, steps: int, first: int = 0, handle: Any = None, scale: float = 1.0) -> Any:
    for step in range(first, first + steps):
        backward(params_of(optimizer), step, handle, scale)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def twins(make: Callable[[], Any], steps: int = 3, **release: Any) -> tuple[Any, Any]:
    """The same run with release and without."""
    released, usual = make(), make()
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, **release)
    train(released, steps, handle=handle)
    train(usual, steps)
    assert_same_run(released, usual)
    return released, usual


# Some of them, asked for 8 bits, have none that can be.
pytestmark = pytest.mark.filterwarnings("ignore:state_dtype='8bit' changes nothing here")
RULES = [*each_rule(), pytest.param(ADAFACTOR, ADAFACTOR.kwargs, id="adafactor")]


@pytest.mark.parametrize(("case", "kwargs", "dtype", "state_format"), product(RULES, DTYPES, FORMATS))
def test_every_rule_and_format(case: Case, kwargs: dict[str, Any], dtype: str, state_format: str) -> None:
    if case is ADAFACTOR and state_format == "mixed":
        pytest.skip("its states have other shapes")
    options = format_kwargs(case, kwargs, state_format)

    def make() -> Any:
        optimizer = case.ours(make_params(SHAPES, DTYPES[dtype]), **kwargs, **options)
        optimizer.record_health()
        return optimizer

    released, usual = twins(make)
    assert released.health_report() == usual.health_report()


@masters
def test_masters(dtype: str, rounding: str, master: str | None, state_format: str) -> None:
    options = {"rounding": rounding, "master_weights": master, **FORMATS[state_format]}
    twins(lambda: fusedopt.AdamW(make_params(SHAPES, DTYPES[dtype]), lr=1e-2, **options))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_parameters_of_all_kinds(backend: str) -> None:
    def make() -> Any:
        first, second = make_params([(20, 70), (40, 65)], torch.float32)
        transposed = torch.nn.Parameter(second.detach().clone().t())
        groups = [{"params": [first]}, {"params": [transposed, *make_params([(9, 9)], torch.float32)], "lr": 1e-3}]
        return fusedopt.AdamW(groups, lr=1e-2, backend=backend, max_grad_norm=0.1)

    twins(make, clip="exact")
    if backend == "eager":
        twins(lambda: fusedopt.AdamW(make_params([(9, 9), (7,)], torch.float64)))


def test_gradients_are_freed() -> None:
    """While the backward pass is at the first parameter, those of the last ones are gone."""
    params = make_params([(1000,)] * 10, torch.float32)
    left: list[int] = []
    with fusedopt.release_gradients(fusedopt.AdamW(params), bucket_numel=2000):
        x = torch.ones(1000)
        for param in params:  # a chain: the last is first in the backward pass
            x = x * param
        params[0].register_post_accumulate_grad_hook(lambda p: left.append(sum(q.grad is not None for q in params)))
        x.sum().backward()
    assert left == [0]
    assert all(param.grad is None for param in params)


# ---- accumulation, and parameters without gradients ------------------------------------------------------


@pytest.mark.parametrize("clip", [None, "exact"])
def test_accumulation(clip: str | None) -> None:
    """Some parameters have gradients in the first micro-batch only, some in the last only, some in both."""

    def run(releases: bool) -> Any:
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=None if clip is None else 0.3)
        params = params_of(optimizer)
        handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET, clip=clip) if releases else None
        for step in range(4):
            for batch, chosen in enumerate((params[:2], params[1:4], params[3:-1])):
                with handle.accumulate() if releases and batch < 2 else nullcontext():
                    backward(chosen, 10 * step + batch, handle)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    released, usual = run(True), run(False)
    assert_same_run(released, usual)
    if clip is not None:
        assert torch.equal(released.last_grad_norm, usual.last_grad_norm)
    assert not released.state[params_of(released)[-1]]  # it never had a gradient


def test_only_accumulated() -> None:
    """Without a pass that steps, the step does everything."""
    runs = []
    for releases in (True, False):
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=0.3)
        handle = fusedopt.release_gradients(optimizer, clip="exact") if releases else None
        with handle.accumulate() if releases else nullcontext():
            backward(params_of(optimizer), 0)
        optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)
    assert torch.equal(*(optimizer.last_grad_norm for optimizer in runs))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_exact_clipping(dtype: str, loss_scale: float) -> None:
    def make(**options: Any) -> Any:
        return fusedopt.AdamW(make_params(SHAPES, DTYPES[dtype]), lr=1e-2, max_grad_norm=0.7, **options)

    released, usual = make(), make()
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="exact", loss_scale=loss_scale)
    for step in range(4):
        train(released, 1, step, handle, scale=loss_scale * 10.0**-step)
        usual.grad_scale = torch.tensor(loss_scale)
        train(usual, 1, step, scale=loss_scale * 10.0**-step)
        assert torch.equal(released.last_grad_norm, usual.last_grad_norm)
    assert_same_run(released, usual)


def test_clipping_by_the_norm_before() -> None:
    """Each step is the unclipped one of gradients times the last coefficient; the first is within the limit."""
    released, plain = (
        fusedopt.SGD(make_params(SHAPES, torch.float32), lr=0.5, **o) for o in ({"max_grad_norm": 0.7}, {})
    )
    handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="previous")
    before = [param.detach().clone() for param in params_of(released)]
    train(released, 1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, params_of(released))]).norm() / 0.5
    assert 0.2 < moved < 0.7 * 1.00001  # float32's
    for param, twin in zip(params_of(plain), params_of(released)):
        param.data.copy_(twin)
    plain.load_state_dict(released.state_dict() | {"param_groups": plain.state_dict()["param_groups"]})
    for step in range(1, 4):
        norm = float(released.last_grad_norm)
        set_grads(params_of(plain), step)
        for param in params_of(plain):
            param.grad.mul_(min(1.0, 0.7 / (norm + 1e-6)))
        plain.step()
        if step == 2:  # as after a resume
            kept = saved(handle.state_dict())
            handle.remove()
            handle = fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="previous")
            handle.load_state_dict(kept)
        train(released, 1, step, handle)
        set_grads(params_of(plain), step)
        expected = torch.cat([param.grad.flatten() for param in params_of(plain)]).double().norm()
        torch.testing.assert_close(released.last_grad_norm.double(), expected, rtol=1e-6, atol=0)  # float32's
    for param, twin in zip(params_of(plain), params_of(released)):
        assert_same_bits(param, twin)


def test_clipping_each_parameter() -> None:
    released = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=0.1)
    single = [fusedopt.AdamW([param], max_grad_norm=0.1) for param in make_params(SHAPES, torch.float32)]
    with fusedopt.release_gradients(released, bucket_numel=BUCKET, clip="parameter"):
        train(released, 3)
    for step in range(3):
        set_grads([params_of(one)[0] for one in single], step)
        for one in single:
            one.step()
    for param, one in zip(params_of(released), single):
        assert_same_bits(param, params_of(one)[0])
    norms = torch.stack([one.last_grad_norm for one in single if one.last_grad_norm is not None])
    torch.testing.assert_close(released.last_grad_norm, norms.norm(), rtol=1e-6, atol=0)  # summed in another order


def test_listed_twice() -> None:
    def make() -> Any:
        params = make_params(SHAPES[:3], torch.float32)
        with pytest.warns(UserWarning, match="duplicate"):
            return fusedopt.SGD([params[0], params[1], params[0], params[2]], lr=0.1, momentum=0.9)

    runs = []
    for releases in (True, False):
        optimizer = make()
        handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET) if releases else None
        params = list(dict.fromkeys(params_of(optimizer)))
        for step in range(3):
            with handle.accumulate() if releases else nullcontext():  # so that a bucket is not all that has gradients
                backward(params, step, handle)
            backward(params, step, handle)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_run(*runs)


# ---- models ----------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """A weight that is used at both ends, and a layer that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 32)
        self.middle = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        self.unused = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.head(self.middle(self.embed(x))), x.roll(1))


def fit(
    releases: bool, steps: int = 4, model: torch.nn.Module | None = None, **release: Any
) -> tuple[Any, list[float]]:
    model = model or Tied()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle = fusedopt.release_gradients(optimizer, **release) if releases else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    losses = []
    for step in range(steps):
        loss = model(torch.randint(50, (8,), generator=torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    if handle is not None:
        handle.remove()
    return optimizer, losses


@pytest.mark.parametrize("bucket", [1, 2000, 2**20])
def test_tied_and_unused_weights(bucket: int) -> None:
    released, losses = fit(True, bucket_numel=bucket)
    usual, expected = fit(False)
    assert losses == expected
    assert_same_run(released, usual)


def test_checkpoints_in_the_backward_pass() -> None:
    """Reentrant ones run passes of their own within the pass."""

    class Checkpointed(Tied):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.middle[:2]:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
            return self.middle[2](x).square().mean()  # comes first in the backward pass

    released, losses = fit(True, model=Checkpointed(), bucket_numel=1)
    usual, expected = fit(False, model=Checkpointed())
    assert losses == expected
    assert_same_run(released, usual)


def test_hooks_of_steps_and_new_groups() -> None:
    runs = []
    for releases in (True, False):
        params = make_params(SHAPES, torch.float32)
        params[1].requires_grad_(False)
        optimizer = fusedopt.AdamW(params[:3])
        if releases:
            fusedopt.release_gradients(optimizer, bucket_numel=BUCKET)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))  # noqa: B023
        for step in range(4):
            if step == 1:
                optimizer.add_param_group({"params": params[3:], "lr": 1e-2})
            if step == 2:
                params[1].requires_grad_(True)
            backward([param for param in params_of(optimizer) if param.requires_grad], step)
            if releases and step == 3:
                assert all(param.grad is None for param in params[:2])
            optimizer.step()
            optimizer.zero_grad()
        assert calls == ["before", "after"] * 4
        runs.append(optimizer)
    assert_same_run(*runs)


def test_a_closure() -> None:
    runs = []
    for releases in (True, False):
        optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
        if releases:
            fusedopt.release_gradients(optimizer)

        def closure(optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            backward(params_of(optimizer), 0)
            return 3.0

        assert optimizer.step(closure) == 3.0
        runs.append(optimizer)
    assert_same_run(*runs)


def test_the_report_counts_a_bucket() -> None:
    optimizer = fusedopt.AdamW(make_params([(100, 100)] * 8, torch.float32))
    assert optimizer.memory_report().ours["gradients"] == 4 * 80_000
    with fusedopt.release_gradients(optimizer, bucket_numel=15_000):
        assert optimizer.memory_report().ours["gradients"] == 4 * (14_999 + 10_000)
    assert optimizer.memory_report().ours["gradients"] == 4 * 80_000


# ---- what goes wrong -------------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("a failure in the backward pass")


@pytest.mark.parametrize("bucket", [1, 2000, 2**20])
def test_two_backward_passes_without_a_step(bucket: int) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=1e-2)
    fusedopt.release_gradients(optimizer, bucket_numel=bucket)
    backward(params_of(optimizer), 0)
    with pytest.raises(ValueError, match=r"a second gradient came for parameter \d of group 0 before optimizer.step"):
        backward(params_of(optimizer), 1)
    with pytest.raises(ValueError, match="a second gradient came"):
        optimizer.step()
    optimizer.zero_grad()
    train(optimizer, 1)
    optimizer.step()


def test_a_backward_pass_that_raises() -> None:
    """What it has stepped stays so; the next pass steps everything."""
    optimizer = fusedopt.SGD(make_params([(500,)] * 4, torch.float32), lr=1.0)
    params = params_of(optimizer)
    fusedopt.release_gradients(optimizer, bucket_numel=1000)
    before = [param.detach().clone() for param in params]
    x = torch.ones(500)
    for i, param in enumerate(params):
        x = (Fails.apply(x) if i == 1 else x) * 1.0 + param
    with pytest.raises(RuntimeError, match="a failure in the backward pass"):
        x.sum().backward()
    steps = [(a - b).mean().item() for a, b in zip(before, params)]
    assert steps[0] == 0
    assert sum(steps) == pytest.approx(2.0, rel=1e-5)  # a bucket of two of the other three; rounding of float32
    optimizer.zero_grad()
    before = [param.detach().clone() for param in params]
    sum(param.sum() for param in params).backward()
    optimizer.step()
    assert all(torch.equal(param, old - 1) for param, old in zip(params, before))


@pytest.mark.parametrize("wants", ["accumulate", "exact"])
def test_an_exception_within_its_contexts(wants: str) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    usual = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    handle = fusedopt.release_gradients(optimizer, bucket_numel=BUCKET, clip="exact")
    loss = Fails.apply(params_of(optimizer)[0]).sum() + params_of(optimizer)[1].sum()
    with (
        pytest.raises(RuntimeError, match="a failure"),
        handle.accumulate() if wants == "accumulate" else nullcontext(),
    ):
        handle.backward(loss)
    optimizer.zero_grad()
    train(optimizer, 2, handle=handle)
    train(usual, 2)
    assert_same_run(optimizer, usual)


def test_exact_clipping_needs_its_own_backward() -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0)
    fusedopt.release_gradients(optimizer, clip="exact")
    with pytest.raises(ValueError, match=r"call handle.backward\(loss\) instead"):
        backward(params_of(optimizer), 0)


def test_settings_that_change_between_backward_and_step() -> None:
    lr = torch.tensor(1e-2)
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), lr=lr)
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    backward(params_of(optimizer), 0)
    lr.fill_(1e-3)
    with pytest.raises(ValueError, match=r"lr of group 0 has changed since the backward pass.*before the backward"):
        optimizer.step()
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32))
    fusedopt.release_gradients(optimizer, bucket_numel=1)
    backward(params_of(optimizer), 0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    with pytest.raises(ValueError, match="weight_decay of group 0 has changed"):
        optimizer.step()


@pytest.mark.parametrize("clips", [True, False])
def test_dynamic_loss_scaling(clips: bool) -> None:
    optimizer = fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=1.0 if clips else None)
    fusedopt.release_gradients(optimizer, clip="previous" if clips else None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(param.sum() for param in params_of(optimizer))).backward()
    with pytest.raises(ValueError, match=r"GradScaler finds out whether a gradient is inf only.*constant loss_scale"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, {"bucket_numel": 0}, ValueError, "bucket_numel=0"),
        ({}, {"bucket_numel": 1.5}, TypeError, "bucket_numel"),
        ({}, {"clip": "exact"}, ValueError, "no norm to clip to; make the optimizer with max_grad_norm"),
        ({}, {"loss_scale": 0.0}, ValueError, "loss_scale=0"),
        ({"max_grad_norm": 1.0}, {}, ValueError, "pass clip='exact'"),
        ({"max_grad_norm": 1.0}, {"clip": "exakt"}, ValueError, "clip='exakt'.*'exact'"),
    ],
)
def test_arguments(options: dict, arguments: dict, error: type[Exception], message: str) -> None:
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32), **options)
    with pytest.raises(error, match=message):
        fusedopt.release_gradients(optimizer, **arguments)
    assert params_of(optimizer)[0]._post_accumulate_grad_hooks is None


def test_another_optimizer_and_a_second_handle() -> None:
    with pytest.raises(TypeError, match="is a SGD; pass an optimizer of fusedopt"):
        fusedopt.release_gradients(torch.optim.SGD(make_params([(3,)], torch.float32)))
    optimizer = fusedopt.AdamW(make_params([(3,)], torch.float32))
    with fusedopt.release_gradients(optimizer), pytest.raises(ValueError, match="releases gradients already"):
        fusedopt.release_gradients(optimizer)
    fusedopt.release_gradients(optimizer).remove()
    twins(lambda: optimizer, 0)


# ---- processes -------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[None]:
    """A group of one process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2(world: None) -> None:
    from torch.distributed.fsdp import fully_shard

    def model() -> torch.nn.Module:
        found = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 50))
        for layer in (*found[1:], found):
            fully_shard(layer)
        torch.manual_seed(0)
        for param in found.parameters():
            torch.nn.init.normal_(param.to_local())
        return torch.nn.ModuleList([found])

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.model,) = model()

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(self.model(x), x)

    released, losses = fit(True, model=Loss(), bucket_numel=1)
    usual, expected = fit(False, model=Loss())
    assert losses == expected
    for param, twin in zip(params_of(released), params_of(usual)):
        assert_same_bits(param.to_local(), twin.to_local())
        for key, value in usual.state[twin].items():
            ours = released.state[param][key]
            assert_same_bits(ours if key == "step" else ours.to_local(), value if key == "step" else value.to_local())
    with pytest.raises(ValueError, match="would take the norm of this process's shards"):
        fusedopt.release_gradients(fusedopt.AdamW(Loss().parameters(), max_grad_norm=1.0), clip="exact")


def test_distributed_data_parallel(world: None) -> None:
    """Whichever comes first, the wrapper or the handle."""
    model = Tied()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    message = "belong to a DistributedDataParallel, which averages gradients.*use FSDP2"
    with pytest.raises(ValueError, match=message):
        fusedopt.release_gradients(fusedopt.AdamW(model.parameters()))
    check_reducers(Tied().parameters())
    del wrapped
    model = Tied()
    fusedopt.release_gradients(fusedopt.AdamW(model.parameters()))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match=message):
        wrapped(torch.arange(8)).backward()
