"""Optimizers by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import assert_same_run, make_params, train

import fusedopt

# Name: class, and what the name implies.
EXPECTED = {
    "adamw": (fusedopt.AdamW, {}),
    "adamw_torch": (fusedopt.AdamW, {}),
    "adamw_torch_fused": (fusedopt.AdamW, {"fused": True}),
    "adamw_torch_npu_fused": (fusedopt.AdamW, {}),
    "adamw_torch_xla": (fusedopt.AdamW, {}),
    "adamw_torch_4bit": (fusedopt.AdamW, {"state_dtype": "8bit"}),
    "adamw_torch_8bit": (fusedopt.AdamW, {"state_dtype": "8bit"}),
    "adamw_anyprecision": (
        fusedopt.AnyPrecisionAdamW,
        {"state_dtype": {"exp_avg": "float32", "exp_avg_sq": "float32"}, "compensation_buffer_dtype": "bfloat16"},
    ),
    "adamw_bf16": (fusedopt.AdamW, {"state_dtype": "bfloat16"}),
    "adamw_8bit": (fusedopt.AdamW, {"state_dtype": "8bit"}),
    "adamw_bnb_8bit": (fusedopt.AdamW, {"state_dtype": "8bit"}),
    "adam": (fusedopt.Adam, {}),
    "adam_8bit": (fusedopt.Adam, {"state_dtype": "8bit"}),
    "lion": (fusedopt.Lion, {}),
    "lion_32bit": (fusedopt.Lion, {"betas": (0.9, 0.999)}),
    "lion_8bit": (fusedopt.Lion, {"betas": (0.9, 0.999), "state_dtype": "8bit"}),
    "ademamix": (fusedopt.AdEMAMix, {}),
    "ademamix_8bit": (fusedopt.AdEMAMix, {"state_dtype": "8bit"}),
    "rmsprop": (fusedopt.RMSprop, {}),
    "rmsprop_8bit": (fusedopt.RMSprop, {"state_dtype": "8bit"}),
    "rmsprop_bnb": (fusedopt.RMSprop, {}),
    "rmsprop_bnb_8bit": (fusedopt.RMSprop, {"state_dtype": "8bit"}),
    "rmsprop_bnb_32bit": (fusedopt.RMSprop, {}),
    "adafactor": (fusedopt.Adafactor, {"scale_parameter": False, "relative_step": False}),
    "adagrad": (fusedopt.Adagrad, {}),
    "schedule_free_adamw": (fusedopt.AdamWScheduleFree, {}),
    "schedule_free_radam": (fusedopt.RAdamScheduleFree, {}),
    "schedule_free_sgd": (fusedopt.SGDScheduleFree, {}),
    "sgd": (fusedopt.SGD, {}),
    "lomo": (fusedopt.SGD, {}),
    "adalomo": (fusedopt.Adafactor, {"scale_parameter": True, "relative_step": False}),
    "stable_adamw": (fusedopt.StableAdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "master_weights": "kahan"}),
    "paged_adamw_32bit": (fusedopt.AdamW, {"state_device": "cpu"}),
    "paged_adamw_8bit": (fusedopt.AdamW, {"state_dtype": "8bit", "state_device": "cpu"}),
    "paged_lion_32bit": (fusedopt.Lion, {"state_device": "cpu"}),
    "paged_lion_8bit": (fusedopt.Lion, {"state_dtype": "8bit", "state_device": "cpu"}),
    "paged_ademamix_32bit": (fusedopt.AdEMAMix, {"state_device": "cpu"}),
    "paged_ademamix_8bit": (fusedopt.AdEMAMix, {"state_dtype": "8bit", "state_device": "cpu"}),
    "paged_rmsprop": (fusedopt.RMSprop, {"state_device": "cpu"}),
    "paged_rmsprop_8bit": (fusedopt.RMSprop, {"state_dtype": "8bit", "state_device": "cpu"}),
}


@pytest.mark.filterwarnings("ignore:adamw_torch_4bit")
@pytest.mark.parametrize("name", EXPECTED)
def test_every_name_makes_its_optimizer(name: str) -> None:
    cls, implied = EXPECTED[name]
    params = make_params([(64, 64)], torch.float32)
    optimizer = fusedopt.create_optimizer(name, params, lr=1e-3)
    assert type(optimizer) is cls
    assert optimizer.defaults["lr"] == 1e-3
    for key, value in implied.items():
        assert optimizer.defaults[key] == value
    before = params[0].detach().clone()
    train(optimizer, 6)  # RAdam's first steps stand still
    assert not torch.equal(params[0], before)


def test_adafactor_has_a_learning_rate_of_its_own_unless_one_is_given() -> None:
    params = make_params([(3,)], torch.float32)
    make = functools.partial(fusedopt.create_optimizer, "adafactor", params)
    assert make().defaults["relative_step"]
    assert make(lr=1e-3, scale_parameter=True).defaults["scale_parameter"]
    assert make(lr=1e-3, variant="torch").defaults["relative_step"]
    with pytest.raises(ValueError, match=r"lr=0\.001 together with relative_step=True.*pass scale_parameter=False and"):
        make(lr=1e-3, relative_step=True)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lomo", {}),
        ("lomo", {"max_grad_norm": 0.1, "clip": "exact", "bucket_numel": 1}),
        ("adalomo", {"lr": 0.01}),
        ("adalomo", {}),
    ],
)
def test_names_that_step_during_the_backward_pass(name: str, kwargs: dict) -> None:
    """The bits of the optimizer whose gradients they release; parameters by themselves have none after the pass."""
    released = fusedopt.create_optimizer(name, make_params([(64, 65), (65,)], torch.float32), **kwargs)
    is_freed = kwargs.get("bucket_numel") == 1
    kwargs = {key: value for key, value in kwargs.items() if key not in ("clip", "bucket_numel")}
    plain = {"lomo": fusedopt.SGD, "adalomo": functools.partial(fusedopt.Adafactor, relative_step=False)}[name]
    usual = plain(make_params([(64, 65), (65,)], torch.float32), **{"lr": 1e-3, **kwargs})
    handle = released.release_handle
    assert handle is not None
    assert usual.release_handle is None
    x = torch.randn(7, 65, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for optimizer in (released, usual):
            weight, bias = optimizer.param_groups[0]["params"]
            loss = ((x * bias) @ weight.T).square().mean()
            handle.backward(loss) if optimizer is released else loss.backward()
            assert (weight.grad is None) == (optimizer is released and is_freed)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_run(released, usual)


def test_four_bits_say_that_they_are_eight() -> None:
    params = make_params([(64, 64)], torch.float32)
    with pytest.warns(UserWarning, match="adamw_torch_4bit: state is kept in 8 bits, not in 4") as warned:
        fusedopt.create_optimizer("adamw_torch_4bit", params)
    assert warned[0].filename == __file__


def test_names_are_these() -> None:
    assert fusedopt.optimizer_names() == sorted(EXPECTED)


def test_arguments_win_over_the_name() -> None:
    optimizer = fusedopt.create_optimizer("adamw_8bit", make_params([(3,)], torch.float32), state_dtype="bfloat16")
    assert optimizer.defaults["state_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        (
            "adamv",
            {},
            ValueError,
            "'adamv' is not known; did you mean 'adam.*there are adafactor, adagrad, adalomo, adam, adam_8bit",
        ),
        ("muon", {}, ValueError, "'muon' is not known; there are adafactor"),
        ("galore_adamw_layerwise", {}, ValueError, "projects gradients.*GaLore.*for small state use 'adamw_8bit'"),
        ("apollo_adamw", {}, ValueError, "'apollo_adamw' scales gradients by what random projections"),
        ("grokadamw", {}, ValueError, "signal that it takes from losses, which a step does not see; use 'adamw_torch'"),
        ("lomo", {"max_grad_norm": 1.0}, ValueError, "max_grad_norm=1.0 needs the norm of all gradients.*pass clip="),
        ("lomo", {"betas": (0.9, 0.999)}, TypeError, "SGD got an unknown argument betas"),
        ("sgd", {"clip": "exact"}, TypeError, "SGD got an unknown argument clip='exact'"),
        ("paged_muon", {}, ValueError, "'paged_muon' is not known"),
        (None, {}, TypeError, "name=None is a NoneType; pass one of optimizer_names"),
        (torch.optim.AdamW, {}, TypeError, "is a type; pass one of optimizer_names"),
        ("lion", {"eps": 1e-8}, TypeError, "Lion got an unknown argument eps=1e-08; it takes params, lr, betas"),
        ("sgd", {"momentun": 0.9}, TypeError, "momentun=0.9; did you mean 'momentum'"),
    ],
)
def test_what_is_unknown(name: Any, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.create_optimizer(name, make_params([(3,)], torch.float32), **kwargs)


def test_signatures_spell_out_the_options() -> None:
    """For users, tools and errors: no **options to look up elsewhere."""
    import inspect

    for cls, _ in EXPECTED.values():
        parameters = inspect.signature(cls).parameters
        assert "options" not in parameters
        assert parameters["state_dtype" if cls is not fusedopt.AnyPrecisionAdamW else "momentum_dtype"]
        assert parameters["max_grad_norm"].default is None
        assert parameters["min_quantized_numel"].default == 4096
