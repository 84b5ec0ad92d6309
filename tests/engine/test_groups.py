"""Param groups: what decays, what does not, and how fast each layer learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.groups import param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.input_layernorm(x)
        return x + self.mlp(self.attention(h, h, h)[0])


class Transformer(nn.Module):
    """Decoder-like: an embedding, three layers, a final norm and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.final = nn.RMSNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.h:
            x = block(x)
        return self.head(self.final(x))


class Custom(nn.Module):
    """A module with a weight, for names that say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class MyRmsNORM(Custom):
    pass


class Rescale(nn.LayerNorm):
    pass


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Model(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def split(model: nn.Module, **kwargs: Any) -> tuple[list[str], list[str]]:
    """The names of what decays and of what does not."""
    groups = param_groups(model, 0.1, **kwargs)
    assert [g["weight_decay"] for g in groups] in ([0.1, 0.0], [0.1], [0.0], [])
    return tuple([n for g in groups if g["weight_decay"] == wd for n in names(g)] for wd in (0.1, 0.0))  # type: ignore


def learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name in names(group)}


# ---- what decays -------------------------------------------------------------------------------------


def test_two_groups_in_the_order_of_the_model() -> None:
    model = Transformer()
    decayed, kept = param_groups(model)
    assert decayed.keys() == kept.keys() == {"params", "weight_decay"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0.0)
    of_a_block = ["attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"]
    assert names(decayed) == ["embed.weight", *(f"h.{i}.{n}" for i in range(3) for n in of_a_block), "head.weight"]
    biases = ["attention.in_proj_bias", "attention.out_proj.bias", "mlp.0.bias", "mlp.2.bias"]
    norms = ["input_layernorm.weight", "input_layernorm.bias"]
    assert names(kept) == [*(f"h.{i}.{n}" for i in range(3) for n in norms + biases), "final.weight"]
    params = dict(model.named_parameters())
    assert all(params[name] is param for group in (decayed, kept) for name, param in group["params"])


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True),
        MyRmsNORM(),
        Rescale(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_norms_do_not_decay(module: nn.Module) -> None:
    decayed, kept = split(Model(a=module, b=Custom()))
    assert decayed == ["b.weight"]
    assert kept == [f"a.{name}" for name, _ in module.named_parameters()]
    assert split(module)[0] == []  # also as the model itself


def test_a_norm_by_its_name_in_the_model() -> None:
    assert split(Model(scale=Custom(), q_Norm=Custom())) == (["scale.weight"], ["q_Norm.weight"])


def test_what_a_block_named_after_its_norm_holds_decays() -> None:
    model = Model(norm_attn=Model(proj=Custom(), norm=Custom()), fn=PreNorm(nn.Linear(4, 4)))
    assert split(model) == (["norm_attn.proj.weight", "fn.inner.weight"], ["norm_attn.norm.weight", "fn.inner.bias"])


def test_names_with_a_part_that_is_bias() -> None:
    model = Custom()
    for name in ("bias", "q_bias", "bias_ih_l0", "biased", "relative_bias_table"):
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
    kept = ["bias", "q_bias", "bias_ih_l0", "relative_bias_table"]
    assert split(Model(a=model)) == (["a.weight", "a.biased"], [f"a.{name}" for name in kept])


@pytest.mark.parametrize("no_decay", ["embed", ["embed"], ("embed.weight",), {"embed"}, iter(["bed.w"])])
def test_no_decay(no_decay: Any) -> None:
    model = Model(embed=nn.Embedding(3, 4), linear=nn.Linear(4, 4))
    assert split(model) == (["embed.weight", "linear.weight"], ["linear.bias"])
    assert split(model, no_decay=no_decay) == (["linear.weight"], ["embed.weight", "linear.bias"])


def test_no_decay_of_several() -> None:
    model = Model(a=Custom(), b=Custom(), c=Custom())
    assert split(model, no_decay=("c.", "a")) == (["b.weight"], ["a.weight", "c.weight"])


def test_frozen_parameters_are_left_out() -> None:
    model = Model(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.a.requires_grad_(False)
    assert split(model) == (["b.weight"], ["b.bias"])
    assert split(model, no_decay="a.weight") == (["b.weight"], ["b.bias"])  # no misspelling
    model.b.bias.requires_grad_(False)
    assert split(model) == (["b.weight"], [])
    assert len(param_groups(model)) == 1
    model.requires_grad_(False)
    assert param_groups(model) == []


def test_a_shared_parameter_appears_once() -> None:
    model = Transformer(tied=True)
    decayed, kept = split(model)
    assert "embed.weight" in decayed
    assert "head.weight" not in decayed + kept
    decayed, kept = split(model, no_decay="head")
    assert "embed.weight" in kept
    assert "embed.weight" not in decayed


def test_a_shared_parameter_does_not_decay_if_one_module_says_so() -> None:
    for first, second in (("scale", "norm"), ("norm", "scale")):
        shared = Custom()
        assert split(Model(**{first: shared, second: shared})) == ([], [f"{first}.weight"])
    model = Custom()
    model.register_parameter("a_bias", model.weight)
    assert split(model) == ([], ["weight"])


# ---- learning rates ----------------------------------------------------------------------------------


def test_lr_of_all() -> None:
    assert [group["lr"] for group in param_groups(Transformer(), lr=3e-4)] == [3e-4, 3e-4]


@pytest.mark.parametrize("layers", [None, "h"])
def test_layer_decay(layers: str | None) -> None:
    model = Transformer()
    groups = param_groups(model, 0.1, lr=0.5, layer_decay=0.25, layers=layers)
    power = {"embed": 3, "h.0": 2, "h.1": 1, "h.2": 0, "final": 0, "head": 0}
    rates = learning_rates(groups)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, lr in rates.items():  # powers of two: exact
        assert lr == 0.5 * 0.25 ** power[name[:3] if name.startswith("h.") else name.partition(".")[0]], name
    # From the input to the output, what decays first; the head apart from the last layer.
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (0.5 * 0.25**3, 0.1),
        *((0.5 * 0.25**power, wd) for power in (2, 1, 0, 0) for wd in (0.1, 0.0)),
    ]
    assert [names(g) for g in groups[-2:]] == [["head.weight"], ["final.weight"]]
    # What decays does not depend on it.
    assert sorted(n for g in groups if g["weight_decay"] for n in names(g)) == sorted(split(model)[0])


def test_a_tensor_stays_one() -> None:
    """torch.compile does not compile anew for it; schedules write to it, in each group apart."""
    lr = torch.tensor(0.5)
    for decay, rates in ((None, {0.5}), (0.5, {0.5, 0.25, 0.125, 0.0625})):
        groups = param_groups(Transformer(), lr=lr, layer_decay=decay)
        assert all(isinstance(group["lr"], torch.Tensor) for group in groups)
        assert {group["lr"].item() for group in groups} >= rates
        assert len({group["lr"].data_ptr() for group in [*groups, {"lr": lr}]}) == len(groups) + 1


def test_layer_decay_of_one_changes_no_lr() -> None:
    assert set(learning_rates(param_groups(Transformer(), lr=0.1, layer_decay=1)).values()) == {0.1}


def test_parameters_of_the_model_itself_come_before_the_layers() -> None:
    model = Transformer()
    model.register_parameter("cls_token", nn.Parameter(torch.zeros(4)))  # registered last, but named first
    assert learning_rates(param_groups(model, lr=1.0, layer_decay=0.5))["cls_token"] == 0.5**3


def test_a_tied_head_learns_as_the_embedding() -> None:
    rates = learning_rates(param_groups(Transformer(tied=True), lr=1.0, layer_decay=0.5))
    assert rates["embed.weight"] == 0.5**3
    assert "head.weight" not in rates


def test_frozen_layers_count() -> None:
    model = Transformer()
    model.embed.requires_grad_(False)
    model.h[0].requires_grad_(False)
    rates = learning_rates(param_groups(model, lr=1.0, layer_decay=0.5))
    assert set(rates.values()) == {0.5, 1.0}
    assert rates["h.1.mlp.0.weight"] == 0.5


def test_a_layer_listed_twice_has_its_first_place() -> None:
    shared = Custom()
    model = Model(h=nn.ModuleList([shared, Custom(), shared, Custom()]))
    expected = {"h.0.weight": 0.5**3, "h.1.weight": 0.5**2, "h.3.weight": 1.0}
    assert learning_rates(param_groups(model, lr=1.0, layer_decay=0.5)) == expected


def test_layers_that_are_a_sequential() -> None:
    linears = nn.Sequential()
    linears.add_module("in", nn.Linear(2, 2, bias=False))
    linears.add_module("act", nn.ReLU())
    linears.add_module("out", nn.Linear(2, 2, bias=False))
    assert learning_rates(param_groups(linears, lr=1.0, layer_decay=0.5)) == {"in.weight": 0.25, "out.weight": 1.0}


def test_the_longest_list_with_parameters_has_the_layers() -> None:
    model = Model(
        dropouts=nn.ModuleList(nn.Dropout() for _ in range(9)),
        stem=nn.Sequential(Custom(), Custom()),
        blocks=nn.ModuleList(Custom() for _ in range(3)),
    )
    rates = learning_rates(param_groups(model, lr=1.0, layer_decay=0.5))
    assert rates["stem.0.weight"] == rates["stem.1.weight"] == 0.5**3
    assert rates["blocks.0.weight"] == 0.5**2
    rates = learning_rates(param_groups(model, lr=1.0, layer_decay=0.5, layers="stem"))
    assert rates["stem.0.weight"] == 0.5
    assert rates["blocks.0.weight"] == 1.0


def test_lists_of_the_same_length() -> None:
    def stack() -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(Custom(), Custom()) for _ in range(2))

    # Inside of the layers: no other choice.
    rates = learning_rates(param_groups(Model(h=stack()), lr=1.0, layer_decay=0.5))
    assert rates == {"h.0.0.weight": 0.5, "h.0.1.weight": 0.5, "h.1.0.weight": 1.0, "h.1.1.weight": 1.0}
    both = Model(encoder=stack(), decoder=stack())
    with pytest.raises(ValueError, match=r"6 longest lists of 2 modules: 'encoder', .*; pass as layers the name"):
        param_groups(both, lr=1.0, layer_decay=0.5)
    assert learning_rates(param_groups(both, lr=1.0, layer_decay=0.5, layers="decoder"))["encoder.1.1.weight"] == 0.25


def test_layers_by_another_name_of_theirs() -> None:
    model = Transformer()
    model.alias = model.h
    expected = learning_rates(param_groups(model, lr=1.0, layer_decay=0.5, layers="h"))
    assert learning_rates(param_groups(model, lr=1.0, layer_decay=0.5, layers="alias")) == expected


# ---- with optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [fusedopt.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_stepping(cls: type[torch.optim.Optimizer]) -> None:
    model = Transformer()
    groups = param_groups(model, 0.5, "embed", lr=0.125, layer_decay=0.5)
    expected = [(names(g), g["lr"], g["weight_decay"]) for g in groups]
    optimizer = cls(groups)
    assert [(g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == expected
    # Gradients of zero leave only the decay: what the groups say of lr and weight_decay, and nothing else.
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    params = dict(model.named_parameters())
    for group_names, lr, weight_decay in expected:
        for name in group_names:
            # lr and weight_decay are powers of two: only the last operation rounds, in each of the optimizers.
            assert torch.equal(params[name], before[name] * (1 - lr * weight_decay)), name


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = Transformer(tied=True)
    optimizer = fusedopt.AdamW(param_groups(model), lr=1e-2)
    tokens = torch.arange(10).reshape(2, 5)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 is negative; pass"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay='0.1' is a str; pass"),
        ({"no_decay": "embedd"}, ValueError, "no_decay has 'embedd', which is in no .*; pass .* 'embed.weight', 'h.0"),
        (
            {"no_decay": ["embed", "hed.weight"]},
            ValueError,
            "'hed.weight', .* did you mean 'head.weight'.* and .* more",
        ),
        ({"no_decay": ""}, ValueError, "no_decay has '', which every name contains; pass weight_decay=0"),
        ({"no_decay": [3]}, TypeError, "no_decay has 3, a int; pass strings"),
        ({"no_decay": None}, TypeError, "no_decay=None is a NoneType; pass a string or strings"),
        ({"lr": -1}, ValueError, "lr=-1.0 is negative; pass"),
        ({"lr": float("nan")}, ValueError, "lr=nan is not finite; pass"),
        ({"layer_decay": 0.9}, ValueError, "layer_decay=0.9 has no lr to multiply; pass lr"),
        ({"lr": 1.0, "layer_decay": 0}, ValueError, r"layer_decay=0.0 is outside \(0, 1\]; pass"),
        ({"lr": 1.0, "layer_decay": 1.01}, ValueError, r"layer_decay=1.01 is outside \(0, 1\]; pass"),
        ({"lr": 1.0, "layer_decay": True}, TypeError, "layer_decay=True is a bool; pass"),
        ({"layers": "h"}, ValueError, "layers='h' is only used with layer_decay; pass"),
        ({"lr": 1.0, "layer_decay": 0.5, "layers": 3}, TypeError, "layers=3 is a int; pass"),
        ({"lr": 1.0, "layer_decay": 0.5, "layers": "hh"}, ValueError, "layers='hh' names no module; pass .*'h', 'h.0"),
        ({"lr": 1.0, "layer_decay": 0.5, "layers": "h.0.mpl"}, ValueError, "names no module; did you mean 'h.0.mlp'"),
        ({"lr": 1.0, "layer_decay": 0.5, "layers": "embed"}, ValueError, "layers='embed' names a Embedding, no list"),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(Transformer(), **kwargs)


def test_errors_of_models() -> None:
    with pytest.raises(TypeError, match=r"model=\[\] is a list; pass a torch.nn.Module"):
        param_groups([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found no layers in a Linear; put the layers in a ModuleList, or leave"):
        param_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5)
    layers = [Custom(), Custom()]
    model = Model(a=nn.ModuleList(layers), b=nn.ModuleList(layers))
    with pytest.raises(ValueError, match=r"layers='b' has only parameters that are named elsewhere first; pass .*'a'"):
        param_groups(model, lr=1.0, layer_decay=0.5, layers="b")
