"""Lightning: a callback that reports what an optimizer does."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from .. import checks
from ..engine.optimizer import FusedOptimizer
from .watching import Watch, unwrapped

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    # Made when it is asked for, because Lightning is imported then.
    class FusedCallback(Callback): ...  # noqa: D101


__all__ = ["FusedCallback"]

_logger = logging.getLogger(__name__)


@functools.cache
def _callback_class() -> type:
    if importlib.util.find_spec("pytorch_lightning") is None:  # the package's older name
        checks.installed("lightning", "FusedCallback", "'fusedopt[lightning]'")
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback  # type: ignore[assignment]

    class FusedCallback(Callback):
        """Says what the state takes when training begins, logs the gradient norm of steps, and warns of anomalies.

        What it logs, every ``log_every_n_steps`` of the Trainer: "grad_norm" of the last step and "grad_norm_max" and
        "nonfinite_steps" since the last time, of an optimizer with max_grad_norm; with ``health`` the shares
        "stalled_weights" and "saturated_codes". Its state is in checkpoints. With several optimizers it watches the
        first of this package.

        Args:
            spike: A gradient norm this many times its running average is a warning; > 1, or None.
            health: Whether the last step before a log also counts what goes wrong quietly (`health_report`).
        """

        def __init__(self, spike: float | None = 10.0, health: bool = False) -> None:
            self.watch = Watch(spike, health)

        def _is_logged(self, trainer: Any, step: int) -> bool:
            return step % max(1, trainer.log_every_n_steps) == 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found = [unwrapped(optimizer) for optimizer in trainer.optimizers]
            ours = [optimizer for optimizer in found if isinstance(optimizer, FusedOptimizer)]
            if not ours:
                names = ", ".join(type(optimizer).__name__ for optimizer in found) or "nothing"
                raise TypeError(
                    f"configure_optimizers returns {names}, of which FusedCallback knows nothing; return one of "
                    "fusedopt's optimizers, or leave the callback out"
                )
            self.optimizer = ours[0]
            self._steps = trainer.global_step
            _logger.info("%s\n%s", type(self.optimizer).__name__, self.optimizer.memory_report())

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.watch.before_step(self.optimizer, self._is_logged(trainer, trainer.global_step + 1))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == self._steps:
                return  # gradients are still being accumulated
            self._steps = trainer.global_step
            self.watch.after_step(self.optimizer)
            if self._is_logged(trainer, self._steps):
                scalars, notes = self.watch.report(self.optimizer)
                pl_module.log_dict(scalars)
                for note in notes:
                    _logger.warning("step %d: %s", self._steps, note)

        def state_dict(self) -> dict[str, Any]:
            return self.watch.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.watch.load(state_dict)

    FusedCallback.__qualname__ = FusedCallback.__name__  # as it can be imported and pickled
    return FusedCallback


def __getattr__(name: str) -> Any:
    if name == "FusedCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
