"""The Triton backend: when it is chosen, and what it says without Triton."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, assert_same_run, make_params, set_grads, train

from fusedopt import AdamW, backends
from fusedopt.backends import cuda, triton


class OnDevice(torch.Tensor):
    """A tensor that is on a device, as far as anybody asks."""

    kind = "cuda"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.kind, 0)


class OnXpu(OnDevice):
    kind = "xpu"


WITHOUT = """
import sys, warnings
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Nothing())
sys.modules.pop("triton", None)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch, fusedopt
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
fusedopt.AdamW([weight]).step()
assert "triton" not in sys.modules
try:
    fusedopt.AdamW([weight], backend="triton").step()
except ValueError as error:
    print(error)
"""


def test_without_triton_it_is_imported_and_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be stepped by backend='triton'" in done.stdout
    assert "triton is not installed; install it with: pip install -U 'fusedopt[triton]'" in done.stdout


def test_importing_fusedopt_imports_no_triton(tmp_path: Path) -> None:
    command = "import sys, fusedopt; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", command], cwd=tmp_path).returncode == 0


def _chosen(param: torch.Tensor) -> str:
    return backends.first("auto", [param]).name


@pytest.mark.parametrize(
    ("param_type", "hip", "built", "installed", "expected"),
    [
        (OnDevice, None, True, True, "cuda"),
        (OnDevice, None, True, False, "cuda"),
        (OnDevice, None, False, True, "triton"),
        (OnDevice, "6.4", False, True, "triton"),
        (OnXpu, None, False, True, "triton"),
    ],
)
def test_chosen_where_nothing_better_is(
    param_type: Any, hip: Any, built: bool, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(cuda, "kernels", lambda: object() if built else None)
    monkeypatch.setattr(triton, "is_installed", lambda: installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen(param_type(torch.zeros(3))) == expected
        assert _chosen(param_type(torch.zeros(3, dtype=torch.float64))) == "eager"


@pytest.mark.parametrize(("param_type", "hip", "kind"), [(OnDevice, "6.4", "ROCm"), (OnXpu, None, "Intel GPU")])
def test_without_triton_other_devices_fall_back_and_say_so_once(
    param_type: Any, hip: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    triton._warn_missing.cache_clear()
    with pytest.warns(
        UserWarning, match=rf"{kind} parameters are stepped by plain torch, slowly: .*fusedopt\[triton\]"
    ):
        assert _chosen(param_type(torch.zeros(3))) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _chosen(param_type(torch.zeros(3))) == "eager"


def test_an_old_triton_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "installed_version", lambda: "3.2.0")
    params = make_params([(4,)], torch.float32)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=r"triton 3\.2\.0 is older than 3\.3; .*pip install -U 'fusedopt\[triton\]'"):
        AdamW(params, backend="triton").step()


def test_on_the_cpu_it_is_for_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "is_interpreting", lambda: False)
    params = make_params([(4,)], torch.float32)
    set_grads(params, 0)
    optimizer = AdamW(params, backend="cpu")
    for _ in range(2):  # without state, and with
        optimizer.param_groups[0]["backend"] = "triton"
        with pytest.raises(ValueError, match=r"by backend='triton' \(triton: it is on cpu\)"):
            optimizer.step()
        optimizer.param_groups[0]["backend"] = "cpu"
        optimizer.step()


@pytest.mark.usefixtures("interpreted")
def test_tables_for_a_stream_are_sent_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretending that memory of the CPU is a device's."""
    from fusedopt.triton_kernels import launch

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self.clone())
    mirror, device = launch.Mirror(), torch.device("xpu")
    numbers = np.arange(4)
    first = mirror.on(device, 0, numbers)
    assert mirror.on(device, 0, numbers.copy()) is first
    assert mirror.on(device, 1, numbers) is not first  # that stream has not waited for the copy
    numbers[0] = 7
    assert mirror.on(device, 1, numbers).tolist() == [7, 1, 2, 3]


@pytest.mark.usefixtures("interpreted")
def test_what_a_graph_copies_was_pinned_before_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretending that memory of the CPU is a device's, and that a stream is captured."""
    from fusedopt.triton_kernels import launch

    is_capturing = False

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        assert not is_capturing, "memory is pinned while a stream is captured"
        return tensor.clone()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self.view_as(self))  # shares its memory
    mirror, device = launch.Mirror(), torch.device("cuda")
    mirror.on(device, 0, np.arange(4))
    is_capturing = True
    graphs = [mirror.on(device, 0, np.arange(4) + k) for k in (10, 20)]
    with pytest.raises(RuntimeError, match="take one before, outside of the graph"):
        mirror.on(device, 0, np.arange(4) + 30)
    with pytest.raises(RuntimeError, match="take one before"):
        mirror.on(device, 0, np.arange(5))
    is_capturing = False
    for k in range(5):
        mirror.on(device, 0, np.arange(4) + k)
    assert [graph.tolist() for graph in graphs] == [[10, 11, 12, 13], [20, 21, 22, 23]]
    is_capturing = True
    assert mirror.on(device, 0, np.arange(4) + 40).tolist() == [40, 41, 42, 43]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_checkpoints_go_from_backend_to_backend(case: Any) -> None:
    runs = []
    for names in (("triton", "cpu"), ("cpu", "cpu")):
        params = make_params([(20,), (3, 70)], torch.float32)
        optimizer = train(case.ours(params, **case.kwargs, backend=names[0]), 1)
        resumed = case.ours(params, **case.kwargs, backend=names[1])
        resumed.load_state_dict(optimizer.state_dict())
        runs.append(train(resumed, 1, first=1))
    assert_same_run(*runs)
