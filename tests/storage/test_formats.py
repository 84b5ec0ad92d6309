"""16-bit storage against torch's casts, bit pattern by bit pattern, and stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, assert_same_bits, make_params
from torch import Tensor

import fusedopt

SIXTEEN_BIT = ["bf16", "fp16"]


def store(values: Tensor, rounding: str, dtype: str, seed: int = 0, backend: str = "cpu") -> Tensor:
    """What exp_avg holds after values were written to it: with beta1 = 0 it becomes 0 * 0 + 1 * g."""
    param = torch.nn.Parameter(torch.zeros_like(values))
    param.grad = values
    optimizer = fusedopt.AdamW(
        [param], betas=(0.0, 0.0), state_dtype=DTYPES[dtype], state_rounding=rounding, seed=seed, backend=backend
    )
    optimizer.step()
    return optimizer.state[param]["exp_avg"]


def float32_patterns(low_halves: list[int]) -> Tensor:
    """Every upper half of a float32 with some lower halves."""
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    codes = (high | torch.tensor(low_halves)).flatten()
    return (codes - ((codes >> 31) << 32)).to(torch.int32).view(torch.float32)


# 0x8000 and its neighbours are bfloat16's ties; 0x1000, 0x3000 ... and theirs are float16's.
LOW_HALVES = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_nearest_is_torchs_cast(dtype: str, isa: str) -> None:
    values = float32_patterns(LOW_HALVES)
    assert_same_bits(store(values, "nearest", dtype), (values + 0.0).to(DTYPES[dtype]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_nearest_is_torchs_cast_on_every_float32(dtype: str) -> None:
    for block in range(64):
        values = float32_patterns(list(range(block << 10, (block + 1) << 10)))
        assert_same_bits(store(values, "nearest", dtype), (values + 0.0).to(DTYPES[dtype]), f"block {block}")


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_every_16_bit_number_survives_a_step(dtype: str, isa: str) -> None:
    """Decoded and encoded again, a parameter that does not move keeps its bits."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    param = torch.nn.Parameter(numbers.clone())
    param.grad = torch.zeros_like(numbers)
    fusedopt.AdamW([param], lr=0.0, backend="cpu").step()
    assert_same_bits(param, numbers)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_every_16_bit_gradient_is_read_exactly(dtype: str, isa: str) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    param = torch.nn.Parameter(torch.zeros_like(numbers))
    param.grad = numbers.clone()
    optimizer = fusedopt.AdamW([param], betas=(0.0, 0.0), backend="cpu")
    optimizer.step()
    assert_same_bits(optimizer.state[param]["exp_avg"], numbers.float() + 0.0)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_stochastic_rounding_gives_a_neighbour_in_every_path(dtype: str, isa: str) -> None:
    values = float32_patterns(LOW_HALVES)
    rounded = store(values, "stochastic", dtype)
    assert_same_bits(rounded, store(values, "stochastic", dtype, backend="eager"))
    limit = torch.finfo(DTYPES[dtype]).max
    inside = values.isfinite() & (values.abs() < limit)
    spacing = (values.to(torch.float64).abs().log2().floor() - (7 if dtype == "bf16" else 10)).exp2()
    spacing = spacing.clamp(min=torch.finfo(DTYPES[dtype]).smallest_normal * 2.0 ** -(7 if dtype == "bf16" else 10))
    error = (rounded.double() - values.double()).abs()
    assert (error[inside] < spacing[inside]).all()
    assert torch.equal(rounded.isnan(), values.isnan())
    infinite = values.isinf()
    assert torch.equal(rounded[infinite].float(), values[infinite])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -3.14159, 1e-3, 3.05e-5, 5e-8])
def test_stochastic_rounding_is_unbiased(dtype: str, value: float) -> None:
    """The mean of n draws is the value, within 5 standard errors of a draw between two neighbours."""
    n = 1 << 18
    values = torch.full((n,), value)
    if dtype == "bf16":
        spacing = 2.0 ** (torch.tensor(abs(value)).log2().floor().item() - 7)
    else:
        spacing = max(2.0 ** (torch.tensor(abs(value)).log2().floor().item() - 10), 2.0**-24)
    drawn = store(values, "stochastic", dtype).double()
    assert drawn.unique().numel() == 2
    assert abs(drawn.mean().item() - values[0].double().item()) < 5 * 0.5 * spacing / n**0.5


def test_stochastic_rounding_does_not_freeze_the_second_moment() -> None:
    """The reason for the default: beta2 = .999 moves a bfloat16 by less than half its spacing."""

    def ratio(rounding: str) -> float:
        param = torch.nn.Parameter(torch.zeros(4096))
        optimizer = fusedopt.AdamW([param], state_dtype="bfloat16", state_rounding=rounding)
        for grad, steps in ((10.0, 1), (1.0, 2000)):
            for _ in range(steps):
                param.grad = torch.full((4096,), grad)
                optimizer.step()
        exact = 0.1 * 0.999**2000 + (1 - 0.999**2000)
        return optimizer.state[param]["exp_avg_sq"].double().mean().item() / exact

    assert abs(ratio("stochastic") - 1) < 0.01
    assert not abs(ratio("nearest") - 1) < 0.1


def test_seed_and_state_decide_the_random_bits() -> None:
    values = torch.full((4096,), 1.0 + 2.0**-9)
    first = store(values, "stochastic", "bf16", seed=1)
    assert torch.equal(first, store(values, "stochastic", "bf16", seed=1))
    assert not torch.equal(first, store(values, "stochastic", "bf16", seed=2))
    param = torch.nn.Parameter(torch.zeros(4096))
    param.grad = values
    optimizer = fusedopt.AdamW([param], betas=(0.0, 0.0), state_dtype="bfloat16")
    optimizer.step()
    up = [optimizer.state[param][name] > optimizer.state[param][name].min() for name in ("exp_avg", "exp_avg_sq")]
    assert 0 < (up[0] ^ up[1]).sum() < 4096  # two states draw their own bits


@pytest.mark.parametrize(
    "asked", ["float32", "bfloat16", "float16", {"exp_avg": "bfloat16", "max_exp_avg_sq": "float16"}], ids=str
)
def test_states_are_stored_as_asked(asked: str | dict[str, str]) -> None:
    (param,) = make_params([(7, 3)], torch.bfloat16)
    param.grad = torch.ones_like(param)
    optimizer = fusedopt.AdamW([param], amsgrad=True, state_dtype=asked)
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        expected = asked.get(name, "float32") if isinstance(asked, dict) else asked
        assert optimizer.state[param][name].dtype == getattr(torch, expected)
        assert optimizer.state[param][name].shape == param.shape
    step = optimizer.state[param]["step"]
    assert step.dtype == torch.float32
    assert step.shape == ()


def test_a_running_maximum_is_not_rounded_stochastically_by_default() -> None:
    """Every lucky draw would stay: after many steps with one gradient the maximum must equal its rounding."""
    param = torch.nn.Parameter(torch.zeros(4096))
    optimizer = fusedopt.AdamW([param], amsgrad=True, betas=(0.9, 0.0), state_dtype="bfloat16")
    for _ in range(50):
        param.grad = torch.full((4096,), 1.001)
        optimizer.step()
    largest = optimizer.state[param]["max_exp_avg_sq"]
    assert torch.equal(largest, torch.full((4096,), 1.001**2).bfloat16())
