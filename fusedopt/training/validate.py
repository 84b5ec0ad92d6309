"""`validate`: everything that can be said about a configuration before it trains."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer
from ..integrations.watching import unwrapped
from ..schedules import ScheduleLR
from ..storage.state import DTYPES
from .arguments import was_recipe
from .changes import Diff, flat
from .findings import Finding, Findings
from .model_checks import (
    check_decay,
    check_movement,
    check_parameters,
    check_quantized,
    check_typical_movement,
)
from .recipe import Recipe
from .schedule_checks import check_recipe_schedule, check_schedule
from .value_checks import Settings, check_values


def validate(
    subject: Any,
    model: nn.Module | None = None,
    steps: int | None = None,
    *,
    scheduler: LRScheduler | None = None,
    optimizer: Optimizer | None = None,
) -> Findings:
    """Looks for what is wrong with a configuration, without training.

    Args:
        subject: A `Recipe`, a path of one or a dict of its fields, transformers' TrainingArguments, an optimizer, or
            an (optimizer, scheduler) pair, also as trainers wrap them.
        model: The model, whose weights and param groups are then looked at, too. After a backward pass, groups that no
            gradient reached are found.
        steps: Steps of the whole training; a recipe's own by default.
        scheduler: The scheduler of an optimizer.
        optimizer: With TrainingArguments, the optimizer that Trainer is given.

    Returns:
        Findings, the worst first.

    Raises:
        TypeError: The subject is none of these.
    """
    if isinstance(subject, tuple) and len(subject) == 2 and isinstance(unwrapped(subject[0]), Optimizer):
        subject, scheduler = subject
    subject, optimizer = unwrapped(subject), unwrapped(optimizer)
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate wraps it, too
    if isinstance(subject, Optimizer):
        return Findings(_of_optimizer(subject, scheduler, model, steps))
    if isinstance(subject, (str, Path, Mapping)):
        try:
            subject = Recipe.from_dict(subject) if isinstance(subject, Mapping) else Recipe.load(subject)
        except (ValueError, TypeError) as error:
            return Findings([_of_error(error, subject)])
    if isinstance(subject, Recipe):
        return Findings(_of_recipe(subject, model, steps))
    if hasattr(subject, "per_device_train_batch_size") and hasattr(subject, "optim"):
        return Findings(_of_arguments(subject, model, steps, optimizer))
    raise TypeError(
        f"subject={subject!r} is a {type(subject).__name__}; pass a Recipe, a path, TrainingArguments, or an optimizer"
    )


def _of_error(error: Exception, subject: Any) -> Finding:
    """What cannot even be read, as a finding: the sentence names field, value and remedy."""
    sentence = str(error)
    if not isinstance(subject, Mapping):
        sentence = sentence.removeprefix(f"{subject}: ")
    reason, _, remedy = sentence.partition("; ")
    field = reason.partition("=")[0] if "=" in reason.partition(" ")[0] else "recipe"
    return Finding("error", field, None, reason, remedy or "see the fields of a recipe in its documentation")


# ---- a recipe ----------------------------------------------------------------------------------------


def _of_recipe(
    recipe: Recipe, model: nn.Module | None, steps: int | None, *, knows_dtype: bool = True
) -> Iterator[Finding]:
    steps = recipe.steps if steps is None else steps
    settings = _settings_of(recipe, steps)
    found = [*_counts(recipe), *check_values(settings), *check_recipe_schedule(recipe, steps), *_together(recipe)]
    if not any(finding.severity == "error" for finding in found):
        found += check_construction(recipe)
    yield from found
    if model is None:
        if recipe.lora_rank is None:
            yield from _with_change(recipe, check_typical_movement(settings, DTYPES[recipe.weights_dtype]))
        return
    if any(finding.severity == "error" for finding in found):
        return
    try:
        if knows_dtype:
            recipe.check_model(model)
        built = recipe.build_optimizer(model)
    except ValueError as error:
        yield _of_error(error, {})
        return
    yield from check_parameters(built, model)
    if recipe.decay != "all":  # for which there is a finding already
        yield from check_decay(built, model)
    yield from check_quantized(built)
    params = [param for group in built.param_groups for param in group["params"]]
    yield from _with_change(recipe, check_movement(settings, params))


def _settings_of(recipe: Recipe, steps: int | None) -> Settings:
    cls = CLASSES[recipe.optimizer]
    values = {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    values.update(cls.implied(recipe.optimizer, {"lr": recipe.lr}))
    values.update({key: value for key, value in recipe.optimizer_arguments.items()})
    return Settings(cls, values, steps)


def _with_change(recipe: Recipe, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The remedy for weights that do not move, as a change."""
    takes = "rounding" in inspect.signature(CLASSES[recipe.optimizer]).parameters
    for finding in findings:
        change = _change(recipe, {"options.rounding": "stochastic"}) if takes else Diff()
        yield dataclasses.replace(finding, change=change)


def _change(recipe: Recipe, values: dict[str, Any]) -> Diff:
    before = flat(recipe.to_dict())
    return Diff.between(before, {**before, **values})


_LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "sequence_length": 1,
    "steps": 1,
    "lora_rank": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
}


def _counts(recipe: Recipe) -> Iterator[Finding]:
    """Fields that are counts, and other plain ranges."""
    for field, least in _LEAST.items():
        value = getattr(recipe, field)
        if value is not None and value < least:
            change = _change(recipe, {field: least})
            yield Finding("error", field, value, f"is less than {least}", f"pass an int >= {least}", change)
    if recipe.steps is None and not recipe.epochs > 0:
        yield Finding("error", "epochs", recipe.epochs, "trains nothing", "pass a number > 0, or steps")
    if not 0 <= recipe.seed < 2**32:
        yield Finding("error", "seed", recipe.seed, "is outside [0, 2**32)", "pass an int in that range")
    if recipe.layer_decay is not None and not 0 < recipe.layer_decay <= 1:
        yield Finding(
            "error", "layer_decay", recipe.layer_decay, "is outside (0, 1]", "pass a number such as 0.9, or none"
        )
    if recipe.dataloader_prefetch_factor is not None and recipe.dataloader_num_workers == 0:
        yield Finding(
            "error", "dataloader_prefetch_factor", recipe.dataloader_prefetch_factor,
            "needs workers, which load ahead", "set dataloader_num_workers to 1 or more, or leave it out",
            _change(recipe, {"dataloader_num_workers": 4}),
        )  # fmt: skip


def _together(recipe: Recipe) -> Iterator[Finding]:
    """Fields that do not go together."""
    import fusedopt

    weight_decay = recipe.weight_decay or 0.0
    if recipe.decay == "all" and weight_decay > 0:
        yield Finding(
            "warning", "decay", "all", f"biases and norms decay by {weight_decay:g}, too, which pulls scales towards 0",
            "set it to 'matrices'", _change(recipe, {"decay": "matrices", "layer_decay": None}),
        )  # fmt: skip
    if recipe.precision == "float16" and recipe.loss_scaling is None:
        yield Finding(
            "error", "loss_scaling", None, "gradients below 6e-8 are 0 in float16, and most are small",
            "set it to 'dynamic', or precision to 'bfloat16'", _change(recipe, {"loss_scaling": "dynamic"}),
        )  # fmt: skip
    if recipe.loss_scaling is not None and recipe.precision != "float16":
        yield Finding(
            "warning", "loss_scaling", recipe.loss_scaling,
            f"{recipe.precision} has the range of float32: scaling only skips steps", "leave it out",
            _change(recipe, {"loss_scaling": None}),
        )  # fmt: skip
    if recipe.weights_dtype == "float16" and recipe.lora_rank is None:
        masters = recipe.options.get("master_weights")
        if masters != "float32":
            yield Finding(
                "error", "weights_dtype", "float16", "weights of 11 bits lose most updates, and GradScaler refuses "
                "gradients in float16", "set options.master_weights to 'float32', or weights_dtype to 'float32'",
                _change(recipe, {"weights_dtype": "float32"}),
            )  # fmt: skip
    kept = [key for key in ("master_weights", "rounding") if recipe.options.get(key)]
    if recipe.weights_dtype == "float32" and kept:
        yield Finding(
            "warning", f"options.{kept[0]}", recipe.options[kept[0]], "is for 16-bit weights, and these are float32",
            "leave it out, or set weights_dtype to 'bfloat16'",
            Diff.between(before := flat(recipe.to_dict()), {k: v for k, v in before.items() if k[8:] not in kept}),
        )  # fmt: skip
    if recipe.release_gradients and recipe.gradient_accumulation_steps > 1:
        yield Finding(
            "error", "gradient_accumulation_steps", recipe.gradient_accumulation_steps,
            "needs all gradients at one time, which release_gradients frees as they come",
            "set it to 1, or release_gradients to false", _change(recipe, {"release_gradients": False}),
        )  # fmt: skip
    if recipe.release_gradients and recipe.loss_scaling is not None:
        yield Finding(
            "error", "release_gradients", True, "steps before GradScaler knows whether a gradient is inf",
            "set precision to 'bfloat16' and loss_scaling to none",
            _change(recipe, {"precision": "bfloat16", "loss_scaling": None}),
        )  # fmt: skip
    if recipe.release_gradients and recipe.max_grad_norm is not None:
        yield Finding(
            "note", "max_grad_norm", recipe.max_grad_norm,
            "with release_gradients, gradients are clipped by the norm of the step before",
            "leave it, or use release_gradients(clip='exact'), which costs a second backward pass",
        )  # fmt: skip
    if recipe.release_gradients and not hasattr(fusedopt, "release_gradients"):
        yield Finding("note", "release_gradients", True, "this fusedopt cannot release gradients", "update fusedopt")


def check_construction(recipe: Recipe) -> Iterator[Finding]:
    """What the optimizer's own checks say: they know more of its options than anyone else."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))
    arguments = recipe.optimizer_arguments
    try:
        CLASSES[recipe.optimizer](
            [param], **{**CLASSES[recipe.optimizer].implied(recipe.optimizer, arguments), **arguments}
        )
    except (ValueError, TypeError) as error:
        yield _of_error(error, {})


# ---- arguments and optimizers ------------------------------------------------------------------------


def _of_arguments(args: Any, model: nn.Module | None, steps: int | None, optimizer: Any) -> Iterator[Finding]:
    if optimizer is not None:
        yield from _of_optimizer(optimizer, None, model, steps)
        clips = [g["max_grad_norm"] for g in optimizer.param_groups if g.get("max_grad_norm") is not None]
        if clips and args.max_grad_norm:
            yield Finding(
                "warning", "max_grad_norm", args.max_grad_norm,
                f"gradients are clipped twice: by Trainer, and by the optimizer to {clips[0]:g}",
                "set max_grad_norm=0 in TrainingArguments",
            )  # fmt: skip
        return
    try:
        recipe = Recipe.from_training_arguments(args)
    except (ValueError, TypeError) as error:
        yield _of_error(error, {})
        return
    knows_dtype = was_recipe(args)
    if model is not None and not knows_dtype:  # arguments have no field for it; 16 bits are where there is most to say
        kinds = {param.dtype for param in model.parameters() if param.requires_grad} & set(DTYPES.values())
        narrowest = min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)
        recipe = recipe.replaced(weights_dtype=str(narrowest).removeprefix("torch."))
    yield from _of_recipe(recipe, model, steps, knows_dtype=knows_dtype)


def _of_optimizer(
    optimizer: Optimizer, scheduler: LRScheduler | None, model: nn.Module | None, steps: int | None
) -> Iterator[Finding]:
    yield from _of_groups(optimizer, steps)
    yield from check_parameters(optimizer, model)
    if model is not None:
        yield from check_decay(optimizer, model)
    yield from check_quantized(optimizer)
    if isinstance(scheduler, ScheduleLR) and steps is not None:
        for schedule in dict.fromkeys(scheduler.schedules):
            lr = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
            yield from check_schedule(schedule, steps, lr, "scheduler", schedule, type(optimizer))


def _of_groups(optimizer: Optimizer, steps: int | None) -> Iterator[Finding]:
    # One of torch's is judged as ours of that name.
    known = type(optimizer) if isinstance(optimizer, FusedOptimizer) else CLASSES.get(type(optimizer).__name__.lower())
    for i, group in enumerate(optimizer.param_groups):
        where = f"param group {i}: " if len(optimizer.param_groups) > 1 else ""
        values = {key: checks.plain(value) for key, value in group.items() if key != "params"}
        values["lr"] = values.get("initial_lr", values.get("lr"))  # a scheduler's first lr may be 0
        settings = Settings(known, values, steps, where, "")
        yield from check_values(settings)
        yield from check_movement(settings, group["params"])
