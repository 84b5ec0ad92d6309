"""Validation: bad recipes are found with their remedies, good ones raise no error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from torch import nn

pytest.importorskip("pydantic")
pytest.importorskip("ruamel.yaml")

import fusedopt
from fusedopt import schedules, training
from fusedopt.training import Findings, Recipe, files, validate
from fusedopt.training.model_checks import half_ulp

# Fields of a bad recipe for 1,000 steps: (fields, severity, the field that is found, a part of reason or remedy).
BAD: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # The product brief's ranges.
    "lr negative": ({"lr": -1e-3}, "error", "lr", "is no step size"),
    "lr zero": ({"lr": 0.0}, "error", "lr", "nothing learns"),
    "lr nan": ({"lr": float("nan")}, "error", "lr", "is no step size"),
    "lr of SGD for AdamW": ({"lr": 0.5}, "error", "lr", "50 times what AdamW is known to bear"),
    "lr above the range": ({"lr": 0.05}, "warning", "lr", "use a tenth, 0.005"),
    "lr below the range": ({"lr": 1e-9}, "warning", "lr", "hardly anything moves"),
    "lr of AdamW for Lion": ({"optimizer": "lion", "lr": 1e-3}, "warning", "lr", "a third to a tenth of AdamW's"),
    "decay negative": ({"weight_decay": -0.1}, "error", "weight_decay", "lets weights grow"),
    "decay above the range": ({"weight_decay": 0.5}, "warning", "weight_decay", "is more than the usual"),
    "decay turns weights": ({"weight_decay": 200.0, "lr": 0.01}, "error", "weight_decay", "turns weights around"),
    "beta1 is 1": ({"betas": (1.0, 0.999)}, "error", "betas[0]", "is no average"),
    "beta1 below the range": ({"betas": (0.5, 0.99)}, "warning", "betas[0]", "averages over 2 steps only"),
    "beta2 above 1": ({"betas": (0.9, 1.5)}, "error", "betas[1]", "pass numbers in [0, 1)"),
    "beta2 below the range": ({"betas": (0.8, 0.85)}, "warning", "betas[1]", "averages over 7 steps only"),
    "warmup ratio of 1.5": ({"warmup": 1.5}, "warning", "warmup", "ratios are below 1"),
    # What really goes wrong.
    "betas swapped": ({"betas": (0.99, 0.9)}, "warning", "betas", "swap them"),
    "beta2 too long": ({"betas": (0.9, 0.9999)}, "warning", "betas[1]", "over 10,000 steps, and there are 1,000"),
    "slow momentum too long": ({"optimizer": "ademamix"}, "warning", "betas[2]", "set options.t_beta3"),
    "eps negative": ({"eps": -1e-8}, "error", "eps", "pass a number >= 0"),
    "eps zero": ({"eps": 0.0}, "warning", "eps", "divides 0 by 0"),
    "eps of another quantity": ({"eps": 0.1}, "warning", "eps", "become those of SGD"),
    "eps below float16": ({"options": {"state_dtype": "float16"}}, "warning", "eps", "the root of the smallest number"),
    "warmup longer than training": ({"warmup": 2000}, "error", "warmup", "is no shorter than the training"),
    "warmup most of it": ({"warmup": 0.7}, "warning", "warmup", "is 70% of the training"),
    "phases too long": (
        {"schedule": {"name": "warmup_stable_decay", "num_decay_steps": 980}, "warmup": 100},
        "error", "schedule", "make its phases fit into 1,000 steps",
    ),
    "decay ends early": (
        {"schedule": (schedules.warmup(10) >> schedules.decay("linear", 200)).to_dict()},
        "warning", "schedule", "the learning rate is 0 in 79% of the steps",
    ),
    "schedule never ends": (
        {"schedule": (schedules.warmup(10) >> schedules.decay("linear", 5000)).to_dict()},
        "error", "schedule", "1,000 steps",
    ),
    "lr of a relative step": (
        {"optimizer": "adafactor", "lr": 1e-3, "options": {"relative_step": True, "scale_parameter": True}},
        "error", "lr", "together with relative_step=True",
    ),
    "schedule of an optimizer that averages": (
        {"optimizer": "schedule_free_adamw", "schedule": {"name": "cosine"}},
        "warning", "schedule", "use the schedule 'constant'",
    ),
    "schedule of a relative step": ({"optimizer": "adafactor"}, "error", "schedule.name", "there is no lr to multiply"),
    "biases decay": ({"decay": "all"}, "warning", "decay", "set it to 'matrices'"),
    "clipped to nothing": ({"max_grad_norm": 0.0}, "error", "max_grad_norm", "pass a number > 0, or none"),
    "never clipped": ({"max_grad_norm": 1e4}, "warning", "max_grad_norm", "is rarely reached"),
    "float16 without scaler": ({"precision": "float16"}, "error", "loss_scaling", "set it to 'dynamic'"),
    "bfloat16 with scaler": (
        {"precision": "bfloat16", "loss_scaling": "dynamic"}, "warning", "loss_scaling", "only skips steps",
    ),
    "float16 weights": ({"weights_dtype": "float16", "lr": 0.01}, "error", "weights_dtype", "lose most updates"),
    "bfloat16 weights do not move": (
        {"weights_dtype": "bfloat16", "lr": 1e-5}, "warning", "options.rounding", "is lost when it is rounded",
    ),
    "masters of float32": ({"options": {"master_weights": "kahan"}}, "warning", "options.master_weights", "16-bit"),
    "accumulated and released": (
        {"release_gradients": True, "gradient_accumulation_steps": 4},
        "error", "gradient_accumulation_steps", "set it to 1",
    ),
    "scaled and released": (
        {"release_gradients": True, "precision": "float16", "loss_scaling": "dynamic"},
        "error", "release_gradients", "before GradScaler knows",
    ),
    "prefetch without workers": (
        {"dataloader_prefetch_factor": 2}, "error", "dataloader_prefetch_factor", "dataloader_num_workers",
    ),
    "no batch": ({"per_device_train_batch_size": 0}, "error", "per_device_train_batch_size", "pass an int >= 1"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "error", "gradient_accumulation_steps", "pass an int >= 1"),
    "no epochs": ({"epochs": 0.0, "steps": None}, "error", "epochs", "trains nothing"),
    "layer decay": ({"layer_decay": 1.1}, "error", "layer_decay", "is outside (0, 1]"),
    "an option out of range": (
        {"optimizer": "ademamix", "options": {"alpha": -1.0, "t_beta3": 100}}, "error", "alpha", "pass a number >= 0",
    ),
    # What cannot be read.
    "unknown key": ({"learning_rate": 1e-4}, "error", "learning_rate", "it is called 'lr' here"),
    "unknown optimizer": ({"optimizer": "adamv"}, "error", "recipe", "did you mean 'adam'"),
    "unknown option": ({"options": {"state_dtyp": "8bit"}}, "error", "recipe", "did you mean 'state_dtype'"),
    "unknown schedule": ({"schedule": {"name": "cosin"}}, "error", "recipe", "did you mean 'cosine'"),
    "of another type": ({"lr": "fast"}, "error", "lr", "pass number"),
    "eps for Lion": ({"optimizer": "lion", "eps": 1e-8}, "error", "eps", "leave it out"),
    "warmup negative": ({"warmup": -5}, "error", "warmup", "pass an int >= 0"),
    "constant with a warmup": (
        {"schedule": {"name": "constant"}, "warmup": 10}, "error", "warmup", "use 'constant_with_warmup'",
    ),
}  # fmt: skip


def _made(fields: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "lr": 1e-3, "betas": (0.9, 0.99), "steps": 1000, **fields} if "optimizer" not in fields else {
        "version": 1, "steps": 1000, **fields
    }  # fmt: skip


def test_row_42_there_are_bad_recipes_enough() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize("name", BAD)
def test_row_42_a_bad_recipe_is_found_with_its_remedy(name: str) -> None:
    fields, severity, field, part = BAD[name]
    found = validate(_made(fields))
    (finding,) = [f for f in found if f.field == field and f.severity == severity] or [None]
    assert finding is not None, str(found)
    assert part in str(finding)
    assert finding.remedy
    assert found.exit_status == {"error": 2, "warning": 1}[severity]
    # What was changed is all that is wrong; what follows from it is told besides.
    assert [f for f in validate(_made({})) if f.severity != "note"] == []


@pytest.mark.parametrize("name", BAD)
def test_applying_a_remedy_leaves_nothing_to_find(name: str) -> None:
    fields, _, field, _ = BAD[name]
    for finding in validate(_made(fields)):
        if finding.change and finding.field == field:
            cured = Recipe.from_dict(_made(fields)).apply(finding.change)
            assert not [f for f in validate(cured) if f.field == field and f.severity != "note"]


def test_most_of_what_is_found_has_changes() -> None:
    changed = [name for name, (fields, *_) in BAD.items() if any(f.change for f in validate(_made(fields)))]
    assert len(changed) >= 10


GOOD = files.read(Path(__file__).with_name("published.yaml"))


@pytest.mark.parametrize("name", GOOD)
def test_row_42_a_published_recipe_raises_no_error(name: str) -> None:
    assert len(GOOD) >= 20
    found = validate({"version": 1, **GOOD[name]})
    assert found.errors == []
    # What they do is rare or known to be odd: decay on everything, and CLIP's decay of 0.2.
    assert {f.field for f in found.warnings} <= ({"decay"} if name == "ResNet-50" else {"weight_decay"})


def test_presets_have_neither_errors_nor_warnings() -> None:
    for name, preset in training.presets().items():
        found = validate(preset.recipe, steps=preset.recipe.steps or 20_000)
        assert found.exit_status == 0, f"{name}: {found}"


# ---- with a model ------------------------------------------------------------------------------------


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).to(dtype)


def _only(found: Findings) -> training.Finding:
    assert len(found) == 1, str(found)
    return found[0]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_an_ulp_is_where_rounding_stops_a_weight(dtype: torch.dtype, bits: int) -> None:
    weights = torch.tensor([1.0, 1.5, 0.02, 3.0, -0.3, 7e4 if bits == 8 else 6e4, 0.0]).to(dtype)
    half = half_ulp(weights)
    assert half[-1] == 0
    for weight, step in zip(weights[:-1], half[:-1]):
        # A little less than half a step is lost, a little more is not; away from 0, where numbers lie no closer.
        away = weight.sign().double()
        assert (weight.double() + away * 0.99 * step.double()).to(dtype) == weight
        assert (weight.double() + away * 1.01 * step.double()).to(dtype) != weight


def test_weights_that_do_not_move_are_computed_from_the_weights() -> None:
    recipe = Recipe(lr=1e-4, weights_dtype="bfloat16", steps=10_000)
    model = _model(torch.bfloat16)
    finding = _only(validate(recipe, model))
    assert finding.field == "options.rounding"
    assert validate(recipe.apply(finding.change), model).exit_status == 0
    small = _model(torch.bfloat16)
    for param in small.parameters():
        param.data.mul_(1e-3)
    assert validate(recipe, small).exit_status == 0
    assert validate(recipe.replaced(options={"master_weights": "kahan"}), model).exit_status == 0
    assert validate(recipe.replaced(lr=1e-2), model).exit_status == 0
    # And they do not: the warning is true of an actual step.
    for lr, moves in ((1e-4, False), (1e-2, True)):
        trained = _model(torch.bfloat16)
        before = [param.detach().clone() for param in trained.parameters()]
        optimizer, _ = recipe.replaced(lr=lr, schedule={"name": "constant"}).build(trained)
        trained(torch.ones(4, 64, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        changed = sum(int((a != b).sum()) for a, b in zip(before, trained.parameters()))
        assert (changed > sum(p.numel() for p in before) / 2) is moves


def test_nothing_is_quantized() -> None:
    recipe = Recipe(options={"state_dtype": "8bit"}, steps=10_000)
    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert _only(validate(recipe, small)).field == "state_dtype"
    assert validate(recipe, _model()).exit_status == 0
    optimizer = fusedopt.AdamW(small.parameters(), state_dtype="8bit")
    assert "nothing is quantized" in str(validate(optimizer))


def test_a_model_that_is_not_as_the_recipe_says() -> None:
    assert "call model.to" in str(_only(validate(Recipe(steps=10_000), _model(torch.bfloat16))))
    finding = _only(validate(Recipe(steps=10_000, layer_decay=0.9), nn.Linear(64, 64)))
    assert finding.severity == "error"
    assert "found no layers" in finding.reason


def test_parameters_that_are_left_out_frozen_or_listed_twice() -> None:
    model = _model()
    optimizer = fusedopt.AdamW(model[0].parameters(), weight_decay=0.0)
    assert "lack 1.weight, 1.bias, 2.weight and 1 more" in str(validate(optimizer, model))
    for param in model[0].parameters():
        param.requires_grad_(False)
    assert "is frozen" in str(validate(fusedopt.AdamW(model[0].parameters())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = fusedopt.AdamW([model[2].weight, model[2].weight])
    assert "lists parameter 0 of group 0 more than once" in str(validate(twice))


def test_groups_that_no_gradient_reaches() -> None:
    model = _model()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = fusedopt.AdamW(groups, weight_decay=0.0)
    assert len(validate(optimizer)) == 0
    model[0](torch.ones(1, 64)).sum().backward()
    assert str(validate(optimizer)).startswith("warning: param group 1: is reached by no gradient")


def test_tied_weights_in_two_groups() -> None:
    model = _model()
    model[2].weight = nn.Parameter(model[0].weight.data)  # another object in the same memory
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight]}]
    finding = _only(validate(fusedopt.AdamW(groups, weight_decay=0.0)))
    assert finding.severity == "error"
    assert "in groups 0 and 1 share their memory" in finding.reason
    model[2].weight = model[0].weight
    optimizer = fusedopt.AdamW(fusedopt.param_groups(model), lr=1e-3)
    assert validate(optimizer, model).exit_status == 0


def test_biases_and_norms_that_decay() -> None:
    model = _model()
    found = validate(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    assert "decays biases and norms (0.bias, 1.weight, 1.bias and 1 more)" in str(_only(found))
    assert validate(fusedopt.AdamW(fusedopt.param_groups(model, 0.1), lr=1e-3), model).exit_status == 0


# ---- optimizers, schedulers, TrainingArguments -------------------------------------------------------


def test_what_a_trainer_has_wrapped_is_judged_alike() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _model()
    optimizer = fusedopt.AdamW(model.parameters(), lr=10.0)
    scheduler = fusedopt.get_scheduler("cosine", optimizer, 50, 100)
    plain = str(validate((optimizer, scheduler), model, steps=10))
    assert "scheduler" in plain
    assert "AdamW is known" in plain
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer, scheduler = accelerator.prepare_optimizer(optimizer), accelerator.prepare_scheduler(scheduler)
    assert str(validate((optimizer, scheduler), model, steps=10)) == plain
    assert str(validate(optimizer, model, steps=10, scheduler=scheduler)) == plain


def test_an_optimizer_with_its_scheduler() -> None:
    model = _model()
    optimizer = fusedopt.Lion(model.parameters(), lr=1e-2)
    scheduler = fusedopt.get_scheduler("cosine", optimizer, 10, 10_000)
    found = validate((optimizer, scheduler), steps=1000)
    assert [f.field for f in found] == ["lr", "scheduler"]
    assert "it ends at 98% of the peak" in found[1].reason
    assert found[0].severity == "error"
    groups = [{"params": [model[0].weight], "lr": 5.0}, {"params": [model[2].weight]}]
    (finding,) = validate(torch.optim.AdamW(groups, lr=1e-4))
    assert finding.field == "param group 0: lr"
    with pytest.raises(TypeError, match="pass a Recipe, a path"):
        validate(3)


@pytest.mark.parametrize(
    ("name", "warns"), [("cosine", True), ("inverse_sqrt", True), ("constant", False), ("constant_with_warmup", False)]
)
def test_schedules_of_optimizers_that_average(name: str, warns: bool) -> None:
    """Only those that fall are one too many; of others nothing is said about any."""
    param = torch.nn.Parameter(torch.randn(64, 64))
    for cls, expected in ((fusedopt.AdamWScheduleFree, warns), (fusedopt.AdamW, False)):
        optimizer = cls([param], lr=1e-3)
        scheduler = fusedopt.get_scheduler(name, optimizer, 10, 1000)
        found = [finding for finding in validate((optimizer, scheduler), steps=1000) if finding.field == "scheduler"]
        assert bool(found) == expected
        assert all("averages weights" in finding.reason for finding in found)


def test_training_arguments_and_clipping_twice(tmp_path: Path) -> None:
    transformers = peer("transformers")
    args = transformers.TrainingArguments(str(tmp_path), learning_rate=0.5, warmup_steps=500, max_steps=100)
    assert [f.field for f in validate(args).errors] == ["lr", "warmup"]
    args = transformers.TrainingArguments(str(tmp_path), max_grad_norm=1.0)
    optimizer = fusedopt.AdamW(_model().parameters(), lr=1e-3, max_grad_norm=0.5)
    assert "gradients are clipped twice: by Trainer, and by the optimizer to 0.5" in str(
        validate(args, optimizer=optimizer)
    )
    args.max_grad_norm = 0.0
    assert validate(args, optimizer=optimizer).exit_status == 0
    args = transformers.TrainingArguments(str(tmp_path), optim="galore_adamw", optim_target_modules=["x"])
    assert "projects gradients" in str(_only(validate(args)))


@pytest.mark.parametrize("kept", ["whole", "norms in float32"])
def test_arguments_are_judged_with_the_dtype_of_the_model(kept: str, tmp_path: Path) -> None:
    transformers = peer("transformers")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
    if kept == "norms in float32":
        model[1].float()
    args = transformers.TrainingArguments(
        str(tmp_path), bf16=True, learning_rate=1e-5, optim="adamw_torch_fused", use_cpu=True
    )
    for steps in (None, 1000):
        found = validate(args, model, steps)
        assert found.errors == []
        assert [f.field for f in found] == ["options.rounding"]  # weights that do not move at this lr
    said = Recipe(lr=1e-5, precision="bfloat16").to_training_arguments(str(tmp_path), use_cpu=True)
    assert _only(validate(said, model)).field == "weights_dtype"  # a recipe's arguments know


def test_no_length_is_made_up_for_a_training_without_one() -> None:
    recipe = Recipe(lr=1e-4, warmup=500, schedule={"name": "warmup_stable_decay", "num_decay_steps": 2000})
    assert validate(recipe, _model()).errors == validate(recipe).errors == []
    assert "together exceed" in str(validate(recipe, _model(), 2000))


# ---- the command -------------------------------------------------------------------------------------


def test_the_command_goes_by_severity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return testing.CliRunner().invoke(app, ["validate", *arguments])

    Recipe(lr=1e-4, steps=2000).save("good.yaml")
    Recipe(lr=1e-4, steps=2000, decay="all").save("odd.yaml")
    Recipe(lr=5.0, steps=2000).save("bad.toml")
    Path("worse.yaml").write_text("lr: 1")
    assert (run("good.yaml").exit_code, run("good.yaml").output) == (0, "good.yaml: nothing found\n")
    assert run("odd.yaml").exit_code == 1
    assert "    decay: all -> matrices\n" in run("odd.yaml").output
    assert run("bad.toml").exit_code == 2
    assert run("worse.yaml").output.startswith("error: recipe: version is missing, which says how to read the rest")
    listed = json.loads(run("bad.toml", "--json").output)
    assert [(f["severity"], f["field"], f["value"]) for f in listed] == [("error", "lr", 5.0)]
    assert run("good.yaml", "--steps", "100").exit_code == 1
    Path("made_by_a_user.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(64, 64).bfloat16()\n")
    assert "call model.to" in run("good.yaml", "--model", "made_by_a_user:make").output
    for wrong in ("made_by_a_user", "made_by_a_user:nothing", "json:dumps", "./made_by_a_user:make", ".made:make"):
        result = run("good.yaml", "--model", wrong)
        assert result.exit_code == 2
        assert f"--model {wrong!r}" in result.output
    for none in (("none.yaml",), ("good.yaml", "--steps", "0"), ("good.yaml", "--steps", "-3")):
        assert run(*none).exit_code == 2
