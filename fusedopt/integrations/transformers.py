"""transformers' Trainer: what its `optim` argument names, run by this package."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..engine.optimizer import FusedOptimizer
from ..optimizers.names import refusal, released
from .backward import released_backward
from .training_arguments import KEPT, choose, factory, max_grad_norm_of, name_of
from .watching import Watch, unwrapped

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    # Made when they are asked for, because transformers is imported then.
    class FusedTrainer(Trainer): ...  # noqa: D101

    class FusedCallback(TrainerCallback): ...  # noqa: D101


__all__ = [
    "FusedCallback",
    "FusedTrainer",
    "add_callback",
    "disable",
    "enable",
    "names",
    "optimizer",
]

_METHODS = ("_clip_grad_norm", "_get_grad_norm", "training_step")
_logger = logging.getLogger(__name__)


def names() -> dict[str, str | None]:
    """Every name of transformers' `optim` argument, and why `create_optimizer` does not take it; None if it does.

    Returns:
        Sentences by name, in transformers' order.

    Raises:
        ImportError: transformers is not installed.
    """
    _needs("names")
    from transformers.training_args import OptimizerNames

    return {name.value: refusal(name.value) for name in OptimizerNames}


# ---- what Trainer makes an optimizer from -----------------------------------------------------------


def optimizer(
    args: TrainingArguments, name: str | None = None, *, keep_embeddings: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    Trainer decides what decays, as always. Clipping moves into the step: the optimizer gets ``args.max_grad_norm``, and
    Trainer is told not to clip by setting that to 0. (It then still measures the norm, to log it; `FusedTrainer` and
    `enable` spare it that.) Under DeepSpeed and FSDP1 clipping stays where it is, since there a step sees but a part of
    each gradient.

    Args:
        args: The arguments of the training; lr, betas, eps, weight_decay and max_grad_norm are taken from them unless
            they are given here, and ``optim_args`` is read for any other argument of the optimizer.
        name: One of `optimizer_names()`; ``args.optim`` by default.
        keep_embeddings: Keep the state of embeddings in float32, as Trainer does for bitsandbytes' 8-bit optimizers.
        **options: Arguments of the optimizer's class.

    Returns:
        The class, and its keyword arguments; with ``keep_embeddings`` a factory in its place.

    Raises:
        ValueError: The name is unknown or means something that does not exist, or a value is out of range.
        TypeError: An argument is unknown or of the wrong type.
    """
    if released(name_of(args, name)) is not None:
        raise ValueError(
            f"optimizer name {name_of(args, name)!r} steps during the backward pass, which takes more than a class; "
            "call enable() before the training, or use FusedTrainer"
        )
    max_grad_norm = max_grad_norm_of(args)
    cls, arguments = choose(args, name, max_grad_norm, options)
    if arguments["max_grad_norm"] is not None:
        setattr(args, KEPT, max_grad_norm)
        args.max_grad_norm = 0.0
    return factory(cls, keep_embeddings), arguments


# ---- Trainer's own table ---------------------------------------------------------------------------


class _Enabled:
    """What `enable` has replaced; undone by leaving the context, or by `disable`."""

    current: _Enabled | None = None

    def __init__(self, table: dict[Any, Any], trainer: Any, handler: Callable[[Any], Any]) -> None:
        self.previous, self._table, self._trainer = _Enabled.current, table, trainer
        self._entries = {key: table[key] for key in table if refusal(str(key.value)) is None}
        self._methods = {name: trainer.__dict__[name] for name in (*_METHODS, "create_optimizer")}
        table.update(dict.fromkeys(self._entries, handler))
        create, *others = reversed(self._methods.values())
        for name, method in {**_methods(*reversed(others)), "create_optimizer": _asks(create)}.items():
            setattr(trainer, name, method)
        _Enabled.current = self

    def undo(self) -> None:
        """Puts back what was there."""
        self._table.update(self._entries)
        for name, method in self._methods.items():
            setattr(self._trainer, name, method)
        _Enabled.current = self.previous

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        if _Enabled.current is self:
            self.undo()


def enable(*, keep_embeddings: bool = False, **options: Any) -> _Enabled:
    """From now on ``TrainingArguments(optim=NAME)`` runs this package's optimizer, for every name that it has.

    The entries of transformers' table of optimizers are replaced; what this package does not have keeps its own.
    Trainer neither clips nor measures the norm where the step does. `disable` undoes it, as does the end of a ``with``.

    Args:
        keep_embeddings: As for `optimizer`.
        **options: Arguments for all of them, such as ``state_dtype="8bit"``; they win over the training's arguments.

    Returns:
        A context manager that undoes it.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: This version of transformers has no such table.
    """
    _needs("enable")
    import transformers
    from transformers import Trainer

    try:
        from transformers import trainer_optimizer

        table = trainer_optimizer._OPTIMIZER_HANDLERS
    except (ImportError, AttributeError):
        table = {}
    if not table or not all(name in Trainer.__dict__ for name in _METHODS):
        raise RuntimeError(
            f"transformers {transformers.__version__} is not known to enable(), which was made for 5.24: its table of "
            "optimizers is not where it was; pass optimizer_cls_and_kwargs=optimizer(args, ...) to Trainer instead"
        )

    def handler(context: Any) -> tuple[Any, dict[str, Any]]:
        cls, arguments = choose(context.args, None, max_grad_norm_of(context.args), options)
        decaying_names = getattr(_asking.get(), "get_decay_parameter_names", None)
        return factory(cls, keep_embeddings, decaying_names), arguments

    return _Enabled(table, Trainer, handler)


def disable() -> None:
    """Undoes the last `enable`; does nothing without one."""
    if _Enabled.current is not None:
        _Enabled.current.undo()


# The trainer whose optimizer is being made: entries of the table get its arguments and its model alone.
_asking: ContextVar[Any] = ContextVar("asking", default=None)


def _asks(create: Callable[..., Any]) -> Callable[..., Any]:
    """Trainer's method that makes its optimizer, by which entries of the table know the trainer."""

    @functools.wraps(create)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _asking.set(self)
        try:
            return create(self, *args, **kwargs)
        finally:
            _asking.reset(token)

    return create_optimizer


# ---- the norm, from the step -----------------------------------------------------------------------


def _clips_in_step(trainer: Any) -> FusedOptimizer | None:
    """The trainer's optimizer, if it is one of ours that clips."""
    found = unwrapped(trainer.optimizer)
    if isinstance(found, FusedOptimizer) and found.common_max_grad_norm() is not None:
        return found
    return None


def _norm_to_come(stepped: FusedOptimizer) -> Tensor:
    """A tensor that the next step writes its norm to: Trainer asks before the step, and reads after it."""
    device = next(param.device for group in stepped.param_groups for param in group["params"])
    norm = torch.full((), torch.nan, dtype=torch.float32, device=device)

    def fill(optimizer: Any, args: Any, kwargs: Any) -> None:
        handle.remove()
        last, found_inf = optimizer.last_grad_norm, getattr(optimizer, "found_inf", None)
        if last is not None and found_inf is not None:  # a step that is skipped leaves the norm of the one before it
            last = torch.where(found_inf.to(last.device).reshape(()) > 0, torch.nan, last)
        if last is not None:
            norm.copy_(last)

    handle = stepped.register_step_post_hook(fill)
    return norm


def _methods(
    clip: Callable[..., Any], get: Callable[..., Any], train: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Trainer's methods for clipping and measuring, which leave both to a step that does them, and for a batch."""

    def clip_grad_norm(self: Any, model: Any) -> Any:
        stepped = _clips_in_step(self)
        return clip(self, model) if stepped is None else _norm_to_come(stepped)

    def get_grad_norm(self: Any, model: Any, grad_norm: Any = None) -> Any:
        stepped = _clips_in_step(self) if grad_norm is None else None
        return get(self, model, grad_norm=grad_norm) if stepped is None else _norm_to_come(stepped)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = unwrapped(self.optimizer)
        handle = found.release_handle if isinstance(found, FusedOptimizer) else None
        with nullcontext() if handle is None else released_backward(self.accelerator, handle):
            return train(self, *args, **kwargs)

    return {"_clip_grad_norm": clip_grad_norm, "_get_grad_norm": get_grad_norm, "training_step": training_step}


# ---- classes that need transformers' ---------------------------------------------------------------


def add_callback(trainer: Trainer, **options: Any) -> FusedCallback:
    """Adds a `FusedCallback` in front of a trainer's others, so that TensorBoard and so on see what it logs.

    Args:
        trainer: Any Trainer.
        **options: Of `FusedCallback`.

    Returns:
        The callback.
    """
    callback = __getattr__("FusedCallback")(**options)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


@functools.cache
def _callback_class() -> type:
    _needs("FusedCallback")
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class FusedCallback(TrainerCallback, ExportableState):
        """Says what the state takes when training begins, logs the gradient norm of steps, and warns of anomalies.

        What it logs: "grad_norm" of the last step and "grad_norm_max" and "nonfinite_steps" since the last log, of an
        optimizer with max_grad_norm; with ``health`` the shares "stalled_weights" and "saturated_codes". Callbacks
        that come after it see them: use `add_callback`, because Trainer puts those of ``report_to`` first.

        Args:
            spike: A gradient norm this many times its running average is a warning; > 1, or None.
            health: Whether the last step before a log also counts what goes wrong quietly (`health_report`).
            average: The running average that a resumed training goes on from.
        """

        def __init__(self, spike: float | None = 10.0, health: bool = False, average: float | None = None) -> None:
            self.watch = Watch(spike, health)
            self.watch.load({"average": average})

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = unwrapped(kwargs["optimizer"])
            if not isinstance(optimizer, FusedOptimizer):
                raise TypeError(
                    f"the trainer's optimizer is a {type(optimizer).__name__}, of which FusedCallback knows nothing; "
                    "give the trainer one of fusedopt's, or leave the callback out"
                )
            self.optimizer = optimizer
            _logger.info("%s\n%s", type(optimizer).__name__, optimizer.memory_report())

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            is_logged = (state.global_step + 1) % max(1, state.logging_steps) == 0
            self.watch.before_step(self.optimizer, is_logged)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.watch.after_step(self.optimizer)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in (logs or {}):
                return  # of an evaluation, or of the whole training
            scalars, notes = self.watch.report(self.optimizer)
            for target in (logs, state.log_history[-1]):
                target.update({key: value for key, value in scalars.items() if key not in target})
            for note in notes:
                _logger.warning("step %d: %s", state.global_step, note)

        def state(self) -> dict[str, Any]:
            arguments = {"spike": self.watch.spike, "health": self.watch.health, **self.watch.state()}
            return {"args": arguments, "attributes": {}}

    return _public(FusedCallback)


@functools.cache
def _trainer_class() -> type:
    _needs("FusedTrainer")
    from transformers import Trainer

    class FusedTrainer(Trainer):
        """A Trainer whose optimizer is of this package, and clips in its step.

        Args:
            *args: Trainer's.
            optimizer_name: One of `optimizer_names()`; ``args.optim`` by default.
            optimizer_options: Further arguments of `optimizer`, such as ``{"state_dtype": "8bit"}``.
            **kwargs: Trainer's.
        """

        def __init__(
            self,
            *args: Any,
            optimizer_name: str | None = None,
            optimizer_options: dict[str, Any] | None = None,
            **kwargs: Any,
        ) -> None:
            self._fused = (optimizer_name, dict(optimizer_options or {}))
            super().__init__(*args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
                return super().create_optimizer(*args, **kwargs)
            name, given = self._fused
            options = dict(given)
            keeps = options.pop("keep_embeddings", False)
            cls, arguments = choose(self.args, name, max_grad_norm_of(self.args), options)
            # For this one only: a search of hyperparameters, or another training, may have other arguments.
            self.optimizer_cls_and_kwargs = (factory(cls, keeps, self.get_decay_parameter_names), arguments)
            try:
                return super().create_optimizer(*args, **kwargs)
            finally:
                self.optimizer_cls_and_kwargs = None

    for name, method in _methods(Trainer._clip_grad_norm, Trainer._get_grad_norm, Trainer.training_step).items():
        setattr(FusedTrainer, name, method)
    return _public(FusedTrainer)


def _needs(name: str) -> None:
    checks.installed("transformers", name, "'fusedopt[transformers]'")


def _public(cls: type) -> type:
    """A class made in a function, with the name by which it can be imported and pickled."""
    cls.__qualname__ = cls.__name__
    return cls


def __getattr__(name: str) -> Any:
    made = {"FusedCallback": _callback_class, "FusedTrainer": _trainer_class}.get(name)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made()
