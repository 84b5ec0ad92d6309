"""8-bit blockwise states: the format bit by bit, what is unbiased, what is spoilt, and what never moves by mistake."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from cases import CASES, assert_same_bits, assert_same_run, make_params, set_grads, train
from torch import Tensor

import fusedopt
from fusedopt.reference.random import random_bits
from fusedopt.storage import quantization

both_signs = pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
PLAIN = 100.0**2 * 2.0**-22  # a square times a power of two: kept exactly, signed or not
EIGHT_BIT = {"state_dtype": "8bit", "min_quantized_numel": 1}


def threshold_of(bits: int) -> Fraction:
    """R of the format's definition, from 16 random bits."""
    return Fraction(2 * (bits >> 2) + 1, 1 << 15)


def float_of(bits: int) -> float:
    return torch.tensor(bits - ((bits >> 31) << 32), dtype=torch.int32).view(torch.float32).item()


def stored(values: Tensor, is_signed: bool, rounding: str = "stochastic", **kwargs: object) -> tuple[Tensor, Tensor]:
    """Codes and scales after a step that sets a state to `values`: m = 0 m + 1 g, or s = 0 + 1 g g."""
    param = torch.nn.Parameter(torch.zeros_like(values))
    param.grad = values if is_signed else values.sqrt()
    kwargs = {**EIGHT_BIT, "state_rounding": rounding, **kwargs}
    cls = fusedopt.SGD if is_signed else fusedopt.Adagrad
    optimizer = cls([param], **({"momentum": 0.5} if is_signed else {}), **kwargs)
    optimizer.step()
    held, name = optimizer.state[param], optimizer.STATES[0].name
    return held[f"{name}_codes"], held[f"{name}_scales"]


def exact(value: float, scale: int, is_signed: bool, threshold: Fraction) -> int:
    """The code of one number, in exact arithmetic, from the format's definition alone."""
    steps = Fraction(abs(value)) * Fraction(2) ** (127 - scale)
    q = math.isqrt(math.floor(steps))
    q += steps - q * q > threshold * (2 * q + 1)
    if is_signed:
        return q | 0x80 if q and value < 0 else q
    return max(q, 1) if value else 0


@both_signs
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_code_is_the_one_of_the_definition(is_signed: bool, rounding: str) -> None:
    """Against fractions of Python; numbers next to where codes change are in test_codes.py."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(16, 200, generator=generator) * 10.0 ** -(5 * torch.rand(16, 200, generator=generator))
    values = values if is_signed else values.abs()
    bits = random_bits(values.shape, values.device, seed=1, step=1, first_index=0, state=0)
    codes, scales = quantization.encode(values, is_signed=is_signed, bits=bits if rounding == "stochastic" else None)
    top = 127 if is_signed else 255
    different = 0
    for row in range(16):
        for column in range(200):
            scale = scales[row, column // 64].item()
            block = values[row, column // 64 * 64 : (column // 64 + 1) * 64]
            largest = block.abs().max().item()
            # the finest scale whose range holds the largest element
            assert largest <= top**2 * 2.0 ** (scale - 127)
            assert largest > top**2 * 2.0 ** (scale - 1 - 127)
            threshold = threshold_of(bits[row, column].item()) if rounding == "stochastic" else Fraction(1, 2)
            different += codes[row, column].item() != exact(values[row, column].item(), scale, is_signed, threshold)
    assert different == 0


@both_signs
def test_decode_is_the_square_times_a_power_of_two(is_signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(4).reshape(256, 4)
    values = quantization.decode(codes, scales, is_signed=is_signed).double()
    q = codes.double()
    signs = torch.ones_like(q)
    if is_signed:
        signs, q = torch.where(codes >= 128, -1.0, 1.0).double(), (codes & 127).double()
    expected = signs * q * q * 2.0 ** (torch.arange(256).double()[:, None] - 127)
    assert torch.equal(values[1:255].float(), expected[1:255].float())
    assert (values[0] == 0).all()  # zeroed memory is the zero state
    assert torch.equal(values[255].isnan(), q[255] == 0)  # codes of a spoilt block are 0


@both_signs
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_special_blocks(is_signed: bool, backend: str, isa: str) -> None:
    """What is not finite, or too large, spoils its own block of 64 and nothing else."""
    spoilt = [float("nan"), float("inf"), 3.38e38, float_of(0x7F7D0000)]
    tame = [float_of(0x7F7CFFFF), 1e30, 1e-30, 1e-45, 0.0, 1.0]
    if is_signed:
        spoilt += [-float("inf"), -3.4e38]
    else:  # made from a root that is squared: not every number can be hit
        spoilt, tame = [float("nan"), float("inf")], [1e30, 1e-30, 0.0, 1.0]
    rows = []
    for special in [*spoilt, *tame]:
        row = torch.full((200,), PLAIN)
        row[70] = special
        rows.append(row)
    codes, scales = stored(torch.stack(rows), is_signed, backend=backend)
    values = quantization.decode(codes, scales, is_signed=is_signed)
    for row, special in enumerate([*spoilt, *tame]):
        neighbours = torch.cat([values[row, :64], values[row, 128:]])
        assert torch.equal(neighbours, torch.full((136,), PLAIN)), special
        if special in spoilt or special != special:
            assert scales[row, 1] == 255
            assert (codes[row, 64:128] == 0).all()
            assert values[row, 64:128].isnan().all()
        else:
            assert values[row, 64:128].isfinite().all()
            unit = 2.0 ** (scales[row, 1].item() - 127)
            # a spacing of the largest codes is 2 / 127 of the number, of the smallest a unit
            assert values[row, 70] == pytest.approx(special, rel=0.02, abs=unit)


def test_a_spoilt_block_stays_the_only_one_through_training(isa: str) -> None:
    for backend in ("cpu", "eager"):
        (param,) = make_params([(4, 256)], torch.float32)
        optimizer = fusedopt.AdamW([param], **EIGHT_BIT, backend=backend)
        for step in range(5):
            set_grads([param], step)
            if step == 2:
                param.grad[1, 100] = float("inf")
            optimizer.step()
        bad = torch.zeros(4, 256, dtype=torch.bool)
        bad[1, 64:128] = True
        assert torch.equal(param.isnan(), bad)


@both_signs
def test_numbers_of_any_size_share_a_block(is_signed: bool, isa: str) -> None:
    """1e30 beside 1e-30 and subnormals: the large ones right, the small ones zero, or the least variance."""
    values = torch.full((3, 64), 1e-30)
    values[0, 0], values[1, 5], values[2, :] = 1e30, 1.0, 1e-40
    values[2, 1] = 3e-40
    codes, scales = stored(values, is_signed)
    decoded = quantization.decode(codes, scales, is_signed=is_signed)
    assert decoded[0, 0] == pytest.approx(1e30, rel=0.02)  # a spacing of the largest codes is 2 / 127
    assert decoded[1, 5] == pytest.approx(1.0, rel=0.02)
    tiny = codes[0, 1:]
    assert (tiny == (0 if is_signed else 1)).all()
    # far below the smallest scale: nothing is left of a momentum, and of a variance the least there is
    assert (codes[2] == (0 if is_signed else 1)).all()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-45, 1e30, float_of(0x7F7C8000)])
@both_signs
def test_special_blocks_have_the_same_bits_everywhere(special: float, is_signed: bool, isa: str) -> None:
    values = torch.full((2, 300), 1e-3) * torch.linspace(0, 3, 300)
    values[0, 5], values[0, 299] = special, special
    for rounding in ("nearest", "stochastic"):
        ours = stored(values, is_signed, rounding, backend="cpu")
        eager = stored(values, is_signed, rounding, backend="eager")
        for a, b in zip(ours, eager):
            assert torch.equal(a, b)


def test_the_largest_blocks_that_are_stored() -> None:
    """Between the largest power of two and where blocks are given up the scale itself reaches its end."""
    for bits in (0x7F7C03FF, 0x7F7C0400, 0x7F7C0401, 0x7F7CFFFF):
        values = torch.full((1, 64), float_of(bits))
        for is_signed in (True, False):
            codes, scales = quantization.encode(values, is_signed=is_signed)
            decoded = quantization.decode(codes, scales, is_signed=is_signed)
            torch.testing.assert_close(decoded, values, rtol=0.01, atol=0)  # to nearest: half a spacing


@both_signs
@pytest.mark.parametrize("fraction", [0.003, 0.1, 0.4, 0.77, 1.0])
def test_stochastic_codes_are_unbiased(is_signed: bool, fraction: float) -> None:
    """The mean of n draws is the value, within 5 standard errors of a draw between two neighbours."""
    rows, top = 4096, 127 if is_signed else 255
    values = torch.full((rows, 64), fraction)
    values[:, 0] = 1.0
    codes, scales = stored(values, is_signed)
    decoded = quantization.decode(codes, scales, is_signed=is_signed)[:, 1:].double()
    exact = values[0, 1].double().item() if is_signed else values[0, 1].sqrt().square().double().item()
    unit = 2.0 ** (scales[0, 0].item() - 127)
    spacing = unit * (2 * min(top, int((exact / unit) ** 0.5)) + 1)
    assert abs(decoded.mean().item() - exact) < 5 * 0.5 * spacing / decoded.numel() ** 0.5


def test_a_variance_never_dies() -> None:
    values = torch.full((1, 64), 1e-12)
    values[0, 0] = 1.0
    codes, _ = stored(values, False, "nearest")
    assert (codes[0, 1:] == 1).all()


def test_which_parameters_are_quantized() -> None:
    """By the global shape: two dimensions, rows of at least a block, 4,096 elements."""
    shapes = {
        (64, 64): True,
        (63, 65): False,
        (4096,): False,
        (64, 63): False,
        (16, 4, 64): True,
        (4096, 1): False,
        (): False,
    }
    for shape, is_quantized in shapes.items():
        (param,) = make_params([shape], torch.float32)
        with pytest.warns(UserWarning, match="changes nothing") if not is_quantized else _silence():
            optimizer = train(fusedopt.AdamW([param], state_dtype="8bit"), 1)
        held = optimizer.state[param]
        assert ("exp_avg_codes" in held) == is_quantized, shape
        assert ("exp_avg" in held) != is_quantized
        if is_quantized:
            assert held["exp_avg_codes"].shape == param.shape
            assert held["exp_avg_scales"].shape == (shape[0], -(-param[0].numel() // 64))


def _silence():
    import contextlib

    return contextlib.nullcontext()


def test_a_model_in_which_nothing_is_quantized_is_warned_of_once() -> None:
    optimizer = fusedopt.Lion(make_params([(10,), (3, 3)], torch.float32), state_dtype="8bit")
    with pytest.warns(
        UserWarning, match=r"no parameter can have it \(1-dimensional, fewer than 4096 elements\)"
    ) as caught:
        train(optimizer, 3)
    assert len(caught) == 1
    assert caught[0].filename.endswith("cases.py")  # where step() was called


def test_groups_have_formats_of_their_own() -> None:
    groups = [
        {"params": make_params([(64, 64)], torch.float32)},
        {"params": make_params([(64, 64)], torch.float32), "state_dtype": "float32"},
        {"params": make_params([(64, 64)], torch.float32), "state_dtype": {"exp_avg_sq": "8bit"}},
    ]
    optimizer = train(fusedopt.AdamW(groups, state_dtype="8bit"), 1)
    keys = [set(optimizer.state[group["params"][0]]) - {"step"} for group in optimizer.param_groups]
    first, second = {"exp_avg_codes", "exp_avg_scales"}, {"exp_avg_sq_codes", "exp_avg_sq_scales"}
    assert keys == [first | second, {"exp_avg", "exp_avg_sq"}, {"exp_avg"} | second]


def test_states_that_never_are() -> None:
    (param,) = make_params([(64, 64)], torch.float32)
    held = train(fusedopt.AdamW([param], amsgrad=True, state_dtype="8bit"), 1).state[param]
    assert held["max_exp_avg_sq"].dtype == torch.float32
    (param,) = make_params([(64, 64)], torch.float32)
    optimizer = train(fusedopt.RMSprop([param], centered=True, momentum=0.9, state_dtype="8bit"), 1)
    assert set(optimizer.state[param]) == {
        "step",
        "momentum_buffer_codes",
        "momentum_buffer_scales",
        "square_avg",
        "grad_avg",
    }
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["square_avg"].dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_initial_value_is_encoded(case) -> None:
    if "initial_accumulator_value" not in case.ours([torch.zeros(1)]).defaults:
        pytest.skip("begins with zeros")
    (param,) = make_params([(2, 100)], torch.float32)
    param.grad = torch.zeros_like(param)
    optimizer = case.ours([param], initial_accumulator_value=0.3, **EIGHT_BIT, state_rounding="nearest")
    optimizer.step()
    held = optimizer.state[param]
    values = quantization.decode(held["sum_codes"], held["sum_scales"], is_signed=False)
    torch.testing.assert_close(values, torch.full_like(values, 0.3), rtol=0.01, atol=0)  # half a spacing


def test_a_whole_and_a_split_tensor_agree(isa: str) -> None:
    """Rows as tensors of their own, told where they begin: the run of the whole, random bits included."""
    from fusedopt.backends import ParamStep
    from fusedopt.backends.cpu import CpuSession

    shape = (6, 300)
    whole = train(fusedopt.AdamW(make_params([shape], torch.float32), **EIGHT_BIT, seed=3), 2)
    split = train(fusedopt.AdamW(make_params([shape], torch.float32), **EIGHT_BIT, seed=3), 1)
    (param,) = split.param_groups[0]["params"]
    held, session = split.state[param], CpuSession()
    set_grads([param], 1)
    session.begin([split.group_step(split.param_groups[0])], [None])
    for i, rows in enumerate((slice(0, 1), slice(1, 4), slice(4, 6))):
        states = tuple((held[f"{n}_codes"][rows], held[f"{n}_scales"][rows]) for n in ("exp_avg", "exp_avg_sq"))
        step = held["step"].clone()
        assert session.add(
            ParamStep(0, i, param.detach()[rows], param.grad[rows], states, step, None, rows.start * 300)
        )
    session.step([1.0])
    twin = whole.param_groups[0]["params"][0]
    assert_same_bits(param, twin)
    for name in held.keys() - {"step"}:
        assert torch.equal(held[name], whole.state[twin][name]), name


def test_blocks_across_the_32_bit_boundary(isa: str) -> None:
    """The random key changes inside a block; its scale must not."""
    from fusedopt.backends import ParamStep
    from fusedopt.backends.cpu import CpuSession
    from fusedopt.backends.eager import EagerSession

    optimizer = fusedopt.AdamW(make_params([(3, 200)], torch.bfloat16), **EIGHT_BIT, rounding="stochastic")
    results = []
    for session in (CpuSession(), EagerSession()):
        (param,) = make_params([(3, 200)], torch.bfloat16)
        states = tuple((torch.zeros(3, 200, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8)) for _ in range(2))
        step = torch.tensor(0.0)
        for i in range(3):
            set_grads([param], i)
            session.begin([optimizer.group_step(optimizer.param_groups[0])], [None])
            assert session.add(ParamStep(0, 0, param.detach(), param.grad, states, step, None, 2**32 - 230))
            session.step([1.0])
        results.append((param.detach(), *states[0], *states[1]))
    for ours, theirs in zip(*results):
        assert_same_bits(ours, theirs)


def tracking(share: slice, steps: int, after: float = 0.1, rounding: str | None = None) -> float:
    """sqrt(mean v) over the true deviation, after it has dropped, over 4,096 elements."""
    rows = 64 * 4096 // (share.stop - share.start) // 64
    param = torch.nn.Parameter(torch.zeros(rows, 64))
    optimizer = fusedopt.AdamW([param], lr=0.0, betas=(0.9, 0.999), **EIGHT_BIT, state_rounding=rounding)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1000):
        param.grad = torch.randn(rows, 64, generator=generator)
        if step >= 1000:
            param.grad[:, share] *= after
        optimizer.step()
    held = optimizer.state[param]
    v = quantization.decode(held["exp_avg_sq_codes"], held["exp_avg_sq_scales"], is_signed=False)[:, share]
    assert v.numel() >= 4096
    return (v.double().mean().sqrt() / after).item()


@pytest.mark.slow
@pytest.mark.parametrize("share", [slice(0, 64), slice(0, 32)], ids=["whole block", "half block"])
def test_variances_follow_when_gradients_shrink(share: slice) -> None:
    """sigma drops 10 x at beta2 = .999; 8,000 steps later v must be where it belongs."""
    found = tracking(share, 8000)
    print(f"sqrt(mean v) / sigma = {found:.4f}")
    assert 0.95 <= found <= 1.05


def test_rounded_to_nearest_a_variance_does_not_follow() -> None:
    """The reason for the default."""
    assert tracking(slice(0, 64), 500, rounding="nearest") > 5


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_no_rows(backend: str) -> None:
    """Nothing to step, but states of codes all the same."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((0, 64), (4, 64))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fusedopt.AdamW(params, state_dtype="8bit", min_quantized_numel=0, backend=backend)
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_codes"].shape == (0, 64)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("size", [2**18, 2**18 + 37])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_flat_buffers_are_one_row(size: int, backend: str) -> None:
    """Vectors that are no biases: blocks run along them, as along a matrix of one row; smaller ones keep float32."""
    runs = []
    for shape in ((size,), (1, size)):
        params = make_params([shape], torch.float32)
        optimizer = train(fusedopt.AdamW(params, lr=1e-2, state_dtype="8bit", seed=5, backend=backend), 2)
        runs.append((params[0], optimizer.state[params[0]]))
    (vector, held), (matrix, other) = runs
    assert held["exp_avg_codes"].shape == (size,)
    assert held["exp_avg_scales"].shape == (-(-size // 64),)
    assert_same_bits(vector.detach(), matrix.detach()[0])
    for key in ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"):
        assert_same_bits(held[key], other[key].reshape(held[key].shape))
    small = make_params([(2**18 - 1,), (64, 64)], torch.float32)
    train(optimizer := fusedopt.AdamW(small, state_dtype="8bit"), 1)
    assert "exp_avg" in optimizer.state[small[0]]
    optimizer = train(fusedopt.AdamW([vector], state_dtype="8bit", backend=backend), 1)
    again = fusedopt.AdamW([torch.nn.Parameter(vector.detach().clone())], state_dtype="8bit", backend=backend)
    again.load_state_dict(optimizer.state_dict())
    assert_same_run(again, optimizer)
