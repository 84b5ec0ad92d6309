"""Norms of updates that kernels take on the way of a step: steps that are odd have the reference's bits, too."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from cases import ADAFACTOR, CASES, Case, make_params, set_grads, train
from scaling import Unread

import fusedopt
from fusedopt.engine import gather

EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}
DEVICES = {"cuda": "emulated", "triton": "interpreted"}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A backend whose kernels run on the CPU here."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    request.getfixturevalue(DEVICES[request.param])
    return str(request.param)


@pytest.mark.parametrize(
    "kwargs",
    [{}, EIGHT_BIT, {"master_weights": "kahan", "dtype": torch.bfloat16}],
    ids=["elements", "blocks", "compensated"],
)
def test_what_is_left_as_it_was_has_not_moved(device: str, kwargs: dict[str, Any]) -> None:
    """Of whole tiles, and of ragged rows."""
    reports = []
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", torch.float32)
    for backend in (device, "eager"):
        params = make_params([(17, 64), (3, 100)], dtype)
        optimizer = fusedopt.AdamW(params, lr=0.1, **kwargs, nonfinite="skip_block", backend=backend)
        set_grads(params, 0)
        params[0].grad[3, 5] = params[0].grad[16, 9] = params[1].grad[1, 70] = float("inf")
        params[1].grad[2] = float("nan")
        optimizer.record_norms()
        optimizer.step()
        reports.append(optimizer.norms_report())
    assert reports[0] == reports[1]
    assert all(0 < each.update < math.inf for each in reports[0].parameters)


class OnDevice(Unread):
    """A number of a device that is read where the sums are, which are waited for."""

    def item(self) -> float:
        return float(self.tolist()[0])


@pytest.mark.parametrize("case", [CASES[0], ADAFACTOR], ids=lambda case: case.name)
def test_a_step_that_is_not_taken_has_the_norms_of_what_stays(
    device: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So say the kernels; the report stays that of the last step that was taken."""
    params = make_params([(17, 64), (3, 100), (5,)], torch.bfloat16)
    optimizer = case.ours(params, **case.kwargs, **EIGHT_BIT, master_weights="split24", backend=device)
    optimizer.record_norms()
    train(optimizer, 1)
    taken = optimizer.norms_report()
    assert all(each.update > 0 for each in taken.parameters)
    set_grads(params, 1)
    params[1].grad[1, 3] = float("inf")
    optimizer.found_inf = OnDevice(torch.tensor([1.0]))
    optimizer.step()
    assert optimizer.norms_report() == taken
    monkeypatch.setattr(gather, "_was_left_out", lambda *_: False)
    optimizer.step()
    left = optimizer.norms_report()
    assert [each.update for each in left.parameters] == [0.0] * 3
    assert [each.weight for each in left.parameters] == [each.weight for each in taken.parameters]


def test_groups_and_rules_in_one_step(device: str) -> None:
    """In an order that is not that of the launches, one of more tiles than a program takes, one of nothing."""
    reports = []
    for backend in (device, "eager"):
        params = make_params([(9, 64), (0,), (4_500,), (2, 100), (30,), (33,)], torch.float32)
        params += make_params([(4, 30), (70,), (5, 7)], torch.bfloat16)
        groups = [{"params": params[i::3], "lr": 10.0 ** -(i + 1), "amsgrad": i == 1} for i in range(3)]
        groups[0]["state_dtype"] = "8bit"
        optimizer = fusedopt.AdamW(groups, min_quantized_numel=1, backend=backend)
        set_grads(params, 0)
        params[5].grad = None
        optimizer.record_norms()
        optimizer.step()
        reports.append(optimizer.norms_report())
    assert reports[0] == reports[1]
    assert len(reports[0].parameters) == 8
