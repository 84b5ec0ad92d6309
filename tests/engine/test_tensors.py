"""Every kind of tensor that a model may hold."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from cases import DTYPES, assert_same_bits, assert_same_run, make_params, set_grads, train

import fusedopt

BACKENDS = ["cpu", "eager"]


def step_like(param: torch.nn.Parameter, steps: int = 3, **kwargs: object) -> torch.Tensor:
    """What a contiguous copy of a parameter becomes."""
    twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    train(fusedopt.AdamW([twin], lr=1e-2, **kwargs), steps)
    return twin.detach()


LAYOUTS = {
    "transposed": lambda: torch.randn(33, 65).t(),
    "strided": lambda: torch.randn(100, 7)[::3, 1:6],
    "channels_last": lambda: torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
    "offset": lambda: torch.randn(1000)[3:],
    "permuted": lambda: torch.randn(3, 4, 5).permute(2, 0, 1),
    "negated and contiguous": lambda: torch._neg_view(torch.randn(50)),
    "negated view": lambda: torch.randn(50, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_stepped_in_place(layout: str, rounding: str, backend: str) -> None:
    torch.manual_seed(0)
    tensor = LAYOUTS[layout]()
    param = torch.nn.Parameter(tensor)
    assert param.data_ptr() == tensor.data_ptr()
    kwargs = {"state_dtype": "bfloat16", "state_rounding": rounding, "backend": backend}
    expected = step_like(param, **kwargs)
    train(fusedopt.AdamW([param], lr=1e-2, **kwargs), 3)
    assert param.data_ptr() == tensor.data_ptr()
    assert_same_bits(tensor, expected)


def test_a_view_leaves_its_surroundings_alone() -> None:
    base = torch.randn(20, 20)
    before = base.clone()
    param = torch.nn.Parameter(base[5:15, 5:15])
    train(fusedopt.AdamW([param], lr=1e-2), 2)
    changed = base != before
    assert changed[5:15, 5:15].all()
    assert changed.sum() == 100


def test_non_contiguous_gradients() -> None:
    (param,) = make_params([(40, 30)], torch.float32)
    optimizer = fusedopt.AdamW([param])
    twin = torch.nn.Parameter(param.detach().clone())
    other = fusedopt.AdamW([twin])
    for seed in range(3):
        grad = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed)).t()
        param.grad, twin.grad = grad, grad.contiguous()
        optimizer.step()
        other.step()
    assert_same_run(optimizer, other)


def test_lazily_negated_and_conjugated_gradients() -> None:
    source = torch.randn(64, dtype=torch.complex64)
    negated = source.conj().imag
    assert negated.is_neg()
    results = []
    for grad in (negated, negated.resolve_neg()):
        param = torch.nn.Parameter(torch.zeros(64))
        param.grad = grad
        fusedopt.AdamW([param], lr=0.1).step()
        results.append(param.detach())
    assert_same_bits(*results)
    for grad in (source.conj(), source.conj().resolve_conj()):
        param = torch.nn.Parameter(torch.zeros(64, dtype=torch.complex64))
        param.grad = grad
        fusedopt.AdamW([param], lr=0.1).step()
        results.append(param.detach())
    assert_same_bits(*results[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_0_dimensional_tensors(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in [(), (0,), (3, 0, 2), (2,), (1, 1)]]
    optimizer = train(fusedopt.AdamW(params, lr=0.1, backend=backend, max_grad_norm=1.0), 2)
    assert [param.shape for param in params] == [(), (0,), (3, 0, 2), (2,), (1, 1)]
    assert all((param != 1).all() for param in params)
    assert all(optimizer.state[param]["step"] == 2 for param in params)


def test_only_empty_tensors() -> None:
    optimizer = train(fusedopt.AdamW([torch.nn.Parameter(torch.empty(0))], max_grad_norm=1.0), 2)
    assert optimizer.last_grad_norm == 0


def test_any_mix_of_dtypes_in_one_optimizer() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(i)).to(d)) for i, d in
                enumerate(dtypes)]  # fmt: skip

    together = train(fusedopt.AdamW(params(), lr=1e-2), 3)
    for i in range(len(dtypes)):
        # the others sit out, so that the gradients, which hang on the position, are the same
        alone = fusedopt.AdamW([params()[i]], lr=1e-2)
        for step in range(3):
            members = params()
            set_grads(members, step)
            alone.param_groups[0]["params"][0].grad = members[i].grad
            alone.step()
        assert_same_bits(together.param_groups[0]["params"][i], alone.param_groups[0]["params"][0], str(dtypes[i]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_another_dtype(dtype: str, grad_dtype: torch.dtype, backend: str) -> None:
    """They are read as the numbers they are: the same as a float32 gradient of a float32 copy's run."""
    grad = torch.randn(500, generator=torch.Generator().manual_seed(2)).to(grad_dtype)
    results = []
    for given in (grad, grad.float()):
        param = torch.nn.Parameter(torch.ones(500, dtype=DTYPES[dtype]))
        if hasattr(param, "grad_dtype"):
            param.grad_dtype = None  # torch otherwise insists on the parameter's dtype
        elif given.dtype != param.dtype:
            pytest.skip("this torch has no gradients of another dtype")
        param.grad = given
        optimizer = fusedopt.AdamW([param], lr=0.1, backend=backend)
        optimizer.step()
        results.append((param.detach(), optimizer.state[param]["exp_avg"]))
    for ours, theirs in zip(*results):
        assert_same_bits(ours, theirs)


def test_parameter_subclasses() -> None:
    class Special(torch.nn.Parameter):
        pass

    plain = torch.nn.Parameter(torch.ones(100))
    special = Special(torch.ones(100))
    memory = special.data_ptr()
    train(fusedopt.AdamW([plain]), 2)
    train(fusedopt.AdamW([special]), 2)
    assert special.data_ptr() == memory
    assert_same_bits(special.detach().as_subclass(torch.Tensor), plain)


def test_parameters_without_gradients_are_left_alone() -> None:
    params = make_params([(10,), (20,), (30,)], torch.float32)
    optimizer = fusedopt.AdamW(params)
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    set_grads(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1, 2]


def test_no_gradients_at_all() -> None:
    optimizer = fusedopt.AdamW(make_params([(10,)], torch.float32), max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.last_grad_norm == 0


def test_replaced_parameters_and_states_are_seen() -> None:
    """Nothing about tensors is remembered that may have changed: data, state tensors, whole states."""
    (param,) = make_params([(1000,)], torch.float32)
    optimizer = train(fusedopt.AdamW([param], lr=1e-2), 2)
    (twin,) = make_params([(1000,)], torch.float32)
    other = train(fusedopt.AdamW([twin], lr=1e-2), 2)

    param.data = param.data.clone()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    optimizer.state[param]["exp_avg_sq"].data = optimizer.state[param]["exp_avg_sq"].data.clone()
    train(optimizer, 1, first=2)
    train(other, 1, first=2)
    assert_same_run(optimizer, other)

    optimizer.state[param] = {name: value.clone() for name, value in optimizer.state[param].items()}
    train(optimizer, 1, first=3)
    train(other, 1, first=3)
    assert_same_run(optimizer, other)

    optimizer.state.clear()
    train(optimizer, 1, first=4)
    assert optimizer.state[param]["step"] == 1


def test_many_tensors_small_and_large() -> None:
    """Slabs of pooled states, several work items, an order that is not by size."""
    shapes = [(int(n),) for n in torch.randint(1, 3000, (500,), generator=torch.Generator().manual_seed(0))]
    shapes.insert(250, (300_000,))
    runs = [
        train(fusedopt.AdamW(make_params(shapes, torch.float32), backend=backend, max_grad_norm=0.1), 3)
        for backend in BACKENDS
    ]
    assert_same_run(*runs)
    state = runs[0].state
    pointers = sorted((tensor.data_ptr(), tensor.nbytes) for held in state.values() for tensor in held.values())
    assert all(begin + size <= following for (begin, size), (following, _) in itertools.pairwise(pointers))


def _available_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs /proc/meminfo")
def test_more_than_2_to_the_31_elements() -> None:
    """17 GB: bfloat16 parameter, gradient and both states."""
    numel = 2**31 + 2**20 + 3
    if _available_bytes() < 8 * numel + 2**30:
        pytest.skip(f"needs {8 * numel / 1e9:.0f} GB of free memory")
    param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
    param.grad = torch.zeros(numel, dtype=torch.bfloat16)
    tail = slice(numel - 1000, numel)
    param.grad[tail] = 1.0
    param.grad[:1000] = -1.0
    optimizer = fusedopt.AdamW([param], lr=0.25, weight_decay=0.0, state_dtype="bfloat16", max_grad_norm=1e9)
    optimizer.step()
    assert optimizer.last_grad_norm.item() == pytest.approx(2000**0.5)
    assert (param[tail] == 0.75).all()
    assert (param[:1000] == 1.25).all()
    assert (param[2**31 - 500 : 2**31 + 500] == 1.0).all()
    assert optimizer.state[param]["exp_avg"][tail].float().mean().item() == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit"}, {"master_weights": "float32"}], ids=str)
def test_states_that_are_made_in_inference_mode(kwargs: dict, backend: str) -> None:
    """By loading, or by a step: later steps are outside of it."""
    params, twins = (make_params([(70, 96), (5,)], torch.bfloat16) for _ in range(2))
    optimizer, twin = (fusedopt.AdamW(each, backend=backend, **kwargs) for each in (params, twins))
    train(twin, 1)
    with torch.inference_mode():
        train(optimizer, 1)
    for step in (1, 2):
        assert_same_run(train(optimizer, 1, first=step), train(twin, 1, first=step))
        with torch.inference_mode():
            optimizer.load_state_dict(optimizer.state_dict())
