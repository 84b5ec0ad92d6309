"""What fusedopt.info says: here, and with devices and kernels that are made up."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _core, backends
from fusedopt.backends import cuda, info, trial

# What steps CUDA parameters where there are no CUDA kernels. The triton of an old torch is too old.
WITHOUT = "triton" if backends.triton.missing() is None else "eager"


def test_here() -> None:
    found = info.info()
    assert json.loads(json.dumps(found)) == found
    assert found["fusedopt"] == fusedopt.__version__
    assert found["torch"] == torch.__version__
    assert found["cpu"] == {"available": _core.available_isas(), "selected": _core.selected_isa()}
    assert found["auto"]["cpu"] == "cpu"
    assert found["auto"]["cuda"] == ("cuda" if found["cuda"]["built"] else WITHOUT)
    assert found["cuda"]["usable"] == bool(found["cuda"]["built"] and found["cuda"]["devices"])
    text = info.render(found)
    for part in (fusedopt.__version__, torch.__version__, _core.selected_isa(), *found["missing"]):
        assert part in text


def test_asking_takes_no_warning_from_those_who_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "kernels", lambda: None)
    monkeypatch.setattr(backends.cuda, "_warn_not_built", lambda: pytest.fail("the one warning is spent"))
    assert info.info()["auto"]["cuda"] == WITHOUT


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", "v9")
    found = info.info()
    assert found["cpu"]["selected"] is None
    assert any("FUSEDOPT_CPU_ISA='v9'" in line for line in found["missing"])
    assert "none of baseline" in info.render(found)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with CUDA devices, each a capability, and kernels, or none."""
    given: dict[str, Any] = {
        "devices": [(9, 0)],
        "kernels": SimpleNamespace(toolkit=13000, architectures="80,90", driver_version=lambda: 13000),
    }
    names = {(9, 0): "H100", (7, 5): "T4"}
    monkeypatch.setattr(info, "kernels", lambda: given["kernels"])
    monkeypatch.setattr(backends.cuda, "kernels", lambda: given["kernels"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(given["devices"]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(given["devices"]))
    monkeypatch.setitem(backends.BACKENDS, "cuda", cuda.CudaBackend())
    monkeypatch.setattr(cuda.CudaBackend, "_launch_error", lambda self, device: None)
    monkeypatch.setattr(trial, "may_wait", lambda device: True)
    monkeypatch.setattr(trial, "first_difference", lambda backend, device: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", SimpleNamespace(unusable=lambda device: backends.triton.missing()))

    def capability(device: Any) -> tuple[int, int]:
        return given["devices"][device.index if isinstance(device, torch.device) else device]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names.get(given["devices"][i], "some device"))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    return given


def test_a_device_and_kernels_for_it(machine: dict[str, Any]) -> None:
    found = info.info()
    assert found["cuda"] == {
        "built": True,
        "toolkit": "13.0",
        "architectures": ["80", "90"],
        "usable": True,
        "torch": "13.0",
        "driver": "12.8",
        "devices": [{"name": "H100", "capability": "9.0"}],
    }
    assert found["auto"] == {"cpu": "cpu", "cuda": "cuda"}
    assert [line for line in found["missing"] if "triton" not in line] == []
    text = info.render(found)
    assert "CUDA kernels   built by nvcc 13.0 for 80, 90, usable" in text
    assert "cuda:0         H100, compute capability 9.0" in text
    assert "driver         up to CUDA 12.8" in text


def test_a_device_that_kernels_are_not_for(machine: dict[str, Any]) -> None:
    machine["devices"] = [(7, 5)]
    found = info.info()
    assert not found["cuda"]["usable"]
    line = "cuda:0 has compute capability 7.5, the kernels are built for 80, 90; reinstall fusedopt with "
    assert line + "FUSEDOPT_CUDA_ARCHITECTURES=75" in found["missing"]
    assert found["auto"]["cuda"] == WITHOUT


def test_a_driver_that_is_too_old(machine: dict[str, Any]) -> None:
    machine["kernels"].driver_version = lambda: 12080
    found = info.info()
    assert not found["cuda"]["usable"]
    assert found["auto"]["cuda"] == WITHOUT
    assert any(line.startswith("cuda:0: the driver supports CUDA up to 12.8, ") for line in found["missing"])


@pytest.mark.parametrize(
    ("capability", "code"),
    [((7, 5), ""), ((8, 0), "machine code"), ((8, 9), "machine code"), ((9, 0), "machine code"), ((12, 1), "PTX")],
)
def test_what_machine_code_runs_on(capability: tuple[int, int], code: str) -> None:
    assert cuda.code_for("80,90", *capability) == code
    assert cuda.code_for("", *capability) == ""


def test_no_kernels_and_no_device(machine: dict[str, Any]) -> None:
    machine.update(devices=[], kernels=None)
    found = info.info()
    assert not found["cuda"]["built"]
    assert found["cuda"]["driver"] is None
    assert found["auto"]["cuda"] == WITHOUT
    assert any("no CUDA kernels; reinstall it where nvcc 12" in line for line in found["missing"])
    assert "torch finds no CUDA device; check nvidia-smi and the driver" in found["missing"]
    assert "CUDA kernels   not built" in info.render(found)
