"""Clipping inside the step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES, DTYPES, ODD_SIZES, assert_same_bits, assert_same_run, make_params, set_grads, train

import fusedopt
from fusedopt import _core
from fusedopt.reference.norm import pairwise_sum

SHAPES = [(n,) for n in (*ODD_SIZES, 4096, 4097, 12288)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_clipped_step_have_the_same_bits_everywhere(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(backend: str) -> torch.optim.Optimizer:
        params = make_params(SHAPES, DTYPES[dtype])
        return train(fusedopt.AdamW(params, max_grad_norm=0.01, backend=backend), 3)

    eager = run("eager")
    for isa, threads in itertools.product(_core.available_isas(), (1, 2, 5)):
        monkeypatch.setenv("FUSEDOPT_CPU_ISA", isa)
        torch.set_num_threads(threads)
        ours = run("cpu")
        assert_same_bits(ours.last_grad_norm, eager.last_grad_norm, "norm")
        assert_same_run(ours, eager)


def test_norm_is_exact() -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = train(fusedopt.AdamW(params, max_grad_norm=1.0), 1)
    exact = math.sqrt(math.fsum(v * v for p in params for v in p.grad.double().tolist()))
    assert optimizer.last_grad_norm == torch.tensor(exact, dtype=torch.float32)
    assert optimizer.last_grad_norm.shape == ()


def test_clipping_equals_scaling_the_gradients_by_the_coefficient() -> None:
    params = make_params(SHAPES, torch.float32)
    optimizer = fusedopt.AdamW(params, max_grad_norm=0.5, eps=1e-3)
    set_grads(params, 0)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    for param, grad in zip(params, before):
        assert_same_bits(param.grad, grad)  # never written to
    norm = math.sqrt(math.fsum(v * v for g in before for v in g.double().tolist()))
    assert norm > 0.5
    coefficient = torch.tensor(0.5 / (norm + 1e-6), dtype=torch.float64).float()
    twins = make_params(SHAPES, torch.float32)
    for twin, grad in zip(twins, before):
        twin.grad = grad * coefficient
    other = fusedopt.AdamW(twins, eps=1e-3)
    other.step()
    assert_same_run(optimizer, other)


def test_small_gradients_are_not_scaled_up() -> None:
    runs = [train(fusedopt.AdamW(make_params(SHAPES, torch.float32), max_grad_norm=m), 2) for m in (1e6, None)]
    assert_same_run(*runs)
    assert runs[1].last_grad_norm is None


def test_follows_torchs_clip_grad_norm() -> None:
    params = make_params(SHAPES, torch.float32)
    twins = make_params(SHAPES, torch.float32)
    ours = fusedopt.AdamW(params, max_grad_norm=0.3, lr=0.1)
    theirs = torch.optim.AdamW(twins, lr=0.1)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.3)
        theirs.step()
        ours.step()
        # torch sums in float32
        torch.testing.assert_close(ours.last_grad_norm, norm, rtol=1e-5, atol=0)
    for param, twin in zip(params, twins):
        torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-5)


def test_one_norm_over_all_groups_dtypes_and_backends() -> None:
    shapes = [(5000,), (3, 7), (11,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    params = [make_params([shape], dtype)[0] for shape, dtype in zip(shapes, dtypes)]
    set_grads(params, 0)
    optimizer = fusedopt.AdamW([{"params": [param]} for param in params], max_grad_norm=0.1)
    optimizer.step()
    exact = math.sqrt(math.fsum(v * v for p in params for v in p.grad.double().flatten().tolist()))
    assert optimizer.last_grad_norm == torch.tensor(exact, dtype=torch.float32)


def test_sums_go_in_list_order_whatever_path_a_tensor_takes() -> None:
    """A parameter that is copied on its way (here not contiguous) keeps its place in the sum."""
    base = make_params([(70, 90), (5000,), (41, 43)], torch.float32)
    norms = []
    for make_strided in (False, True):
        params = [torch.nn.Parameter(p.detach().clone()) for p in base]
        set_grads(params, 0, scale=1e3)
        if make_strided:
            for i in (0, 2):
                grad = params[i].grad
                params[i] = torch.nn.Parameter(params[i].detach().t().contiguous().t())
                params[i].grad = grad
        optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
        optimizer.step()
        norms.append((optimizer, optimizer.last_grad_norm))
    assert_same_bits(norms[0][1], norms[1][1])
    assert_same_run(norms[0][0], norms[1][0])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_non_finite_norms_reach_the_user(bad: float, backend: str) -> None:
    params = make_params([(10,)], torch.float32)
    set_grads(params, 0)
    params[0].grad[3] = bad
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert not optimizer.last_grad_norm.isfinite()
    assert params[0].isnan()[3]
    assert params[0].isnan().all() == math.isnan(bad)  # as torch: an infinite norm makes the others zero


def test_differing_norms_are_an_error() -> None:
    params = make_params([(3,), (4,)], torch.float32)
    optimizer = CASES[0].ours([{"params": params[:1], "max_grad_norm": 1.0}, {"params": params[1:]}])
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"max_grad_norm differs between param groups \(\[1.0, None\]\)"):
        optimizer.step()
    assert all(torch.equal(param, value) for param, value in zip(params, before))
    assert not optimizer.state


def test_pairwise_sum() -> None:
    assert pairwise_sum(torch.zeros(0, dtype=torch.float64)) == 0
    for n in (1, 2, 3, 5, 8, 1000):
        values = torch.rand(n, dtype=torch.float64)
        assert pairwise_sum(values).item() == pytest.approx(math.fsum(values.tolist()), rel=1e-14)
    # in pairs, not one after the other
    values = torch.tensor([1.0, 2.0**-53, 2.0**-53, 2.0**-53], dtype=torch.float64)
    assert pairwise_sum(values) == 1.0 + 2.0**-52
