"""Recipes: as values, in files, as TrainingArguments, and what they build."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")
pytest.importorskip("tomlkit")

import fusedopt
from fusedopt import schedules
from fusedopt.engine.optimizer import CLASSES
from fusedopt.optimizers.names import released
from fusedopt.training import ABSENT, Recipe

COMPOSED = (schedules.warmup(0.1) >> schedules.constant() >> schedules.decay("1-sqrt", 0.2)).to_dict()

# One of each kind of value; the names of all optimizers and schedules are tried besides.
RECIPES = {
    "default": Recipe(),
    "options": Recipe(lr=1e-5, options={"state_dtype": "8bit", "master_weights": "kahan"}, weights_dtype="bfloat16"),
    "state dtypes": Recipe(options={"state_dtype": {"exp_avg": "8bit", "exp_avg_sq": "bfloat16"}}),
    "relative step": Recipe(
        optimizer="adafactor", eps=(1e-30, 1e-3), options={"warmup_init": True}, schedule={"name": "constant"}
    ),
    "three betas": Recipe(optimizer="ademamix", betas=(0.9, 0.99, 0.9999), options={"alpha": 8.0, "t_alpha": 1000}),
    "lion": Recipe(optimizer="lion_8bit", lr=1e-5, weight_decay=0.1),
    "composed": Recipe(schedule=COMPOSED, steps=500),
    "cycles": Recipe(schedule={"name": "cosine", "num_cycles": 1.5}, warmup=0.06, no_decay=("0.", "weight")),
    "stages": Recipe(schedule={"name": "warmup_stable_decay", "num_decay_steps": 0.2}, warmup=2000, steps=10_000),
    "float16": Recipe(precision="float16", loss_scaling="dynamic", gradient_accumulation_steps=4, max_grad_norm=1.0),
    "text": Recipe(task="text-classification", notes="a: 'b' # \"c\"\nno, yes, 1e-5, ü", seed=7, compile=True),
    "words": Recipe(task="no", notes="1e-5"),
    "all": Recipe(decay="all", layer_decay=None, lora_rank=8, epochs=1.5, sequence_length=512),
}
RECIPES.update(
    {f"optimizer {n}": Recipe(optimizer=n, lr=1e-3) for n in fusedopt.optimizer_names() if released(n) is None}
)
_NEED = {"warmup_stable_decay": {"num_decay_steps": 10}, "cosine_with_min_lr": {"min_lr_rate": 0.1}}
_NEED["cosine_warmup_with_min_lr"] = {"min_lr_rate": 0.1}
RECIPES.update(
    {f"schedule {name}": Recipe(schedule={"name": name, **_NEED.get(name, {})}) for name in schedules.scheduler_names()}
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 16))


# ---- files -------------------------------------------------------------------------------------------


def test_options_are_kept_by_their_names(tmp_path: Path) -> None:
    recipe = Recipe(options={"state_dtype": torch.bfloat16, "state_device": torch.device("cpu")})
    assert recipe == Recipe(options={"state_dtype": "bfloat16", "state_device": "cpu"})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert hash(recipe)
    with pytest.raises(TypeError, match=r"options.rounding=.* is a object, which no file can keep; pass a number"):
        Recipe(options={"rounding": object()})
    inner = Recipe(options={"state_dtype": {"exp_avg": torch.bfloat16}})
    assert inner == Recipe(options={"state_dtype": {"exp_avg": "bfloat16"}})
    assert Recipe.from_text(inner.to_text()) == inner
    assert Recipe(options={"state_dtype": [torch.float16, (torch.float32,)]}).options["state_dtype"] == [
        "float16",
        ("float32",),
    ]
    with pytest.raises(TypeError, match=r"^options.state_dtype.exp_avg\[1\]=<object.* is a object, which no file"):
        Recipe(options={"state_dtype": {"exp_avg": ["8bit", object()]}})


@pytest.mark.parametrize("field", [{"no_decay": ("embed",)}, {"layer_decay": 0.5}])
def test_what_needs_groups_is_refused_where_everything_decays(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ValueError, match=f"^{name}=.* set decay to 'matrices', or leave {name} out"):
        Recipe(decay="all", **field)
    with pytest.raises(ValueError, match=name):
        Recipe(**field).replaced(decay="all")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_a_recipe_goes_through_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    recipe.save(tmp_path / f"recipe.{suffix}")
    again = Recipe.load(tmp_path / f"recipe.{suffix}")
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == [f"recipe.{suffix}"]  # nothing is left beside it


@pytest.mark.parametrize("name", RECIPES)
def test_other_readers_of_yaml_see_the_same(name: str) -> None:
    yaml = pytest.importorskip("yaml")  # of version 1.1, where a number like 1e-05 is a word
    assert yaml.safe_load(RECIPES[name].to_text("yaml")) == RECIPES[name].to_dict()


def test_a_person_writes_numbers_as_usual() -> None:
    text = "version: 1\nlr: 3e-4\nbetas: [0.9, 0.95]\nweight_decay: 0\nwarmup: 100\nmax_grad_norm: 1\n"
    assert Recipe.from_text(text) == Recipe(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, warmup=100, max_grad_norm=1.0)
    assert Recipe.from_text(text.replace(": ", " = "), "toml") == Recipe.from_text(text)


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("lr: 1.0", "yaml", "version is missing"),
        ("version: 2", "yaml", "version=2 is not known here"),
        ("version: 1\nlr: 1\nlr: 2", "yaml", "duplicate key"),
        ('{"version": 1, "lr": 1, "lr": 2}', "json", "'lr' is there twice; keep one"),
        ("version = 1\nlr = 1\nlr = 2", "toml", "already exists"),
        ("version: 1\nlearning_rate: 1", "yaml", "learning_rate=1 is no field of a recipe; it is called 'lr' here"),
        ("version: 1\nweight_deacy: 0", "yaml", "weight_deacy=0 is no field of a recipe; did you mean 'weight_decay'"),
        ("version: 1\nlr: fast", "yaml", "lr='fast' does not fit; pass number"),
        ("version: 1\ncompile: no", "yaml", "compile='no' does not fit; pass boolean"),
        ("version: 1\nseed: true", "yaml", "seed=True does not fit; pass integer"),
        ("version: 1\nprecision: bf16", "yaml", "precision='bf16' does not fit; pass 'float32', 'bfloat16' or"),
        ("version: 1\noptimizer: adamv", "yaml", "did you mean 'adam'"),
        ("version: 1\noptimizer: lion\neps: 1e-8", "yaml", "eps=1e-08 means nothing to 'lion'"),
        ("version: 1\noptions: {lr: 1}", "yaml", "options.lr=1 has a field of its own"),
        ("version: 1\noptions: {state_dtyp: 8bit}", "yaml", "did you mean 'state_dtype'"),
        ("version: 1\nschedule: {name: cosin}", "yaml", "did you mean 'cosine'"),
        ("version: 1\nschedule: {}", "yaml", "has no name"),
        ("version: 1\nschedule: {name: cosine, num_cycle: 2}", "yaml", "did you mean 'num_cycles'"),
        ("version: 1\nschedule: {name: cosine, num_warmup_steps: 2}", "yaml", "write it as warmup"),
        ("version: 1\nschedule: {name: constant}\nwarmup: 10", "yaml", "use 'constant_with_warmup'"),
        ("- 1", "yaml", "a recipe is a mapping of fields"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told(text: str, kind: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / f"r.{kind}"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


def test_files_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the suffixes"):
        Recipe().save(tmp_path / "recipe.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"options\.t_alpha is None, which TOML cannot say"):
        Recipe(optimizer="ademamix", options={"t_alpha": None}).to_text("toml")


# ---- values ------------------------------------------------------------------------------------------


def test_what_is_left_out_is_the_optimizers_default() -> None:
    assert (Recipe().lr, Recipe().betas, Recipe().weight_decay) == (1e-3, (0.9, 0.999), 0.01)
    assert Recipe(optimizer="lion").betas == (0.9, 0.99)
    assert Recipe(optimizer="lion_8bit").betas == (0.9, 0.999)  # what transformers' Trainer gives it
    assert Recipe(optimizer="adafactor").lr is None


def test_a_recipe_is_a_value() -> None:
    recipe = RECIPES["options"]
    for other in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), dataclasses.replace(recipe)):
        assert other == recipe
        assert hash(other) == hash(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0  # type: ignore[misc]


def test_the_fingerprint_hangs_on_what_changes_numbers() -> None:
    recipe = Recipe()
    assert recipe.replaced(task="a", notes="b").fingerprint == recipe.fingerprint
    changed = {"lr": 1e-4, "betas": (0.9, 0.99), "warmup": 5, "seed": 1, "options": {"state_dtype": "8bit"}}
    changed |= {"compile": True, "schedule": {"name": "cosine"}, "per_device_train_batch_size": 9, "steps": 3}
    prints = {recipe.replaced(**{name: value}).fingerprint for name, value in changed.items()}
    assert len(prints | {recipe.fingerprint}) == len(changed) + 1
    # The same on every machine: a number that was computed elsewhere.
    assert Recipe(lr=1e-4, steps=10).fingerprint == Recipe.from_text(Recipe(lr=1e-4, steps=10).to_text()).fingerprint


@pytest.mark.parametrize("name", RECIPES)
def test_a_diff_leads_from_one_recipe_to_another(name: str) -> None:
    for other in (RECIPES["default"], RECIPES["composed"], RECIPES["three betas"]):
        diff = RECIPES[name].diff(other)
        assert RECIPES[name].apply(diff) == other
        assert bool(diff) is (RECIPES[name] != other)
        assert len(str(diff).splitlines()) == max(1, len(diff))


def test_a_diff_says_what_changes() -> None:
    diff = Recipe(lr=1e-4).diff(Recipe(lr=3e-4, options={"state_dtype": "8bit"}))
    assert str(diff) == "lr: 0.0001 -> 0.0003\noptions.state_dtype: (absent) -> 8bit"
    assert json.loads(json.dumps([change.to_dict() for change in diff]))[1] == {
        "field": "options.state_dtype",
        "after": "8bit",
    }
    assert next(iter(diff)).before == 1e-4
    assert list(diff)[1].before is ABSENT
    with pytest.raises(ValueError, match=r"lr is 0\.001 in this recipe"):
        Recipe().apply(diff)
    with pytest.raises(TypeError, match="pass a Recipe"):
        Recipe().diff({})  # type: ignore[arg-type]


def test_another_optimizer_brings_its_own_defaults() -> None:
    recipe = Recipe(options={"amsgrad": True}, lr=1e-4).replaced(optimizer="lion", lr=1e-5)
    assert recipe == Recipe(optimizer="lion", lr=1e-5, weight_decay=0.01)


# ---- TrainingArguments -------------------------------------------------------------------------------

# Why TrainingArguments cannot say these.
UNSAYABLE = {
    "state dtypes": "cannot be said in optim_args",
    "composed": "has no name that Trainer knows",
    "optimizer adam": "has no name that TrainingArguments know",
    "optimizer adam_8bit": "has no name that TrainingArguments know",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_through_training_arguments(name: str, tmp_path: Path) -> None:
    peer("transformers")
    recipe = RECIPES[name]
    warnings.simplefilter("ignore")
    if name.startswith("schedule ") and recipe.schedule["name"] in ("gradient_norm", "gradient_sparsity"):
        pytest.skip("Trainer has no such schedule")
    if recipe.eps is not None and not isinstance(recipe.eps, float):
        recipe = recipe.replaced(eps=None)
    if name in UNSAYABLE:
        with pytest.raises(ValueError, match=UNSAYABLE[name]):
            recipe.to_training_arguments(str(tmp_path))
        return
    evaluates: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10}  # which a plateau needs
    if recipe.precision != "float32":  # needs a GPU, or to be told of the CPU, which then pins nothing
        evaluates, recipe = {"use_cpu": True}, recipe.replaced(dataloader_pin_memory=False)
    args = recipe.to_training_arguments(str(tmp_path), **evaluates)
    assert Recipe.from_training_arguments(args) == recipe


def test_training_arguments_win_over_what_was_kept_beside_them(tmp_path: Path) -> None:
    peer("transformers")
    recipe = Recipe(task="x", lr=1e-4, options={"state_dtype": "8bit"}, schedule={"name": "cosine"}, warmup=0.1)
    args = recipe.to_training_arguments(str(tmp_path))
    assert (args.optim.value, args.optim_args, args.learning_rate) == ("adamw_torch_8bit", None, 1e-4)
    args.learning_rate, args.optim_args = 2e-4, "state_rounding=nearest"
    found = Recipe.from_training_arguments(args, notes="y")
    assert found.lr == 2e-4
    assert found.task == "x"
    assert found.notes == "y"
    assert found.optimizer_arguments["state_rounding"] == "nearest"


def test_a_warning_says_what_trainer_has_to_be_told(tmp_path: Path) -> None:
    peer("transformers")
    with pytest.warns(UserWarning, match=r"no_decay=\('embed',\): pass optimizers=recipe\.build"):
        Recipe(no_decay=("embed",)).to_training_arguments(str(tmp_path))
    with pytest.raises(ValueError, match="set loss_scaling to 'dynamic'"):
        Recipe(precision="float16").to_training_arguments(str(tmp_path))


# ---- building ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds(name: str, model: nn.Module) -> None:
    recipe = RECIPES[name].replaced(weights_dtype="float32", lora_rank=None)
    optimizer, scheduler = recipe.build(model, 10_000)
    assert type(optimizer) is CLASSES[recipe.optimizer]
    assert scheduler.optimizer is optimizer
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == ([7] if recipe.decay == "all" else [3, 4] if not recipe.no_decay else [7])


def test_what_is_built_has_every_number(model: nn.Module) -> None:
    recipe = Recipe(
        lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, max_grad_norm=2.0, warmup=4, steps=8, seed=3,
        schedule={"name": "cosine"}, no_decay=("0.",), options={"state_dtype": "bfloat16"},
    )  # fmt: skip
    optimizer, scheduler = recipe.build(model)
    decaying, spared = optimizer.param_groups
    assert [decaying["weight_decay"], spared["weight_decay"]] == [0.3, 0.0]
    assert decaying["param_names"] == ["2.weight", "3.weight"]
    for group in optimizer.param_groups:
        wanted = {"betas": (0.8, 0.9), "eps": 1e-6, "max_grad_norm": 2.0, "seed": 3, "state_dtype": "bfloat16"}
        assert {key: group[key] for key in wanted} == wanted
    lrs = []
    for _ in range(8):
        lrs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert lrs == [1e-2 * schedules.Cosine(4, 8)(step) for step in range(8)]


def test_what_a_model_is_not_is_told(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="pass one of them"):
        Recipe().build(model)
    with pytest.raises(ValueError, match=r"weights_dtype='bfloat16', but 0\.weight is torch\.float32; call model\.to"):
        Recipe(weights_dtype="bfloat16").build(model, 10)
    with pytest.raises(ValueError, match="lora_rank=8, but every parameter of the model is trained"):
        Recipe(lora_rank=8).build(model, 10)
    with pytest.raises(TypeError, match=r"pass a torch\.nn\.Module"):
        Recipe().build(model.parameters(), 10)  # type: ignore[arg-type]


def test_fields_are_documented() -> None:
    described: Any = Recipe.__doc__
    for field in dataclasses.fields(Recipe):
        assert f"        {field.name}: " in described
