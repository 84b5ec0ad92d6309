"""A recipe as transformers' TrainingArguments, and back."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from .. import checks
from ..engine.optimizer import CLASSES
from ..integrations.training_arguments import choose, max_grad_norm_of
from ..optimizers.names import released
from ..schedules import scheduler_names

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Where what TrainingArguments have no field for is kept beside them.
_BESIDE = "_fusedopt_recipe"
# Those of them that a training has to be told in another way, and how.
_TELL = {
    "decay": "pass optimizers=recipe.build(model, steps) to Trainer",
    "no_decay": "pass optimizers=recipe.build(model, steps) to Trainer",
    "layer_decay": "pass optimizers=recipe.build(model, steps) to Trainer",
    "release_gradients": "pass optimizers=recipe.build(model, steps) to Trainer",
    "weights_dtype": "load the model with that dtype",
    "lora_rank": "give Trainer a model with adapters",
}
_UNSAID = ("task", "notes", "sequence_length", *_TELL)
_SAME = (
    "weight_decay",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "seed",
)
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}


def check_release(name: str) -> None:
    """Raises ValueError for a name of an optimizer that steps during the backward pass: a recipe says that apart."""
    plain = released(name)
    if plain is not None:
        raise ValueError(
            f"optimizer={name!r} steps during the backward pass, which a recipe says apart; write optimizer={plain!r} "
            "and release_gradients=True"
        )


def to_training_arguments(recipe: Any, output_dir: str | None, overrides: dict[str, Any]) -> TrainingArguments:
    """A recipe as TrainingArguments.

    They have no place for task, notes, sequence_length, and for what Trainer has to be told in another way: decay,
    no_decay, layer_decay, weights_dtype, release_gradients, lora_rank. These are kept beside the arguments, for
    `from_training_arguments`, and a warning says what to do if one of the latter is not the default.

    Args:
        recipe: The recipe.
        output_dir: As for TrainingArguments.
        overrides: Further arguments of TrainingArguments, which win.

    Returns:
        The arguments. `fusedopt.integrations.transformers.optimizer` makes this recipe's optimizer from them.

    Raises:
        ImportError: transformers is not installed.
        ValueError: The optimizer, an option of it, or the schedule cannot be said there.
    """
    checks.installed("transformers", "TrainingArguments", "'fusedopt[transformers]'")
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    if recipe.precision == "float16" and recipe.loss_scaling is None:
        raise ValueError("loss_scaling=None with float16: Trainer scales the loss; set loss_scaling to 'dynamic'")
    if recipe.loss_scaling is not None and recipe.precision != "float16":
        raise ValueError(
            f"loss_scaling={recipe.loss_scaling!r} with precision={recipe.precision!r}: Trainer scales the loss of "
            "float16 only; leave it out"
        )
    name = recipe.schedule["name"]
    if name not in scheduler_names():
        raise ValueError(f"schedule {name!r} has no name that Trainer knows; pass optimizers=recipe.build(...) to it")
    optim, optim_args = _named(recipe, {str(item.value) for item in OptimizerNames})
    values: dict[str, Any] = {key: getattr(recipe, key) for key in _SAME}
    values.update(
        output_dir=output_dir,
        optim=optim,
        optim_args=optim_args,
        learning_rate=0.0 if recipe.lr is None else recipe.lr,
        lr_scheduler_type=name,
        lr_scheduler_kwargs={key: value for key, value in recipe.schedule.items() if key != "name"} or None,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.max_grad_norm or 0.0,
        num_train_epochs=recipe.epochs,
        max_steps=-1 if recipe.steps is None else recipe.steps,
        torch_compile=recipe.compile,
    )
    values[_checkpointing(TrainingArguments)] = recipe.gradient_checkpointing
    values.update({flag: recipe.precision == dtype for dtype, flag in _PRECISIONS.items()})
    if recipe.betas is not None:
        values.update(adam_beta1=recipe.betas[0], adam_beta2=recipe.betas[1])
    if isinstance(recipe.eps, float) and recipe.betas is not None:
        values["adam_epsilon"] = recipe.eps
    args = TrainingArguments(**{**values, **overrides})
    beside = {key: getattr(recipe, key) for key in _UNSAID}
    default = type(recipe)()
    untold = [key for key in _TELL if beside[key] != getattr(default, key)]
    if untold:
        told = "; ".join(f"{key}={beside[key]!r}: {_TELL[key]}" for key in untold)
        warnings.warn(
            f"TrainingArguments have no field for this. {told}", UserWarning, stacklevel=checks.callers_level()
        )
    setattr(args, _BESIDE, {**beside, "optimizer": (optim, recipe.optimizer, recipe.options)})
    return args


def was_recipe(args: Any) -> bool:
    """Whether arguments are from `to_training_arguments`, and so say what they have no field for."""
    return hasattr(args, _BESIDE)


def recipe_fields(args: Any) -> dict[str, Any]:
    """The fields of the recipe that TrainingArguments stand for.

    Args:
        args: The arguments of a training. What is not about optimization, such as logging, is not looked at. What
            `to_training_arguments` kept beside them is taken from there.

    Returns:
        Fields of `Recipe`.

    Raises:
        ValueError: This package has no such optimizer.
    """
    name = str(getattr(args.optim, "value", args.optim))
    check_release(name)
    max_grad_norm = max_grad_norm_of(args)
    cls, arguments = choose(args, name, max_grad_norm, {"max_grad_norm": max_grad_norm or None})
    parameters = inspect.signature(cls).parameters
    implied = cls.implied(name, arguments)
    own: dict[str, Any] = {
        key: arguments.pop(key) for key in ("lr", "betas", "eps", "weight_decay") if key in arguments
    }
    for key in ("betas", "eps"):
        if key not in parameters:
            own.pop(key, None)
    arguments.pop("max_grad_norm", None)
    options = {key: value for key, value in arguments.items() if key not in implied or implied[key] != value}
    beside = dict(getattr(args, _BESIDE, {}))
    optim, ours, original = beside.pop("optimizer", (None, name, options))
    if optim != name:
        ours = name
    elif _resolved(ours, original, own["lr"]) == _resolved(name, options, own["lr"]):
        options = original
    else:  # options were changed since; with them, the name that Trainer has says what ours did
        ours = name
    warmup = args.warmup_steps
    precision = next((dtype for dtype, flag in _PRECISIONS.items() if getattr(args, flag)), "float32")
    fields: dict[str, Any] = {key: getattr(args, key) for key in _SAME}
    fields.update(own)
    fields.update(
        optimizer=ours,
        options=options,
        schedule={
            "name": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            **(args.lr_scheduler_kwargs or {}),
        },
        warmup=int(warmup) if warmup >= 1 else warmup,
        max_grad_norm=max_grad_norm or None,
        epochs=float(args.num_train_epochs),
        steps=args.max_steps if args.max_steps > 0 else None,
        precision=precision,
        loss_scaling="dynamic" if precision == "float16" else None,
        gradient_checkpointing=bool(getattr(args, _checkpointing(type(args)))),
        compile=bool(args.torch_compile),
    )
    if fields["schedule"]["name"] == "constant":
        fields["warmup"] = 0  # as in Trainer, whose constant schedule takes none
    return {**fields, **beside}


def _checkpointing(cls: type) -> str:
    names = inspect.signature(cls).parameters
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _named(recipe: Any, known: set[str]) -> tuple[str, str | None]:
    """`optim` and `optim_args` for a recipe."""
    cls = CLASSES[recipe.optimizer]
    own = {"lr": recipe.lr}
    resolved = _resolved(recipe.optimizer, recipe.options, recipe.lr)
    names = [recipe.optimizer, *(name for name in cls.NAMES if name not in cls.NOTES)]
    candidates = [name for name in dict.fromkeys(names) if name in known]
    if not candidates:
        raise ValueError(
            f"optimizer {recipe.optimizer!r} has no name that TrainingArguments know; pass "
            "optimizers=recipe.build(model, steps) to Trainer"
        )
    # The name that says most of it; betas are said elsewhere.
    rests = {}
    for name in candidates:
        implied = {key: value for key, value in cls.implied(name, own).items() if key != "betas"}
        if all(resolved.get(key) == value for key, value in implied.items()):
            rests[name] = {key: value for key, value in resolved.items() if key not in implied}
    if not rests:
        rests = {candidates[0]: resolved}
    optim = min(rests, key=lambda name: len(rests[name]))
    said = dict(rests[optim])
    if recipe.lr is None:
        said["lr"] = None
    if recipe.betas is not None:
        said.update({f"beta{i}": beta for i, beta in enumerate(recipe.betas[2:], 3)})
    if isinstance(recipe.eps, float) and recipe.betas is None:
        said["eps"] = recipe.eps
    for key, value in said.items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(
                f"options.{key}={value!r} cannot be said in optim_args, which splits at commas; pass "
                "optimizers=recipe.build(model, steps) to Trainer"
            )
    return optim, ",".join(f"{key}={value}" for key, value in said.items()) or None


def _resolved(name: str, options: dict[str, Any], lr: float | None) -> dict[str, Any]:
    """Options with those that a name implies, but for betas, which a recipe always has."""
    implied = CLASSES[name].implied(name, {"lr": lr})
    return {**{key: value for key, value in implied.items() if key != "betas"}, **(options or {})}
