"""The CUDA backend without CUDA: what it says, when it falls back, and that it waits for nothing."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, assert_same_run, make_params, set_grads, train
from emulated import EmulatedBackend

from fusedopt import SGD, Adafactor, AdamW, backends
from fusedopt.backends import cuda, trial, triton
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

    cuda._loaded.cache_clear()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: Other)
    with pytest.raises(ImportError, match="different builds; reinstall fusedopt"):
        cuda.kernels()
    cuda._loaded.cache_clear()


class Pretended(EmulatedBackend):
    """The kernels on the CPU, for a device that there is not."""

    unusable = cuda.CudaBackend.unusable
    refusal = cuda.CudaBackend.refusal

    def _unfit(self, device: torch.device) -> str | None:
        return super()._unfit(torch.device("cpu"))


@pytest.fixture
def pretended(
    emulated: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A device, as its capability, and what is different about the kernels' module; without Triton."""
    given: dict[str, Any] = {"capability": (9, 0), "module": {}}
    loaded = EmulatedBackend().module()
    names = [name for name in dir(loaded) if not name.startswith("__")]

    def module(self: Any) -> Any:
        if isinstance(given["module"], Exception):
            raise given["module"]
        return SimpleNamespace(**{**{name: getattr(loaded, name) for name in names}, **given["module"]})

    monkeypatch.setattr(Pretended, "module", module)
    monkeypatch.setitem(backends.BACKENDS, "cuda", Pretended())
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    monkeypatch.setattr(trial, "may_wait", lambda device: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    trial.warn_unused.cache_clear()
    return given


def test_a_device_that_kernels_work_on(pretended: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.first("auto", [OnDevice(torch.zeros(3))]).name == "cuda"


def fails(**arguments: int) -> str:
    return "CUDA: a launch failed: no kernel image is available for execution on the device"


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "older device": (
        (6, 1),
        {},
        "cpu has compute capability 6.1, and they need 7.0 or later",
    ),
    "no code": (
        (7, 5),
        {"architectures": "80,90"},
        "cpu has compute capability 7.5, the kernels are built for 80, 90; reinstall fusedopt with "
        "FUSEDOPT_CUDA_ARCHITECTURES=75",
    ),
    "older driver": (
        (8, 0),
        {"architectures": "80", "toolkit": 12040, "driver_version": lambda: 12000},
        "the driver supports CUDA up to 12.0, and they need 12.1; update the driver to 530 or later",
    ),
    "newer toolkit": (
        (8, 0),
        {"architectures": "80", "toolkit": 13000, "driver_version": lambda: 12080},
        "the driver supports CUDA up to 12.8, the kernels are built by nvcc 13.0; update the driver, or reinstall "
        "fusedopt with nvcc 12 on the PATH",
    ),
    "newer PTX": (
        (10, 0),
        {"architectures": "80,90", "toolkit": 12080, "driver_version": lambda: 12040},
        "cpu has compute capability 10.0, for which the kernels have only PTX of nvcc 12.8, and the driver supports "
        "CUDA up to 12.4, which cannot compile it; update the driver, or reinstall fusedopt with "
        "FUSEDOPT_CUDA_ARCHITECTURES=100",
    ),
    "failing launch": (
        (9, 0),
        {"trial": fails},
        "a first launch on cpu fails (CUDA: a launch failed: no kernel image is available for execution on the "
        "device); see that torch.ones(1, device='cpu') works, then reinstall fusedopt where this GPU is",
    ),
    "wrong launch": ((9, 0), {"trial": lambda **arguments: ""}, "a first launch on cpu fails (the square of 3 is 0.0)"),
    "kernels that do not load": (
        (9, 0),
        ImportError("libstdc++.so.6: version not found"),
        "the CUDA kernels do not load: libstdc++.so.6: version not found",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_where_kernels_cannot_run_others_step(case: str, pretended: dict[str, Any]) -> None:
    """ "auto" says once why, and takes the next; the name is an error that says the same."""
    pretended["capability"], pretended["module"], sentence = MISFITS[case]
    param = OnDevice(torch.zeros(3))
    with pytest.warns(UserWarning, match="parameters on cuda:0 are not stepped by the cuda kernels") as said:
        assert backends.first("auto", [param]).name == "eager"
    assert sentence in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.first("auto", [param]).name == "eager"
    found = backends.BACKENDS["cuda"].refusal(param)
    assert found is not None
    assert found.startswith(sentence)


@pytest.mark.parametrize(
    ("capability", "module"),
    [
        (
            (8, 9),
            {"architectures": "80,90", "toolkit": 12080, "driver_version": lambda: 12040},
        ),  # code of its generation
        ((12, 1), {"architectures": "80,90", "toolkit": 12080, "driver_version": lambda: 13000}),  # PTX, newer driver
        ((8, 0), {"architectures": "80", "toolkit": 12000, "driver_version": lambda: 12000}),  # smaller parameters
        ((8, 0), {"architectures": "80", "toolkit": 13000, "driver_version": lambda: 0}),  # that does not say
    ],
)
def test_drivers_that_are_recent_enough(
    capability: tuple[int, int], module: dict[str, Any], pretended: dict[str, Any]
) -> None:
    pretended.update(capability=capability, module=module)
    assert backends.BACKENDS["cuda"].refusal(OnDevice(torch.zeros(3))) is None


def test_the_module_tells_its_driver_and_tries_a_launch(emulated: None) -> None:
    module = EmulatedBackend().module()
    assert module.driver_version() == module.toolkit
    number, square = torch.tensor([1.5]), torch.zeros(1, dtype=torch.float64)
    assert module.trial(number=number.data_ptr(), square=square.data_ptr(), stream=0) == ""
    assert square.item() == 2.25


def test_state_of_another_backend_is_no_way_to_kernels_that_cannot_run(pretended: dict[str, Any]) -> None:
    """Parameters on the CPU that have state already: to name the kernels then is the error that it is at first."""
    optimizer = train(AdamW(make_params([(4,)], torch.float32), backend="cpu"), 1)
    optimizer.param_groups[0]["backend"] = "cuda"
    with pytest.raises(ValueError, match=r"cannot be stepped by backend='cuda' \(cuda: it is on cpu\)"):
        train(optimizer, 1)


def test_triton_that_cannot_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that triton does not compile for, or a compiler that is not there: plain torch steps."""
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(trial, "may_wait", lambda device: True)
    monkeypatch.setitem(backends.BACKENDS, "triton", triton.TritonBackend())

    def fail(self: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify it")

    monkeypatch.setattr(triton.TritonBackend, "session", fail)
    trial.warn_unused.cache_clear()
    sentence = r"a first launch on cuda:0 fails \(RuntimeError: Failed to find C compiler.\); install the triton"
    with pytest.warns(UserWarning, match=sentence):
        assert backends.first("auto", [OnDevice(torch.zeros(3))]).name == "eager"


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

    def fail(shape: torch.Size, dtype: torch.dtype, strides: Any = None) -> torch.Tensor:
        if shape.numel() >= 300_000 or not case.ours.STATES:
            raise torch.OutOfMemoryError("no memory")
        return zeroed(shape, dtype, strides)

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
