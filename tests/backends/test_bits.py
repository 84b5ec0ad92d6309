"""One result everywhere: instruction sets, thread counts, chunkings and the reference path, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FORMATS,
    ISAS,
    ODD_SIZES,
    SANITIZED,
    SHAPES_2D,
    Case,
    assert_paths_agree,
    assert_same_bits,
    assert_same_run,
    format_kwargs,
    make_params,
    set_grads,
    shifted,
    train,
)
from matrices import masters_of_all, of_memory, rules_and_formats

from fusedopt import _core

# A difference of bits does not go away again; so few steps show what many do: late ones are a test of their own.
STEPS = 2 if SANITIZED else 3


def offset_params(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Each shape once at an aligned address and, unless it is longer than a chunk, once one element behind it."""
    short = [shape for shape in shapes if math.prod(shape) < 65536]
    offset = [shifted(param) for param in make_params(short, dtype, seed=1)]
    assert all(param.data_ptr() % 32 != 0 or param.numel() == 0 for param in offset)
    return make_params(shapes, dtype) + offset


@rules_and_formats
def test_every_path_gives_the_same_bits(
    case: Case, kwargs: dict, dtype: str, state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {**kwargs, **format_kwargs(case, kwargs, state_format)}
    if state_format.startswith("8bit") or state_format == "mixed":
        shapes = list(SHAPES_2D)
    else:
        shapes = [(n,) for n in ODD_SIZES]
    assert_paths_agree(
        lambda backend: train(case.ours(offset_params(DTYPES[dtype], shapes), **kwargs, backend=backend), STEPS),
        monkeypatch,
    )


@masters_of_all
def test_masters_and_rounded_parameters_have_the_same_bits_everywhere(
    case: Case,
    kwargs: dict,
    dtype: str,
    rounding: str,
    master: str | None,
    state_format: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each optimizer the variant with most states; parameters of odd sizes, with blocks and without."""
    kwargs = {**kwargs, **FORMATS[state_format], "rounding": rounding, "master_weights": master}
    shapes = [(n,) for n in ODD_SIZES[:-1]] + [(7, 257), (4, 64), (2, 40_000)]
    assert_paths_agree(
        lambda backend: train(case.ours(offset_params(DTYPES[dtype], shapes), **kwargs, backend=backend), STEPS),
        monkeypatch,
    )


def test_at_least_two_instruction_sets_were_compared() -> None:
    if "v3" not in ISAS:
        pytest.skip("this machine runs one instruction set only")
    assert ISAS[:2] == ["baseline", "v3"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "case", of_memory([case for case in CASES if not case.ours.takes_sums]), ids=lambda case: case.name
)
def test_tensors_split_anywhere(case: Case, rounding: str, isa: str) -> None:
    """A tensor stepped in pieces, each told where it begins, equals the tensor stepped whole."""
    numel = 3 * 65536 + 17
    kwargs = {**case.kwargs, "state_dtype": "bfloat16", "state_rounding": rounding, "rounding": rounding}
    whole = train(case.ours(make_params([(numel,)], torch.bfloat16), **kwargs), 3)
    split = case.ours(make_params([(numel,)], torch.bfloat16), **kwargs)
    train(split, 1)
    (param,) = split.param_groups[0]["params"]
    state = split.state[param]
    cuts = [0, 1, 5, 256, 300, 65537, 100_000, numel]
    for step in (1, 2):
        set_grads([param], step)
        group = split.group_step(split.param_groups[0])
        table = _core.TensorTable()
        table.add_group(
            rule=group.rule,
            config=group.hyper,
            seed=group.seed,
            roundings=[int(r == "stochastic") for r in group.roundings],
            rounding=int(rounding == "stochastic"),
            master=0,
            master_key="",
        )
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            piece = slice(begin, end)
            assert table.add(
                group=0,
                position=i,
                param=param.detach()[piece],
                grad=param.grad[piece],
                states=tuple((state[spec.name][piece],) for spec in group.states),
                master=None,
                step=state["step"].clone(),
                first_index=begin,
            )
        assert table.step(grad_multipliers=[1.0], threads=2, counts_health=False) == {}
        state["step"] += 1
        split.after_step()
    assert_same_run(split, whole)


def test_random_bits_across_the_32_bit_boundary(isa: str) -> None:
    """The upper half of the index enters the key: checked where a shard crosses 2**32."""
    from fusedopt.backends import GroupStep, ParamStep
    from fusedopt.backends.cpu import CpuSession
    from fusedopt.backends.eager import EagerSession

    group = GroupStep(
        rule="adamw",
        hyper={"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
        states=tuple(CASES[0].ours.STATES[:2]),
        roundings=("stochastic", "stochastic"),
        seed=5,
        maximize=False,
    )
    results = []
    for session in (CpuSession(), EagerSession()):
        (param,) = make_params([(1000,)], torch.float32)
        states = tuple((torch.zeros(1000, dtype=torch.bfloat16),) for _ in range(2))
        step = torch.tensor(0.0)
        for i in range(3):
            set_grads([param], i)
            session.begin([group], [None])
            assert session.add(ParamStep(0, 0, param.detach(), param.grad, states, step, 2**32 - 300))
            session.step([1.0])
        results.append((param, *(state for (state,) in states)))
    for ours, theirs in zip(*results):
        assert_same_bits(ours, theirs)
    # and the two halves are not the same numbers by accident
    assert (results[0][1][:300] != results[0][1][300:600]).any()


SPECIALS = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-40, 1e-38, 6e-8, 65504.0, 65520.0, 3e38, float("inf"), -float("inf"), float("nan")] * 5
)


def run_of_specials(backend: str, dtype: torch.dtype, **kwargs: object) -> torch.optim.Optimizer:
    """Zeros, subnormals, inf and NaN, of more than one pattern, among gradients and parameters."""
    weights = SPECIALS.sort().values.to(dtype)
    if dtype == torch.bfloat16:  # NaN whose carry, rounded, would be -0
        weights[:2] = torch.tensor([0x7FFF, -1], dtype=torch.int16).view(dtype)
    param = torch.nn.Parameter(weights.clone())

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        params[0].grad = SPECIALS.roll(step).to(dtype)

    return train(CASES[0].ours([param], **{**CASES[0].kwargs, **kwargs}, backend=backend), 4, grads=grads)


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: str, state_format: str, isa: str) -> None:
    assert_same_run(*(run_of_specials(b, DTYPES[dtype], **FORMATS[state_format]) for b in ("cpu", "eager")))


@pytest.mark.parametrize("master", ["kahan", "split24", "split32", "float32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_special_weights_with_a_master(master: str, rounding: str, isa: str) -> None:
    runs = [run_of_specials(b, torch.bfloat16, master_weights=master, rounding=rounding) for b in ("cpu", "eager")]
    assert_same_run(*runs)
    (param,) = runs[0].param_groups[0]["params"]
    assert param[:2].isnan().all()
    # what beside an infinite or NaN weight is kept is a number, and does not spoil a weight that is written anew
    if master == "kahan":
        assert runs[0].state[param]["compensation"].isfinite().all()


def test_flush_denormal_does_not_change_bits() -> None:
    """torch.set_flush_denormal reaches the calling thread only; the core sets IEEE mode in each."""

    # Made beforehand: torch's own arithmetic would flush them.
    made = []
    for step in range(3):
        (param,) = make_params([(300_000,)], torch.float32)
        set_grads([param], step, scale=1e-36)
        made.append(param.grad)

    def grads(params: list[torch.nn.Parameter], step: int) -> None:
        params[0].grad = made[step]

    def run() -> torch.optim.Optimizer:
        return train(CASES[0].ours(make_params([(300_000,)], torch.float32), eps=1e-30), 3, grads=grads)

    expected = run()
    state = expected.state[expected.param_groups[0]["params"][0]]
    subnormal = (state["exp_avg"] != 0) & (state["exp_avg"].abs() < torch.finfo(torch.float32).tiny)
    assert subnormal.any()
    assert torch.set_flush_denormal(True)
    torch.set_num_threads(2)
    flushed = run()
    torch.set_flush_denormal(False)
    assert_same_run(flushed, expected)


def test_stepping_leaves_the_callers_flush_mode_alone() -> None:
    assert torch.set_flush_denormal(True)
    train(CASES[0].ours(make_params([(10,)], torch.float32)), 1)
    assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
    torch.set_flush_denormal(False)
    train(CASES[0].ours(make_params([(10,)], torch.float32)), 1)
    assert (torch.tensor([1e-40]) * 1.0).item() != 0.0


@pytest.mark.parametrize("steps", [1000, 123_456, 2**24 - 3])
@pytest.mark.parametrize("case", of_memory(CASES), ids=lambda case: case.name)
def test_late_steps(case: Case, steps: int) -> None:
    """Powers of beta and random bits far into a run."""

    def run(backend: str) -> torch.optim.Optimizer:
        params = make_params([(500,)], torch.float32)
        kwargs = {**case.kwargs, **case.late, "state_dtype": "bfloat16", "rounding": "stochastic", "backend": backend}
        optimizer = train(case.ours(params, **kwargs), 1)
        optimizer.state[params[0]]["step"].fill_(steps)
        return train(optimizer, 2, first=1)

    assert_same_run(run("cpu"), run("eager"))


def test_unknown_isa_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_CPU_ISA", "v5")
    optimizer = CASES[0].ours(make_params([(4,)], torch.float32))
    with pytest.raises(ValueError, match=r"FUSEDOPT_CPU_ISA='v5' is not available.*baseline"):
        train(optimizer, 1)


def test_reading_tensors_without_dlpack() -> None:
    """The way taken with a torch that has no C exchange table finds the same tensors."""
    from fusedopt.backends import table

    expected = train(CASES[0].ours(offset_params(torch.bfloat16, [(n,) for n in ODD_SIZES]), state_dtype="bfloat16"), 3)
    table.bind_torch(exchange=False)
    try:
        plain = train(
            CASES[0].ours(
                offset_params(torch.bfloat16, [(n,) for n in ODD_SIZES]), state_dtype="bfloat16", backend="cpu"
            ),
            3,
        )
    finally:
        table.bind_torch()
    assert_same_run(plain, expected)
