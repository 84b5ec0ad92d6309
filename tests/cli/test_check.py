"""``fusedopt check``: that it proves what it says, and names what is broken on purpose."""

from __future__ import annotations

import io
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import EmulatedBackend
from scaling import Unread

from fusedopt import _core, backends
from fusedopt.backends.cpu import CpuBackend, CpuSession
from fusedopt.backends.trial import FIRST_CHECK

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from fusedopt.cli import proofs, subjects  # noqa: E402  # it needs neither, but the command does

CPU = torch.device("cpu")
# Whole blocks and ragged ones, a vector, and what is not aligned.
SMALL = ((1,), (65,), (4, 64), (3, 70))


def run(*arguments: str) -> Any:
    from fusedopt.cli.app import app

    return typer_testing.CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "100"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes small parameters and does not measure."""
    check = proofs.check
    monkeypatch.setattr(proofs, "check", lambda *args, **kwargs: check(*args, **kwargs, shapes=SMALL, seconds=0))


def only(*names: str) -> list[subjects.Subject]:
    return [subject for subject in subjects.subjects() if subject.name in names]


def test_every_rule_is_checked() -> None:
    found = [rule for subject in subjects.subjects() for rule in subject.rules]
    assert set(found) == set(_core.rules())
    assert len(set(found)) == len(found)


def test_the_cpu(small: None) -> None:
    rules = ["adafactor", "adamw", "lion", "sgd"]
    result = run("--device", "cpu", "--json", "--rules", ",".join(rules))
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["passed"] is True
    (checked,) = found["checked"]
    assert (checked["device"], checked["backend"], checked["refusal"]) == ("cpu", "cpu", None)
    assert [row["rule"] for row in checked["rows"]] == rules
    assert all(row["differences"] == dict.fromkeys(proofs.FORMATS) for row in checked["rows"])


def test_the_table(small: None) -> None:
    result = run("--device", "cpu", "--rules", "lion,adamw_amsgrad")
    assert result.exit_code == 0, result.output
    assert "cpu on cpu" in result.output
    assert result.output.count("✓") == 8
    assert "adamw_amsgrad" in result.output
    assert "all 8 have the bits of the reference" in result.output


def test_bandwidth_is_of_what_a_step_must_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(proofs._MEASURED_NUMEL, "cpu", 1 << 16)
    ticks = iter(range(1000))
    monkeypatch.setattr(proofs.time, "perf_counter", lambda: float(next(ticks)))
    (report,) = proofs.check([subjects.Target(CPU, "cpu")], of=only("adamw"), shapes=SMALL, seconds=1.0)
    rates = report.rows[0].bandwidth
    assert rates.keys() == set(proofs.MEASURED)
    # One step in two ticks: parameters and two states read and written, and gradients read. 8 bits have a scale for 64.
    step = 1 / 2 / 1e9 * (1 << 16)
    assert rates["fp32"] == pytest.approx(step * 28, rel=1e-3)
    assert rates["bf16, 8-bit"] == pytest.approx(step * (6 + 4 * 65 / 64), rel=1e-3)


def test_what_fails_only_when_it_is_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(proofs._MEASURED_NUMEL, "cpu", 1 << 16)
    monkeypatch.setattr(proofs, "_wait", fail)
    (report,) = proofs.check([subjects.Target(CPU, "cpu")], of=only("lion"), shapes=SMALL, seconds=0.1)
    assert [(formats, text) for _, formats, text in report.failures()] == [
        (name, "a step of 65,536 elements: RuntimeError: CUDA error: an illegal memory access was encountered")
        for name in proofs.MEASURED
    ]


@pytest.mark.usefixtures("emulated")
def test_cuda_kernels() -> None:
    (report,) = proofs.check([subjects.Target(CPU, "cuda")], shapes=SMALL, seconds=0)
    assert report.refusal is None
    assert report.failures() == []
    assert len(report.rows) == len(subjects.subjects())


@pytest.mark.usefixtures("interpreted")
def test_triton_kernels() -> None:
    """One of the rules: to interpret kernels takes its time, and tests/triton has them all."""
    (report,) = proofs.check(
        [subjects.Target(CPU, "triton")],
        of=only("adamw"),
        formats=("bf16, 8-bit",),
        shapes=((3, 70),),
        seconds=0,
    )
    assert report.refusal is None
    assert report.failures() == []


class Broken(CpuBackend):
    """Adds a unit in the last place to one parameter: in a step of AdamW with bfloat16 parameters."""

    def session(self) -> CpuSession:
        session = CpuSession()
        begin, collect, step, seen = session.begin, session.collect, session.summing_step, {}

        def begun(groups: Any, positions: Any) -> None:
            seen["rules"] = [group.rule for group in groups]
            begin(groups, positions)

        def collected(group: int, params: Any, *rest: Any) -> Any:
            seen["param"] = params[2].detach()
            return collect(group, params, *rest)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            found = yield from step(*args, **kwargs)
            if seen["rules"] == ["adamw"] and seen["param"].dtype == torch.bfloat16:
                seen["param"].view(torch.int16)[1, 2] += 1
            return found

        session.begin, session.collect, session.summing_step = begun, collected, stepped
        return session


def test_a_broken_backend_is_named(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", Broken())
    result = run("--device", "cpu", "--rules", "adamw,lion")
    assert result.exit_code == 1
    assert result.output.count("✗") == 2
    assert result.output.count("✓") == 6
    for formats in ("bf16", "bf16, 8-bit"):
        line = (
            f"cpu, adamw, {formats}: a first step: 1 of 256 elements of parameter 2 of shape (4, 64) differ, the first "
        )
        assert line + "of them element 66: " in result.output
    assert "2 of 8 differ" in result.output
    assert "please report this page with the output of `fusedopt info`" in result.output
    result = run("--device", "cpu", "--rules", "adamw", "--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["passed"] is False
    assert "elements of parameter 2" in found["checked"][0]["rows"][0]["differences"]["bf16"]


def _wrong_norm(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments if arguments["max_grad_norm"] is None else {**arguments, "max_grad_norm": 0.25}


CORRUPTIONS: dict[str, Any] = {
    "a clipped step: .* of .* elements of parameter 0": _wrong_norm,
    "a step with a gradient scale, .*: .* elements of parameter 0": lambda arguments: {
        **arguments,
        "grad_scale": 0,
    },
    "a step that found_inf forbids: .* elements of parameter 0": lambda arguments: {**arguments, "found_inf": 0},
    "a first step: RuntimeError: an illegal memory access": None,
}


@pytest.mark.parametrize("said", CORRUPTIONS)
@pytest.mark.usefixtures("emulated")
def test_a_corrupted_module_is_named(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = EmulatedBackend().module()

    def step(**arguments: Any) -> None:
        if CORRUPTIONS[said] is None:
            raise RuntimeError("an illegal memory access\nand more")
        module.step(**CORRUPTIONS[said](arguments))

    names = [name for name in dir(module) if not name.startswith("__")]
    wrapped = SimpleNamespace(**{**{name: getattr(module, name) for name in names}, "step": step})
    monkeypatch.setattr(EmulatedBackend, "module", lambda self: wrapped)
    set_scaling = proofs._set

    def set_unread(optimizer: Any, scene: proofs.Scene, device: torch.device) -> None:
        """What is on the CPU, the optimizer reads itself; a device's is left to the kernels."""
        set_scaling(optimizer, scene, device)
        if optimizer.found_inf is not None and optimizer.param_groups[0]["backend"] == "cuda":
            optimizer.found_inf = Unread(optimizer.found_inf)

    monkeypatch.setattr(proofs, "_set", set_unread)
    (report,) = proofs.check(
        [subjects.Target(CPU, "cuda")], of=only("sgd_momentum"), formats=("fp32",), shapes=SMALL, seconds=0
    )
    ((rule, formats, text),) = report.failures()
    assert (rule, formats) == ("sgd_momentum", "fp32")
    assert re.match(said, text), text


def test_what_is_not_here_is_said() -> None:
    for arguments, sentence in (
        (("--device", "cuda:99"), "device 'cuda:99' is not here; there are cpu"),
        (("--device", "nonsense"), "device 'nonsense' is not here; there are cpu"),
        (("--backend", "hip"), "backend 'hip' is not known; there are cpu, cuda, triton, eager"),
        (("--rules", "adamw,lyon"), "rule 'lyon' is not known; did you mean 'lion'?; there are adafactor, "),
        (("--rules", "adamw, wrong"), "rule 'wrong' is not known; there are adafactor, "),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert sentence in str(result.output), arguments


def test_a_named_backend_that_steps_nothing_here_fails() -> None:
    result = run("--device", "cpu", "--backend", "cuda")
    assert result.exit_code == 1
    assert "cuda on cpu: not checked, because it is on cpu" in result.output
    assert "nothing was checked" in result.output


def test_brackets_are_no_markup() -> None:
    """A remedy such as pip install 'fusedopt[triton]' is printed as it is."""
    from rich.console import Console

    from fusedopt.cli import check

    said = io.StringIO()
    target = subjects.Target(torch.device("cuda", 0), "triton")
    row = proofs.Row("lion", {"fp32": "a first step: RuntimeError: not [known]"})
    reports = [
        proofs.Report(target, "GPU [0]", "install 'fusedopt[triton]'"),
        proofs.Report(target, "GPU [0]", rows=[row]),
    ]
    check.show(reports, 0.0, Console(file=said, width=100))
    for part in ("triton on cuda:0 (GPU [0]): not checked", "install 'fusedopt[triton]'", "not [known]"):
        assert part in said.getvalue()


def test_one_that_is_not_named_does_not(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    monkeypatch.setitem(subjects.USUAL, "cpu", ("cpu", "cuda"))
    result = run("--rules", "lion")
    assert result.exit_code == 0
    assert "cuda on cpu: not checked, because it is on cpu" in result.output


def test_the_first_check_does_not_hide_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that it has turned away is the one to look at."""
    monkeypatch.delenv(FIRST_CHECK, raising=False)
    seen = []

    class Asked(CpuBackend):
        def refusal(self, param: torch.Tensor) -> str | None:
            seen.append(os.environ.get(FIRST_CHECK))
            return super().refusal(param)

    monkeypatch.setitem(backends.BACKENDS, "cpu", Asked())
    proofs.check([subjects.Target(CPU, "cpu")], of=only("lion"), formats=("fp32",), shapes=SMALL, seconds=0)
    assert set(seen) == {"0"}
    assert FIRST_CHECK not in os.environ


def test_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    proofs.check([subjects.Target(CPU, "cpu")], of=only("lion"), formats=("bf16",), shapes=SMALL, seconds=0)
    assert torch.equal(torch.get_rng_state(), before)
