"""16-bit parameters that do not stall: what each way of keeping more of a weight is worth."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, assert_paths_agree, assert_same_bits, assert_same_run, make_params, set_grads, train
from torch import Tensor

import fusedopt
from fusedopt.engine.members import make_state
from fusedopt.reference import master as reference
from fusedopt.storage.masters import KEYS

KINDS = ["kahan", "split24", "split32", "float32"]
rows = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def weights(optimizer: fusedopt.FusedOptimizer) -> list[Tensor]:
    """The full weights of an optimizer's parameters."""
    model = torch.nn.ParameterList([p for group in optimizer.param_groups for p in group["params"]])
    return list(fusedopt.fp32_parameters(optimizer, model).values())


@rows
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("kind", ["split32", "float32"])
def test_32_bits_are_a_float32_run_bit_for_bit(case, state_dtype: str, kind: str) -> None:
    kwargs = {**case.kwargs, **case.variants[-1], "state_dtype": state_dtype, "min_quantized_numel": 1}
    small = case.ours(make_params([(7, 257), (33,)], torch.bfloat16), **kwargs, master_weights=kind)
    wide = make_params([(7, 257), (33,)], torch.bfloat16)
    large = case.ours([torch.nn.Parameter(param.detach().float()) for param in wide], **kwargs)

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(wide, step)
        for param, source in zip(params, wide):
            param.grad = source.grad.to(param.dtype)

    train(small, 30, grads=grads)
    train(large, 30, grads=grads)
    for ours, param in zip(weights(small), large.param_groups[0]["params"]):
        assert_same_bits(ours, param.detach())
    for shown, param in zip(small.param_groups[0]["params"], large.param_groups[0]["params"]):
        error = (shown.detach().double() - param.detach().double()).abs()
        assert (error <= param.detach().double().abs() * 2.0**-8).all()


@pytest.mark.parametrize("kind", ["split24", "split32"])
def test_split_and_join_of_special_weights(kind: str, isa: str) -> None:
    """Infinities stay, NaN stays NaN, signs of zero stay; what rounds up to inf can be joined again."""
    values = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        1.0,
        -1.0 - 2.0**-9,
        3.3895e38,
        -3.4028e38,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    exact = torch.cat([torch.tensor(values), patterns])
    low = torch.int8 if kind == "split24" else torch.bfloat16
    like = torch.zeros(len(exact), dtype=torch.bfloat16)
    shown, kept = reference.split(kind, exact, like, torch.zeros(len(exact), dtype=low), None)
    joined = reference.join(kind, shown, kept)
    assert torch.equal(joined.isnan(), exact.isnan())
    plain = ~exact.isnan()
    if kind == "split32":
        assert_same_bits(joined[plain], exact[plain])
    else:  # 24 bits: rounded to nearest there
        rounded = ((exact.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
        assert_same_bits(joined[plain], rounded[plain])
    # the compiled step does the same to a weight that does not move
    param = torch.nn.Parameter(shown.clone())
    param.grad = torch.zeros_like(param)
    optimizer = fusedopt.SGD([param], lr=0.0, master_weights=kind, rounding="nearest")
    make_state(optimizer, [(0, param)])
    held = optimizer.state[param][KEYS[kind]]
    held.copy_(kept)
    optimizer.step()
    assert_same_bits(param.detach(), shown)
    assert torch.equal(*(x[plain].view(torch.int8 if kind == "split24" else torch.int16) for x in (held, kept)))


@pytest.mark.parametrize("kind", ["split24", "split32"])
def test_no_nan_becomes_a_number(kind: str, isa: str) -> None:
    """NaN of the largest patterns: rounding its upper half would carry it to -0."""
    from fusedopt.backends import ParamStep
    from fusedopt.backends.cpu import CpuSession
    from fusedopt.backends.eager import EagerSession

    optimizer = fusedopt.SGD(make_params([(32,)], torch.bfloat16), lr=1.0, master_weights=kind)
    for session in (CpuSession(), EagerSession()):
        param = torch.ones(32, dtype=torch.bfloat16)
        grad = torch.tensor([0x7FFFFFFF, -1] * 16, dtype=torch.int32).view(torch.float32)
        kept = torch.zeros(32, dtype=torch.int8 if kind == "split24" else torch.bfloat16)
        session.begin([optimizer.group_step(optimizer.param_groups[0])], [None])
        assert session.add(ParamStep(0, 0, param, grad, (), torch.tensor(0.0), kept))
        session.step([1.0])
        assert param.isnan().all()


def movement(steps: int, lr: float, grad: float, weight_decay: float, **kwargs: object) -> float:
    """How far bfloat16 weights of 1 have moved, on average over 2**16 of them."""
    param = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=lr, **kwargs)
    if weight_decay:  # decoupled, as in AdamW
        optimizer = fusedopt.AdamW([param], lr=lr, weight_decay=weight_decay, **kwargs)
    for _ in range(steps):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    (full,) = weights(optimizer)
    return 1.0 - full.double().mean().item()


@pytest.mark.parametrize(
    ("kwargs", "low", "high"),
    [
        ({"master_weights": "split24"}, 0.98, 1.02),
        ({"master_weights": "split24", "rounding": "stochastic"}, 0.98, 1.02),
        ({"master_weights": "split32"}, 0.98, 1.02),
        ({"master_weights": "float32"}, 0.98, 1.02),
        ({"rounding": "stochastic"}, 0.98, 1.02),
        ({"master_weights": "kahan"}, 0.85, 1.15),
        ({"master_weights": "kahan", "rounding": "stochastic"}, 0.98, 1.02),
        ({}, 0.0, 0.0),  # torch's way: nothing moves
    ],
    ids=str,
)
def test_small_updates_arrive(kwargs: dict, low: float, high: float) -> None:
    """2,000 updates of 1e-5 move a weight of 1 by .02."""
    found = movement(2000, lr=1e-5, grad=1.0, weight_decay=0.0, **kwargs) / 0.02
    print(f"{kwargs}: {found:.4f} of the movement")
    assert low <= found <= high


@pytest.mark.parametrize(
    "kwargs",
    [{"master_weights": kind} for kind in KINDS] + [{"rounding": "stochastic"}],
    ids=str,
)
def test_weight_decay_alone_arrives(kwargs: dict) -> None:
    """1,000 steps of lr 1e-3 and decay .1 leave .905 of a weight."""
    left = 1.0 - movement(1000, lr=1e-3, grad=0.0, weight_decay=0.1, **kwargs)
    print(f"{kwargs}: {left:.4f} left")
    assert abs(left / 0.9999**1000 - 1) <= 0.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_parameter_that_somebody_wrote_counts(kind: str, backend: str) -> None:
    """Loading a model's weights into a running optimizer must not be undone by what it keeps."""
    params = make_params([(100,)], torch.bfloat16)
    optimizer = train(fusedopt.AdamW(params, master_weights=kind, lr=1e-3, backend=backend), 3)
    with torch.no_grad():
        params[0].copy_(torch.full((100,), 5.0))
    params[0].grad = torch.zeros(100, dtype=torch.bfloat16)
    optimizer.step()
    assert ((params[0] - 5.0).abs() < 0.05).all()


def zeroed(backend: str, **kwargs: object) -> torch.optim.Optimizer:
    """A run in which somebody sets weights to zero, as pruning does. Zero has no lower half with a sign of its own."""
    params = make_params([(7, 257), (4, 64), (33,)], torch.bfloat16)
    optimizer = train(fusedopt.AdamW(params, lr=1e-3, backend=backend, **kwargs), 3)
    with torch.no_grad():
        for param in params:
            param.view(-1)[::3] = 0.0
            param.view(-1)[1::3] = -0.0
    for value in weights(optimizer):
        assert (value.view(-1)[::3].abs().max() < 0.1) & (value.view(-1)[1::3].abs().max() < 0.1)
    return train(optimizer, 2, first=3)


zeroed_formats = pytest.mark.parametrize("kwargs", [{}, {"state_dtype": "8bit", "min_quantized_numel": 1}], ids=str)


@zeroed_formats
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_that_somebody_wrote_count(kind: str, kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what splits keep beside them would make them NaN."""
    assert_paths_agree(lambda backend: zeroed(backend, master_weights=kind, **kwargs), monkeypatch)


@zeroed_formats
@pytest.mark.parametrize("kind", ["split24", "split32"])
@pytest.mark.parametrize(("backend", "fixture"), [("cuda", "emulated"), ("triton", "interpreted")])
def test_zeros_that_somebody_wrote_count_in_kernels_of_gpus(
    backend: str, fixture: str, kind: str, kwargs: dict, request: pytest.FixtureRequest
) -> None:
    expected = zeroed("eager", master_weights=kind, **kwargs)
    request.getfixturevalue(fixture)
    assert_same_run(zeroed(backend, master_weights=kind, **kwargs), expected)


def test_float16_with_a_float32_master() -> None:
    params = make_params([(100,)], torch.float16)
    optimizer = train(fusedopt.AdamW(params, master_weights="float32"), 3)
    assert optimizer.state[params[0]]["master"].dtype == torch.float32
    assert_same_bits(params[0].detach(), optimizer.state[params[0]]["master"].half())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_full_weights_are_given_and_taken(kind: str | None) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.Linear(64, 3)).bfloat16()
    model.append(torch.nn.Linear(3, 2))  # float32

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        set_grads(params, step)

    def new(parameters) -> fusedopt.AdamW:
        return fusedopt.AdamW(parameters, lr=1e-3, master_weights=kind)

    optimizer = train(new(model.parameters()), 5, grads=grads)
    given = fusedopt.fp32_parameters(optimizer, model)
    assert list(given) == [name for name, _ in model.named_parameters()]
    assert all(value.dtype == torch.float32 for value in given.values())
    for (name, param), value in zip(model.named_parameters(), given.values()):
        assert (value - param.float()).abs().max() <= value.abs().max() * 2.0**-8, name
    twin = torch.nn.Sequential(torch.nn.Linear(100, 64), torch.nn.Linear(64, 3)).bfloat16()
    twin.append(torch.nn.Linear(3, 2))
    other = new(twin.parameters())
    fusedopt.load_fp32_parameters(other, twin, given)
    for name, value in fusedopt.fp32_parameters(other, twin).items():
        assert_same_bits(value, given[name], name)
    if kind != "kahan":  # its sum may lie half way between two parameters
        for param, copy in zip(model.parameters(), twin.parameters()):
            assert_same_bits(copy.detach(), param.detach())


def test_full_weights_that_do_not_fit() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.parameters())
    given = fusedopt.fp32_parameters(optimizer, model)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weights lack \['bias'\] and have unknown \['b'\]"):
        fusedopt.load_fp32_parameters(optimizer, model, {"weight": given["weight"] + 1, "b": given["bias"]})
    with pytest.raises(ValueError, match=r"weights\['bias'\] has shape \(3,\) and the parameter \(2,\)"):
        fusedopt.load_fp32_parameters(optimizer, model, {"weight": given["weight"] + 1, "bias": torch.zeros(3)})
    for bias, message in (
        ([0.0, 0.0], r"weights\['bias'\] is a list; pass a tensor of shape \(2,\)"),
        (
            torch.zeros(2, dtype=torch.complex64),
            r"weights\['bias'\] is torch.complex64 and the parameter",
        ),
        (torch.zeros(2, device="meta"), r"weights\['bias'\] is on the meta device"),
        (torch.zeros(2).to_sparse(), r"weights\['bias'\] is of layout torch.sparse_coo"),
    ):
        with pytest.raises(TypeError if isinstance(bias, list) else ValueError, match=message):
            fusedopt.load_fp32_parameters(optimizer, model, {"weight": given["weight"] + 1, "bias": bias})
    with pytest.raises(TypeError, match="weights is a list; pass the mapping"):
        fusedopt.load_fp32_parameters(optimizer, model, list(given.values()))

    class Wrapper:  # as trainers put around one of ours
        param_groups, state = optimizer.param_groups, optimizer.state

    with pytest.raises(TypeError, match="optimizer is a Wrapper; pass the optimizer of this package that it holds"):
        fusedopt.load_fp32_parameters(Wrapper(), model, {name: weight + 1 for name, weight in given.items()})
    assert torch.equal(model.weight, before)


def test_anyprecision_is_the_same_under_other_names() -> None:
    def run(optimizer_of) -> torch.optim.Optimizer:
        return train(optimizer_of(make_params([(7, 257), (5,)], torch.bfloat16)), 5)

    any_precision = run(
        lambda params: fusedopt.AnyPrecisionAdamW(
            params, lr=1e-2, weight_decay=0.1, use_kahan_summation=True, momentum_dtype=torch.float32
        )
    )
    ours = run(
        lambda params: fusedopt.AdamW(
            params,
            lr=1e-2,
            weight_decay=0.1,
            state_dtype={"exp_avg_sq": "bfloat16"},
            state_rounding="nearest",
            master_weights="kahan",
        )
    )
    from cases import assert_same_run

    assert_same_run(any_precision, ours)
    held = any_precision.state[any_precision.param_groups[0]["params"][0]]
    assert {name: value.dtype for name, value in held.items()} == {
        "step": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.bfloat16,
        "compensation": torch.bfloat16,
    }
    wide = run(
        lambda params: fusedopt.AnyPrecisionAdamW(
            params, use_kahan_summation=True, compensation_buffer_dtype=torch.float32, variance_dtype="8bit"
        )
    )
    assert wide.state[wide.param_groups[0]["params"][0]]["compensation"].dtype == torch.float32
