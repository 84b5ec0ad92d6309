"""The CUDA backend without CUDA: what it says, when it falls back, and that it waits for nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import CASES, assert_same_run, make_params, set_grads, train

from fusedopt import SGD, Adafactor, AdamW, backends
from fusedopt.backends import cuda, triton
from fusedopt.storage import allocation


class OnDevice(torch.Tensor):
    """A tensor that is on a CUDA device, as far as anybody asks; to read it on the host fails."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def item(self) -> float:  # type: ignore[override]
        raise AssertionError("the host waited for a device")

    def __float__(self) -> float:
        return self.item()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).to(*args, **kwargs)

    def detach(self) -> OnDevice:
        return self


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    cuda._warn_not_built.cache_clear()


@pytest.mark.usefixtures("not_built")
def test_without_kernels_auto_falls_back_and_says_once_what_helps() -> None:
    param = OnDevice(torch.zeros(3))
    with pytest.warns(UserWarning, match="stepped by plain torch, slowly: .* no CUDA kernels; reinstall .*nvcc"):
        found = backends.BACKENDS["cuda"].refusal(param)
    assert found is not None
    assert "\n" not in found
    assert "pip install" in found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.first("auto", [param]).name == "eager"


@pytest.mark.usefixtures("not_built")
def test_asked_for_by_name_it_is_an_error() -> None:
    params = make_params([(4,)], torch.float32)
    optimizer = AdamW(params, backend="cuda")
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"cannot be stepped by backend='cuda' \(cuda: it is on cpu\)"):
        optimizer.step()
    assert not optimizer.state


def test_kernels_of_another_build_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        layout = -1

    cuda.kernels.cache_clear()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: Other)
    with pytest.raises(ImportError, match="different builds; reinstall fusedopt"):
        cuda.kernels()
    cuda.kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("emulated")
def test_a_learning_rate_on_the_device_is_read_there(dtype: torch.dtype) -> None:
    runs = []
    for backend in ("cuda", "cpu"):
        rate = torch.tensor(1e-2, dtype=dtype)
        optimizer = AdamW(make_params([(300,), (4, 64)], torch.float32), lr=1e-3, backend=backend)
        optimizer.param_groups[0]["lr"] = OnDevice(rate) if backend == "cuda" else rate
        train(optimizer, 2)
        rate /= 2
        runs.append(train(optimizer, 1, first=2))
    assert_same_run(*runs)


def test_a_learning_rate_elsewhere_is_read_by_the_reference() -> None:
    """On the CPU, with a learning rate on a device: waited for, but right."""

    class Readable(OnDevice):
        def item(self) -> float:  # type: ignore[override]
            return float(self.as_subclass(torch.Tensor).item())

    runs = []
    for lr in (Readable(torch.tensor(1e-2)), 0.01):
        params = make_params([(300,)], torch.float32)
        optimizer = SGD(params, lr=1e-3, momentum=0.9)
        optimizer.param_groups[0]["lr"] = lr if isinstance(lr, torch.Tensor) else torch.tensor(lr)
        runs.append(train(optimizer, 2))
    assert_same_run(*runs)


def test_adafactor_waits_for_its_learning_rate() -> None:
    """Which it has decides what else it may have, so it is looked at on the host."""
    optimizer = Adafactor(make_params([(4, 4)], torch.float32), lr=1e-3, relative_step=False, scale_parameter=False)
    optimizer.param_groups[0]["lr"] = OnDevice(torch.tensor(1e-2))
    with pytest.raises(AssertionError, match="the host waited"):
        train(optimizer, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_memory_for_state_changes_nothing(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some parameters have state, others get none: neither weights nor states move, and the next step goes on."""
    kwargs = {**case.kwargs, **case.variants[-1]}
    params = make_params([(300,), (4, 64), (1_000, 300)], torch.float32)
    twins = make_params([(300,), (4, 64), (1_000, 300)], torch.float32)
    runs = [case.ours([{"params": p[:1]}, {"params": p[1:]}], **kwargs) for p in (params, twins)]
    for optimizer, of in zip(runs, (params, twins)):
        set_grads(of, 0)
        for param in of[1:]:
            param.grad = None
        optimizer.step()
        set_grads(of, 1)
    zeroed = allocation._zeroed

    def fail(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if shape.numel() >= 300_000 or not case.ours.STATES:
            raise torch.OutOfMemoryError("no memory")
        return zeroed(shape, dtype)

    if len(runs[0].states(runs[0].param_groups[0])) == 0:
        pytest.skip("this rule keeps no state but the step")
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "_zeroed", fail)
        with pytest.raises(torch.OutOfMemoryError):
            runs[0].step()
        assert all(not runs[0].state[param] for param in params[1:] if param in runs[0].state)
        assert runs[0].state[params[0]]["step"] == 1
    for optimizer in runs:
        optimizer.step()
    assert_same_run(*runs)


@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.usefixtures("emulated")
def test_groups_on_the_cpu_and_on_a_device_in_one_optimizer(found: float | None) -> None:
    """One norm over both, one loss scale, and neither steps if one of the gradients is not finite."""
    runs = []
    for name in ("cuda", "cpu"):
        params = make_params([(300,), (4, 64), (70,)], torch.float32)
        groups = [{"params": params[:2], "backend": name}, {"params": params[2:], "backend": "cpu"}]
        optimizer = train(AdamW(groups, max_grad_norm=0.5), 1)
        if found is not None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor([8.0]), torch.tensor([found])
        runs.append(train(optimizer, 1, first=1))
        assert optimizer.state[params[0]]["step"] == optimizer.state[params[2]]["step"] == 2 - (found or 0)
    assert [len(session._tables) for session in (runs[0]._sessions()["cuda"],)] == [1]
    assert_same_run(*runs)
    assert runs[0].last_grad_norm == runs[1].last_grad_norm
