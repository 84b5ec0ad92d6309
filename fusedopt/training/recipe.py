"""Recipe: everything that decides how a training optimizes, as a value that is compared, written and built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..engine.optimizer import CLASSES, FusedOptimizer
from ..groups import param_groups
from ..optimizers.names import create_optimizer, refusal
from ..schedules import Schedule, get_adafactor_schedule, get_scheduler, scheduler_names
from ..schedules.lengths import length
from ..schedules.names import named_schedule
from ..storage.state import DTYPES
from . import arguments, fields, files
from .changes import Diff, flat, nested

if TYPE_CHECKING:
    from transformers import TrainingArguments

VERSION = 1
LABELS = ("task", "notes")  # what changes no number

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a training optimizes.

    A value: two recipes are equal if all fields are, and nothing changes one. What is None of lr, betas, eps and
    weight_decay is filled in with the optimizer's default, so that a written recipe shows every number. Types and
    names are checked here; `validate` judges values, all of them at once.

    Args:
        task: What it is for, as a label, such as "text-classification".
        notes: Anything worth remembering, such as where numbers are from.
        optimizer: One of `optimizer_names()`.
        lr: Peak learning rate.
        betas: Decay of the moments per step, for optimizers that have them.
        eps: Added to denominators, for optimizers that have it.
        weight_decay: Of parameters that decay.
        decay: "matrices" spares biases and norms, as `param_groups` tells them; "all" spares nothing, and takes
            neither `no_decay` nor `layer_decay`.
        no_decay: Parts of names of further parameters that do not decay.
        layer_decay: What the learning rate is multiplied by for each layer towards the input; None for one rate.
        options: Further arguments of the optimizer's class, such as {"state_dtype": "8bit"}.
        schedule: A schedule's or rule's "name" and its parameters, as `Schedule.to_dict` writes them; the warmup and
            the total of a named one are not among them.
        warmup: Steps, or a ratio of all steps in [0, 1).
        max_grad_norm: Gradients are clipped to this global norm, inside the step; None does not clip.
        gradient_accumulation_steps: Micro-batches per step.
        per_device_train_batch_size: Sequences, or examples, in a micro-batch on one device.
        per_device_eval_batch_size: Those in an evaluation's batch.
        sequence_length: Tokens in a sequence; None if that means nothing, or varies.
        epochs: Passes over the data; `steps` wins.
        steps: Optimizer steps in all; None leaves it to `epochs`.
        precision: What activations and products of matrices are computed in (autocast).
        weights_dtype: What weights, and so gradients, are kept in.
        loss_scaling: "dynamic", as GradScaler does, which float16 needs; None scales nothing.
        release_gradients: Step parameters during the backward pass and free their gradients.
        lora_rank: The rank of adapters (LoRA) that are trained instead of the weights; None trains what the model
            says.
        gradient_checkpointing: Compute activations again in the backward pass.
        compile: Whether the model is compiled by torch.compile.
        dataloader_num_workers: Processes that load data.
        dataloader_pin_memory: Whether they load into pinned memory.
        dataloader_prefetch_factor: Batches that each worker has ready; None is the loader's default.
        seed: Of everything random, stochastic rounding included.

    Raises:
        ValueError: A name is unknown, or a field means nothing to this optimizer.
        TypeError: A field is unknown or of the wrong type.
    """

    FILE_KEYS: ClassVar[tuple[str, ...]] = ("version",)

    task: str = ""
    notes: str = ""
    optimizer: str = "adamw"
    lr: float | None = None
    betas: tuple[float, ...] | None = None
    eps: float | tuple[float | None, float] | None = None
    weight_decay: float | None = None
    decay: Literal["matrices", "all"] = "matrices"
    no_decay: tuple[str, ...] = ()
    layer_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "linear"})
    warmup: int | float = 0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    sequence_length: int | None = None
    epochs: float = 3.0
    steps: int | None = None
    precision: Dtype = "float32"
    weights_dtype: Dtype = "float32"
    loss_scaling: Literal["dynamic"] | None = None
    release_gradients: bool = False
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = None
    seed: int = 42

    def __new__(cls, *_: Any, **given: Any) -> Recipe:
        fields.check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        values = fields.typed(type(self), vars(self))
        reason = refusal(values["optimizer"])
        if reason is not None:
            raise ValueError(reason)
        arguments.check_release(values["optimizer"])
        fields.fill(values)
        values["options"] = fields.plain_options(values["options"])
        fields.check_options(values["optimizer"], values["options"])
        values["warmup"] = length("warmup", values["warmup"])
        values["schedule"] = fields.given(files.plain(values["schedule"]))
        fields.check_schedule(values["schedule"], values["warmup"])
        fields.check_decay(values)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    # ---- comparing -------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that hang on every field but the labels; the same on all machines."""
        values = {name: value for name, value in self.to_dict().items() if name not in LABELS}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def diff(self, other: Recipe) -> Diff:
        """What has to change to get from this recipe to another.

        Args:
            other: The other recipe.

        Returns:
            Changes by field; options and parameters of schedules one by one, as "options.state_dtype".
        """
        if not isinstance(other, Recipe):
            raise TypeError(f"other={other!r} is a {type(other).__name__}; pass a Recipe")
        return Diff.between(flat(self.to_dict()), flat(other.to_dict()))

    def apply(self, diff: Diff) -> Recipe:
        """This recipe with changes.

        Args:
            diff: Of `diff` or of a finding's remedy.

        Returns:
            The changed recipe.

        Raises:
            ValueError: It was made for a recipe that has other values where it changes them.
        """
        return type(self).from_dict(nested(diff.applied_to(flat(self.to_dict()))))

    def replaced(self, **changes: Any) -> Recipe:
        """This recipe with other values of some fields.

        Args:
            **changes: Fields. A new optimizer gets its own defaults of what is not given with it.

        Returns:
            The changed recipe.
        """
        fields.check_names(type(self), changes)
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            changes = {**dict.fromkeys(("betas", "eps")), "options": {}, **changes}
        return dataclasses.replace(self, **changes)

    # ---- what it builds ----------------------------------------------------------------------------

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """The arguments of the optimizer's class."""
        own = {name: getattr(self, name) for name in fields.OWN_FIELDS if getattr(self, name) is not None}
        return {"seed": self.seed, **self.options, **own, "max_grad_norm": self.max_grad_norm}

    @property
    def resolved_options(self) -> dict[str, Any]:
        """The options, with those that the optimizer's name stands for."""
        return {**CLASSES[self.optimizer].implied(self.optimizer, {"lr": self.lr}), **self.options}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The param groups of a model."""
        if self.decay == "all":
            params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            return [{"params": params, "weight_decay": self.weight_decay}]
        lr = self.lr if self.layer_decay is not None else None
        weight_decay = self.weight_decay or 0.0
        return param_groups(model, weight_decay, self.no_decay, lr=lr, layer_decay=self.layer_decay)

    def build(self, model: nn.Module, total_steps: int | None = None) -> tuple[FusedOptimizer, LRScheduler]:
        """Makes the optimizer and the scheduler.

        Args:
            model: Its parameters that require gradients are stepped.
            total_steps: Steps of the whole training; `steps` by default.

        Returns:
            The optimizer and the scheduler, which is stepped once after each step of the optimizer.

        Raises:
            ValueError: The model is not as the recipe says, the total is missing, or a value is out of range.
        """
        total = self.steps if total_steps is None else total_steps
        if total is None:
            raise ValueError(
                f"total_steps=None and steps=None leave {self.schedule['name']!r} endless; pass one of them"
            )
        self.check_model(model)
        if self.lr is None and self.schedule["name"] != "constant":
            raise ValueError(
                f"lr=None takes the learning rate from the step's number, and schedule {self.schedule['name']!r} has "
                "nothing to multiply; use the schedule 'constant', or give an lr"
            )
        optimizer = self.build_optimizer(model)
        scheduler: LRScheduler
        if self.lr is None:
            scheduler = get_adafactor_schedule(optimizer)  # which reports, and sets nothing
        else:
            scheduler = get_scheduler(self.schedule_value(total), optimizer, num_training_steps=total)
        if self.release_gradients:
            import fusedopt

            if not hasattr(fusedopt, "release_gradients"):
                raise ValueError("release_gradients=True needs a newer fusedopt; set it to false")
            fusedopt.release_gradients(optimizer, clip=None if self.max_grad_norm is None else "previous")
        return optimizer, scheduler

    def build_optimizer(self, model: nn.Module) -> FusedOptimizer:
        """The optimizer alone, which keeps its gradients, of a model that need not be as the recipe says.

        Args:
            model: Its parameters that require gradients are stepped.

        Returns:
            The optimizer.

        Raises:
            ValueError: A value is out of range.
        """
        return create_optimizer(self.optimizer, self.groups(model), **self.optimizer_arguments)

    def schedule_value(self, total_steps: int) -> Any:
        """The schedule, or the rule with its warmup, with every length in steps."""
        parameters = {key: value for key, value in self.schedule.items() if key != "name"}
        if self.schedule["name"] not in scheduler_names():
            return Schedule.from_dict(self.schedule).resolve(total_steps)
        if self.schedule["name"] == "constant":
            return named_schedule("constant", None, None, parameters)
        schedule = named_schedule(self.schedule["name"], self.warmup, total_steps, parameters)
        return schedule.resolve(total_steps) if hasattr(schedule, "resolve") else schedule

    def check_model(self, model: nn.Module) -> None:
        """Raises a ValueError if a model is not kept as the recipe says."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is a {type(model).__name__}; pass a torch.nn.Module")
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        wanted = DTYPES[self.weights_dtype]
        for name, param in trained if self.lora_rank is None else ():
            if param.dtype in DTYPES.values() and param.dtype != wanted:
                raise ValueError(
                    f"weights_dtype={self.weights_dtype!r}, but {name} is {param.dtype}; call model.to({wanted}), or "
                    f"set weights_dtype to {str(param.dtype).removeprefix('torch.')!r}"
                )
        if self.lora_rank is not None and len(trained) == sum(1 for _ in model.parameters()):
            raise ValueError(
                f"lora_rank={self.lora_rank!r}, but every parameter of the model is trained; add adapters and freeze "
                "the rest first, for example with peft.get_peft_model, or leave lora_rank out"
            )

    # ---- files -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Version and fields as plain numbers, strings, lists and dicts; `from_dict` reads it back."""
        return {"version": VERSION, **{f.name: files.plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` described.

        Args:
            values: "version" and fields; those that are missing have their defaults.

        Returns:
            The recipe.

        Raises:
            ValueError: The version is missing or not known, or a value does not fit.
            TypeError: A key is unknown, or a value is of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a recipe is a mapping of fields, and this is a {type(values).__name__}; write key: value")
        given = dict(values)
        if "version" not in given:
            raise ValueError(f"version is missing, which says how to read the rest; add version: {VERSION}")
        version = given.pop("version")
        if version != VERSION:
            raise ValueError(f"version={version!r} is not known here; this fusedopt reads version {VERSION}")
        return cls(**given)

    def save(self, path: str | Path) -> None:
        """Writes a file: YAML, TOML or JSON, by the name's suffix.

        Args:
            path: Ends with .yaml, .yml, .toml or .json.
        """
        files.write(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a file that `save` or a person wrote.

        Args:
            path: Ends with .yaml, .yml, .toml or .json.

        Returns:
            The recipe.

        Raises:
            ValueError: It cannot be read, or is no recipe. The sentence begins with the path.
        """
        values = files.read(Path(path))
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_text(self, kind: str = "yaml") -> str:
        """The file's text: of "yaml", "toml" or "json"."""
        return files.dumps(self.to_dict(), kind)

    @classmethod
    def from_text(cls, text: str, kind: str = "yaml") -> Recipe:
        """The recipe of a text that `to_text` wrote."""
        return cls.from_dict(files.loads(text, kind))

    # ---- transformers ------------------------------------------------------------------------------

    def to_training_arguments(self, output_dir: str | None = None, **overrides: Any) -> TrainingArguments:
        """See `training.arguments.to_training_arguments`."""
        return arguments.to_training_arguments(self, output_dir, overrides)

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments, **overrides: Any) -> Recipe:
        """See `training.arguments.recipe_fields`."""
        return cls(**{**arguments.recipe_fields(args), **overrides})


def a_recipe(recipe: Any) -> Recipe:
    """What is passed for one. Raises a TypeError, as for its file or a preset's name."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe={recipe!r} is a {type(recipe).__name__}; pass a Recipe")
    return recipe
