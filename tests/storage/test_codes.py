"""8-bit codes next to where they change, on every path: each finds q by a root of its own, and the codes are one.

A code is defined by what it satisfies (csrc/storage/blockwise8.h). So numbers are tried whose root is nearly an
integer, and numbers that are nearly rounded up, for every q and both parities of the scale, which a root of 2 is in.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _core
from fusedopt.reference.random import random_bits

PATHS = ["eager", *_core.available_isas(), "cuda", "triton"]
# Rows of whole blocks, which are strips; of whole blocks and the rest, which are stepped one by one.
WIDTHS = [64, 127]
EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}
NEAR = range(-3, 4)  # float32 numbers on either side


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in _core.available_isas():
        monkeypatch.setenv("FUSEDOPT_CPU_ISA", request.param)
        return "cpu"
    if request.param in ("cuda", "triton"):
        request.getfixturevalue({"cuda": "emulated", "triton": "interpreted"}[request.param])
    return request.param


def moved(x: Tensor, ulps: Tensor) -> Tensor:
    """The float32 numbers so many places further; 0 at least."""
    return (x.view(torch.int32) + ulps.int()).clamp(min=0).view(torch.float32)


def exact(steps: Fraction, threshold: Fraction, is_signed: bool) -> int:
    q = math.isqrt(math.floor(steps))
    q += steps - q * q > threshold * (2 * q + 1)
    return q if is_signed else max(q, int(steps > 0))


@dataclass(frozen=True)
class Trial:
    """Numbers, and the codes that they have by definition."""

    grad: Tensor  # after which a state holds the numbers
    numbers: list[float]
    near: list[int]  # the q whose square, or whose threshold, each is next to
    thresholds: list[float]
    codes: list[int]


@functools.cache
def trial(rounding: str, width: int, is_signed: bool, exponent: int) -> Trial:
    top = 127 if is_signed else 255
    wanted = [(q, up, ulps) for q in range(top) for up in (False, True) for ulps in NEAR]
    places = [i for i in range(4 * len(wanted)) if i % width % 64 != 0][: len(wanted)]
    rows = places[-1] // width + 1
    bits = random_bits(torch.Size([rows * width]), torch.device("cpu"), seed=0, step=1, first_index=0, state=0)
    thresholds = (2.0 * (bits >> 2) + 1.0) / 2**15
    if rounding == "nearest":
        thresholds = torch.full_like(thresholds, 0.5)
    # Where nothing else is wanted, what gives the block its scale.
    q, up, ulps = torch.full_like(bits, top - 1), torch.zeros_like(bits), torch.zeros_like(bits)
    q[places], up[places], ulps[places] = torch.tensor(wanted, dtype=torch.int32).T
    target = (q.double() ** 2 + up * thresholds.double() * (2 * q + 1)) * 2.0**exponent
    if is_signed:  # m = 0 m + g
        grad = values = moved(target.float(), ulps)
    else:  # s = 0 + g g
        grad = moved(target.sqrt().float(), ulps)
        values = grad * grad
    unit = Fraction(2) ** exponent
    numbers, limits = values.tolist(), thresholds.tolist()
    codes = [exact(Fraction(x) / unit, Fraction(threshold), is_signed) for x, threshold in zip(numbers, limits)]
    return Trial(grad.reshape(rows, width), numbers, q.tolist(), limits, codes)


@pytest.mark.parametrize("exponent", [-20, -21], ids=["even", "odd"])
@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_codes_are_those_of_the_definition(
    backend: str, rounding: str, width: int, is_signed: bool, exponent: int
) -> None:
    tried = trial(rounding, width, is_signed, exponent)
    param = torch.nn.Parameter(torch.zeros_like(tried.grad))
    kwargs = {**EIGHT_BIT, "state_rounding": rounding, "backend": backend}
    optimizer = fusedopt.SGD([param], momentum=0.5, **kwargs) if is_signed else fusedopt.Adagrad([param], **kwargs)
    param.grad = tried.grad
    optimizer.step()

    held, name = optimizer.state[param], optimizer.STATES[0].name
    assert (held[f"{name}_scales"] == 127 + exponent).all()
    codes = held[f"{name}_codes"].flatten().tolist()
    wrong = [i for i, (code, right) in enumerate(zip(codes, tried.codes)) if code != right]
    assert not wrong, [(tried.numbers[i], tried.thresholds[i], codes[i], tried.codes[i]) for i in wrong[:5]]
    # Some are rounded up, some not.
    assert {code - q for code, q in zip(codes, tried.near)} >= {0, 1}
