"""What transformers' TrainingArguments say about an optimizer, as arguments of one of ours."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..engine.optimizer import FusedOptimizer
from ..optimizers.names import class_of, create_optimizer, refusal, released, resolved

if TYPE_CHECKING:
    from transformers import Trainer

# Where what Trainer was told to clip to is kept once it has been told not to.
KEPT = "_fusedopt_max_grad_norm"

# Why an optimizer that steps during the backward pass is refused.
SCALED = (
    "losses are scaled, and whether a gradient is infinite is known only when all are there; an optimizer that steps "
    "during the backward pass has stepped by then. Train with bf16=True, which scales nothing"
)

# Of `optim_args`: names that other packages have, and what they mean here.
_THEIRS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "bf16_stochastic_round": lambda value: {"rounding": "stochastic"} if value else {},
}


def max_grad_norm_of(args: Any) -> float:
    """What a training clips to, whether or not Trainer has been told to leave it to the step."""
    return float(args.max_grad_norm or getattr(args, KEPT, 0.0) or 0.0)


def name_of(args: Any, name: Any = None) -> str:
    """An optimizer's name; `args.optim` by default."""
    name = args.optim if name is None else name
    return str(getattr(name, "value", name))


def choose(args: Any, name: str | None, max_grad_norm: float, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that a name stands for, `args.optim` by default, and all of its arguments.

    For a name of an optimizer that steps during the backward pass, a factory in place of the class.
    """
    name = name_of(args, name)
    sentence = refusal(name)
    if sentence is not None:
        raise ValueError(sentence)
    if released(name) is not None:
        _check_released(args, name)
    given = {**_from_arguments(class_of(name), args), **options}
    if "max_grad_norm" not in given:
        given["max_grad_norm"] = max_grad_norm if max_grad_norm > 0 and not _sees_parts(args) else None
    elif given["max_grad_norm"] is not None and _sees_parts(args):
        raise ValueError(
            f"max_grad_norm={given['max_grad_norm']!r} in the step would clip each part of a sharded gradient by "
            "itself under DeepSpeed and FSDP1; leave it to the training's arguments, which clip before the step"
        )
    cls, arguments = resolved(name, given)
    cls([nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))], **arguments)  # raises what Trainer would
    if released(name) is None:
        return cls, arguments
    if arguments["max_grad_norm"] is not None:
        _check_accumulation(args, name)
    return functools.partial(Releases, name), arguments


def _check_released(args: Any, name: str) -> None:
    """Raises ValueError if an optimizer that steps during the backward pass cannot be had with these arguments."""
    takes_sums = class_of(name).takes_sums
    if _sees_parts(args):
        remedy = "use" if takes_sums else "use FSDP2, or"
        raise ValueError(
            f"optim={name!r} steps a gradient as soon as the backward pass has made it, and under DeepSpeed and FSDP1 "
            f"gradients are reduced later; {remedy} optim={released(name)!r}"
        )
    if takes_sums and getattr(args, "fsdp", None):
        raise ValueError(
            f"optim={name!r} sums over the shards of FSDP2, for which all processes have to step a parameter at the "
            f"same time, and gradients come in an order of their own; use optim={released(name)!r}"
        )
    if args.fp16:
        raise ValueError(f"fp16=True with optim={name!r}: {SCALED}")


def _check_accumulation(args: Any, name: str) -> None:
    """Raises ValueError if the first of two backward passes would reduce what the second has to add to."""
    given = args.accelerator_config.gradient_accumulation_kwargs or {}
    if args.fsdp and args.gradient_accumulation_steps > 1 and not given.get("sync_each_batch", False):
        raise ValueError(
            f"optim={name!r} with max_grad_norm measures gradients in a first backward pass and steps in a second, and "
            "FSDP2 hands what it has accumulated to the first alone; pass "
            "accelerator_config={'gradient_accumulation_kwargs': {'sync_each_batch': True}}, or max_grad_norm=0"
        )


def factory(chosen: Any, keep_embeddings: bool, decaying_names: Callable[[nn.Module], list[str]] | None = None) -> Any:
    """What Trainer makes an optimizer with: a class, or what returns a function of the model.

    Args:
        chosen: What `choose` returned.
        keep_embeddings: Whether embeddings' state stays in float32.
        decaying_names: Of a model, the names of parameters that decay; as Trainer has it by default.
    """
    if not isinstance(chosen, type):
        return functools.partial(chosen, keep_embeddings, decaying_names)
    return functools.partial(KeepsEmbeddings, chosen, decaying_names) if keep_embeddings else chosen


def _sees_parts(args: Any) -> bool:
    """Whether steps see parts of gradients that do not say so: DeepSpeed's and FSDP1's. FSDP2's are DTensors."""
    if getattr(args, "deepspeed", None):
        return True
    version = int((getattr(args, "fsdp_config", None) or {}).get("version", 2))  # Trainer's default
    return bool(getattr(args, "fsdp", None)) and version == 1


def _from_arguments(cls: type[FusedOptimizer], args: Any) -> dict[str, Any]:
    """An optimizer's arguments that are in those of a training, as Trainer hands them to one of its kind."""
    parameters = inspect.signature(cls).parameters
    found: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    parsed = _parsed(args.optim_args)
    if "betas" in parameters:
        values = (args.adam_beta1, args.adam_beta2, *parameters["betas"].default[2:])
        found["betas"] = tuple(parsed.pop(f"beta{i}", value) for i, value in enumerate(values, 1))
        if "eps" in parameters:
            found["eps"] = args.adam_epsilon
    if "warmup_steps" in parameters and (steps := _warmup_steps(args)):
        found["warmup_steps"] = steps
    for theirs, translated in _THEIRS.items():
        if theirs in parsed and theirs not in parameters:
            parsed.update(translated(parsed.pop(theirs)))
    return {**found, **parsed}


def _warmup_steps(args: Any) -> float:
    """The length of a warmup inside the optimizer; a ratio of the training is for schedulers, which know its length."""
    if 0 < args.warmup_steps < 1 and args.max_steps <= 0:
        raise ValueError(
            f"warmup_steps={args.warmup_steps!r} is a ratio of a training whose length the optimizer does not know; "
            "pass a number of steps, or max_steps"
        )
    return float(args.get_warmup_steps(args.max_steps))


def _parsed(text: str | None) -> dict[str, Any]:
    """``optim_args``, "name=value,name=value", as Python values."""
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"optim_args has {part!r}, which has no value; write name=value, separated by commas")
        word = {"true": True, "false": False, "none": None, "yes": True, "no": False}
        try:
            found[name] = word[value.lower()] if value.lower() in word else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


class Releases:
    """What Trainer calls a factory, of an optimizer that steps during the backward pass."""

    def __init__(
        self, name: str, keep_embeddings: bool = False, decaying_names: Callable[[Any], Any] | None = None
    ) -> None:
        self.name, self.keep_embeddings, self.decaying_names = name, keep_embeddings, decaying_names

    def __call__(self, model: nn.Module, **arguments: Any) -> FusedOptimizer:
        clip = None if arguments["max_grad_norm"] is None else "exact"
        groups = groups_of(model, arguments["weight_decay"], self.decaying_names, self.keep_embeddings)
        return create_optimizer(self.name, groups, clip=clip, **arguments)


class KeepsEmbeddings:
    """What Trainer calls a factory: it is made without arguments and makes an optimizer for a model."""

    def __init__(self, cls: type[FusedOptimizer], decaying_names: Callable[[Any], Any] | None = None) -> None:
        self.cls, self.decaying_names = cls, decaying_names

    def __call__(self, model: nn.Module, **arguments: Any) -> FusedOptimizer:
        return self.cls(groups_of(model, arguments["weight_decay"], self.decaying_names), **arguments)


def groups_of(
    model: nn.Module,
    weight_decay: float,
    decaying_names: Callable[[Any], Any] | None = None,
    keep_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Trainer's param groups, with embeddings, if their state is to be float32, in groups of their own."""
    if decaying_names is None:
        from transformers import Trainer

        # The method reads nothing of the trainer.
        decaying_names = functools.partial(Trainer.get_decay_parameter_names, cast("Trainer", None))
    decaying = decaying_names(model)
    embeddings = [module for module in model.modules() if keep_embeddings and isinstance(module, nn.Embedding)]
    tables = {param for module in embeddings for param in module.parameters()}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decays, is_table = name in decaying, param in tables
            settings = {
                "weight_decay": weight_decay if decays else 0.0,
                **({"state_dtype": "float32"} if is_table else {}),
            }
            groups.setdefault((not decays, is_table), {"params": [], **settings})["params"].append(param)
    return [groups[key] for key in sorted(groups)]
