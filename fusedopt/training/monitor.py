"""Monitor: writes down what happens in each step of a training, looks for anomalies and acts on them."""

from __future__ import annotations

import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .. import checks
from ..engine.collectives import Meshes, largest
from ..engine.norms import over_ranks
from ..engine.optimizer import FusedOptimizer
from ..engine.sharding import is_dtensor, local_grad
from ..integrations.watching import unwrapped
from .anomalies import KINDS, Anomaly, Detector, Limits
from .monitor_runs import VERSION, Lines, Reader, check_names, replay

if TYPE_CHECKING:
    from .recipe import Recipe

_WORST = 5  # parameters whose norms are recorded


class TrainingWarning(UserWarning):
    """An anomaly, as a warning."""


class StopTraining(Exception):  # noqa: N818  (an order, not an error of the program)
    """Raised by `Monitor.step` to end a training.

    Args:
        anomaly: Why.
    """

    def __init__(self, anomaly: Anomaly) -> None:
        super().__init__(str(anomaly))
        self.anomaly = anomaly


class Monitor:
    """Records the steps of a training in a file, and says when something goes wrong.

    ```python
    with training.Monitor("run.jsonl", optimizer) as monitor:
        for batch in batches:
            loss = model(batch)
            loss.backward()
            optimizer.step()
            monitor.step(loss, tokens=batch.numel())
            scheduler.step()
            optimizer.zero_grad()
    ```

    A step is one line of JSON, written with one call to the system, so that nothing but the line being written is lost
    when the process is killed. A file that exists is continued. Reading a loss waits for the device: on a GPU whose
    steps are short, record every tenth.

    Args:
        path: The file; None writes none, as on ranks other than the first.
        optimizer: Any of torch's kind. Ours with max_grad_norm or skip_step_above has found the norm of the gradients
            already; otherwise they are read once more in the steps of ``norms_every``, so call `step` before zero_grad.
        scaler: The GradScaler, if there is one; call `step` after its update().
        recipe: What the training was made from; stands in the file's header.
        every: Record each of so many steps.
        norms_every: Look at each parameter in each of so many steps: at its gradient and, with an optimizer of ours, at
            the norms of its update and of its weights, which are taken inside the step; None never does.
        start: Number of the first step that is recorded, if it is not the one after the file's last: of a training
            that goes on from an older checkpoint. What the file has from there on is superseded.
        limits: From where on something is an anomaly.
        on_anomaly: "warn", or a function that is called with each; None does neither. They stand in the file anyway.
        stop_on: Kinds of anomalies that end the training: `step` raises StopTraining.
        save: A function that writes a checkpoint; called before that.
        tensorboard: Folder for TensorBoard, which must be installed; None writes nothing for it.

    Attributes:
        last_step: Number of the last step; 0 before the first.

    Raises:
        ValueError: An argument is out of range, or the file is none that Monitor wrote.
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        recipe: Recipe | None = None,
        every: int = 1,
        norms_every: int | None = 10,
        start: int | None = None,
        limits: Limits | None = None,
        on_anomaly: str | Callable[[Anomaly], Any] | None = "warn",
        stop_on: Iterable[str] = (),
        save: Callable[[], Any] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
    ) -> None:
        self.optimizer, self._scaler = unwrapped(optimizer), scaler
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer={optimizer!r} is a {type(optimizer).__name__}; pass a torch.optim.Optimizer")
        self._every, self._norms_every = checks.count("every", every), None
        if norms_every is not None:
            self._norms_every = checks.count("norms_every", norms_every)
        if on_anomaly is not None and not callable(on_anomaly):
            checks.one_of("on_anomaly", on_anomaly, ("warn",))
        self._on_anomaly, self._save = on_anomaly, save
        self._stop_on = tuple(checks.one_of("stop_on", kind, KINDS) for kind in _listed("stop_on", stop_on))
        self._detector = Detector(limits)
        self.last_step = 0 if start is None else checks.count("start", start) - 1
        if path is not None and Path(path).exists():
            self._go_on_from(path, start)
        if start is None and self._norms_every is not None:
            # One rank has the file that tells, and all of them look at the same steps, in which they meet.
            self.last_step = largest(self.optimizer.param_groups, self.last_step)
        self._board = None if tensorboard is None else _tensorboard(tensorboard)
        self._lines = None if path is None else Lines(path)
        self._time = time.perf_counter()
        self._steps, self._tokens = 0, 0
        self._asks = False
        self._ask_for_norms()
        self._scale = None if scaler is None else float(scaler.get_scale())
        self._seen: dict[str, Any] | None = None  # what a scaled step's gradients say, until it is recorded
        self._captured_scale: Tensor | None = None
        self._hook = None if scaler is None else _before_steps(self)
        if self._lines is not None:
            self._lines.write(self._header(recipe))

    def _go_on_from(self, path: str | os.PathLike[str], start: int | None) -> None:
        run = Reader(path).read()
        if start is None and run.records:
            self.last_step = run.records[-1]["step"]
        for record in replay(run):
            if record["step"] <= self.last_step:
                self._detector.add(record)

    def _header(self, recipe: Recipe | None) -> dict[str, Any]:
        header: dict[str, Any] = {
            "version": VERSION,
            "started": time.time(),
            "optimizer": type(self.optimizer).__name__,
            "torch": torch.__version__,
        }
        if recipe is not None:
            header.update(recipe=recipe.to_dict(), fingerprint=recipe.fingerprint)
        return header

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        loss: Tensor | float,
        *,
        grad_norm: Tensor | float | None = None,
        tokens: int | None = None,
        **more: Tensor | float,
    ) -> list[Anomaly]:
        """Records a step that was taken; call it after optimizer.step() and before scheduler.step().

        Args:
            loss: The loss, a number or a tensor of one.
            grad_norm: The norm of the gradients, where something else has found it, such as clip_grad_norm_.
            tokens: Tokens, or whatever is counted, in this step.
            **more: Further numbers to record, under names that the file does not use itself.

        Returns:
            The anomalies that begin with this step.

        Raises:
            ValueError: The file uses such a name itself.
            StopTraining: One of them is of a kind in ``stop_on``.
        """
        check_names(more, has_scale=self._scaler is not None)
        self.last_step += 1
        self._steps += 1
        self._tokens += tokens or 0
        looks = self._looks_at(self.last_step)
        norms = self._norms() if self._asks else {}
        self._ask_for_norms()
        if (self.last_step - 1) % self._every and not looks:
            return []
        record: dict[str, Any] = {"step": self.last_step, "time": time.time(), "loss": float(loss), **self._lr()}
        record.update(self._scaling())
        if looks:
            record.update(self._gradients(self._captured_scale) if self._seen is None else self._seen)
            self._seen = None
        norm = grad_norm if grad_norm is not None else getattr(self.optimizer, "last_grad_norm", None)
        if norm is not None:
            record["grad_norm"] = float(norm)
            limit = self.optimizer.param_groups[0].get("skip_step_above")
            if limit is not None and not record["grad_norm"] <= limit:
                record["skipped"] = True
        if not record.get("skipped"):
            record.update(norms)
        record.update({name: float(value) for name, value in more.items()})
        record.update(self._speed())
        found = self._detector.add(record)
        self._write(record, found)
        self._act(found)
        return found

    def _looks_at(self, step: int) -> bool:
        return self._norms_every is not None and (step - 1) % self._norms_every == 0

    def _ask_for_norms(self) -> None:
        """Lets the optimizer take the norms of its next step, if that is one to look at."""
        optimizer = self.optimizer
        if not isinstance(optimizer, FusedOptimizer):
            return
        self._stop_asking()
        self._asks = self._looks_at(self.last_step + 1) and not optimizer.records_norms
        if self._asks:
            optimizer.record_norms()

    def _stop_asking(self) -> None:
        if self._asks and isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.record_norms(False)
        self._asks = False

    def _norms(self) -> dict[str, Any]:
        """What the optimizer has measured of the step: in all, of each group, and of the parameters that moved most."""
        assert isinstance(self.optimizer, FusedOptimizer)
        try:
            report = self.optimizer.norms_report()
        except ValueError:  # no step was taken, or by the replay of a CUDA graph
            return {}
        if not report.parameters:
            return {}
        groups = []
        for group, norms in zip(self.optimizer.param_groups, report.groups):
            lr = float(group["lr"] or 0.0)
            each = {"name": norms.where, "lr": lr, "update": norms.update, "weight": norms.weight, "ratio": norms.ratio}
            if self.optimizer.UPDATE_RMS is not None:
                each["expected"] = lr * self.optimizer.UPDATE_RMS * math.sqrt(norms.elements)
            groups.append(each)
        worst = [
            {"name": p.where, "update": p.update, "weight": p.weight, "ratio": p.ratio} for p in report.worst(_WORST)
        ]
        total = report.total
        return {
            "update_norm": total.update,
            "weight_norm": total.weight,
            "update_ratio": total.ratio,
            "groups": groups,
            "worst": worst,
        }

    def _lr(self) -> dict[str, Any]:
        rates = [0.0 if group["lr"] is None else float(group["lr"]) for group in self.optimizer.param_groups]
        largest = max(rates, default=0.0)
        return {"lr": largest} if all(rate == largest for rate in rates) else {"lr": largest, "lrs": rates}

    def _scaling(self) -> dict[str, Any]:
        if self._scaler is None:
            return {}
        before, self._scale = self._scale, float(self._scaler.get_scale())
        return {"scale": self._scale, **({"skipped": True} if before is not None and self._scale < before else {})}

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Looks at gradients that the step is to divide by a scale, before it does or scaler.update() changes that."""
        self._seen = None  # of a step that is not recorded, such as one to warm up before a capture
        scale = getattr(optimizer, "grad_scale", None)  # None if scaler.unscale_ has divided them already
        if not isinstance(scale, Tensor):
            self._captured_scale = None
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Replays come without this call. Ours leave gradients as they are; torch's divide them in place.
            self._captured_scale = scale if isinstance(optimizer, FusedOptimizer) else None
        elif self._looks_at(self.last_step + 1):
            self._seen = self._gradients(scale)

    @torch.no_grad()
    def _gradients(self, scale: Tensor | None) -> dict[str, Any]:
        """What the gradients say that are still there, so many times too large: their norm, and whose are 0."""
        groups = self.optimizer.param_groups
        places = [
            (g, i)
            for g, group in enumerate(groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None and param.grad.layout == torch.strided
        ]
        if not places:
            return {}
        params = [groups[g]["params"][i] for g, i in places]
        norms = torch._foreach_norm([local_grad(param.grad, param) for param in params])
        squares = torch.stack([n.to(norms[0].device) for n in norms]).cpu().double() ** 2
        sums = dict(zip(places, squares.tolist()))
        if any(map(is_dtensor, params)):  # of which there is more on other ranks
            whole = over_ranks(Meshes(groups), {place: (square, 0.0) for place, square in sums.items()})
            sums.update({place: square for place, (square, _) in whole.items()})
        norm = math.sqrt(sum(sums.values()))
        if scale is not None:
            norm /= float(scale)
        dead = [_name(groups[g], i, g) for (g, i), square in sums.items() if square == 0.0]
        if len(dead) == len(places):
            dead = []  # there was no gradient at all: nothing that one layer could tell of
        return {"grad_norm": norm, "dead": dead}

    def _speed(self) -> dict[str, Any]:
        now = time.perf_counter()
        took, self._time = now - self._time, now
        found = {"seconds_per_step": took / self._steps}
        if self._tokens:
            found.update(tokens=self._tokens, tokens_per_second=self._tokens / took)
        self._steps, self._tokens = 0, 0
        return found

    def _write(self, record: dict[str, Any], found: list[Anomaly]) -> None:
        if self._lines is not None:
            line = {**record, "anomalies": [_as_dict(each) for each in found]} if found else record
            self._lines.write(line)
        if self._board is not None:
            for name, value in record.items():
                if name not in ("step", "time") and isinstance(value, float):
                    self._board.add_scalar(f"train/{name}", value, record["step"])
            for each in found:
                self._board.add_text("anomalies", str(each), record["step"])

    def _act(self, found: list[Anomaly]) -> None:
        for each in found:
            if self._on_anomaly == "warn":
                warnings.warn(str(each), TrainingWarning, stacklevel=4)
            elif callable(self._on_anomaly):
                self._on_anomaly(each)
        ending = [each for each in found if each.kind in self._stop_on]
        if ending:
            if self._save is not None:
                self._save()
            raise StopTraining(ending[0])

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Notes that the training has ended; without it, whoever watches the file waits for more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._stop_asking()
        if self._lines is not None:
            self._lines.write({"ended": time.time()})
            self._lines.close()
            self._lines = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _before_steps(monitor: Monitor) -> RemovableHandle:
    """Calls a monitor before each step of its optimizer, as long as somebody else holds it."""
    held = weakref.ref(monitor)

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = held()
        if alive is not None:
            alive._before_step(optimizer)
        elif handle.id == next(reversed(handle.hooks_dict_ref() or {}), None):
            handle.remove()  # only the last: torch is going through them

    handle: RemovableHandle = monitor.optimizer.register_step_pre_hook(before_step)
    return handle


def _listed(name: str, value: Iterable[str]) -> list[str]:
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a text; pass a list of kinds, such as [{value!r}]")
    return list(value)


def _name(group: dict[str, Any], position: int, index: int) -> str:
    names = group.get("param_names")
    return names[position] if names else f"parameter {position} of group {index}"


def _as_dict(anomaly: Anomaly) -> dict[str, Any]:
    return {name: getattr(anomaly, name) for name in ("kind", "value", "limit", "message")}


def _tensorboard(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard={os.fspath(folder)!r} needs TensorBoard; install it with: pip install tensorboard"
        ) from error
    return SummaryWriter(os.fspath(folder))
