"""What other rooms may ask of an optimizer: what a subclass answers, and what follows from the answers."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends, checks
from ..backends import GroupStep
from ..backends.base import Health
from ..offload import homes
from ..offload.handle import Release
from ..storage import masters
from ..storage.state import StateSpec, normalize_dtype, normalize_rounding, rounding_of

NONFINITE = ("propagate", "skip_block")  # what becomes of weights whose step is not finite


class Contract(Optimizer):
    """An optimizer as members, checkpoints, reports and compiled steps see it.

    A subclass declares its STATES, for every compiled rule it uses the same equation in plain torch (REFERENCES; and
    ASKING, if it takes sums over a parameter that may be sharded), and under which NAMES `create_optimizer` makes it,
    with which options. It answers two questions about a param group: `rule`, which of them steps it, and `hyper`, its
    hyperparameters by name, lr among them. One whose states hang on a parameter's shape has `layouts`, too.

    Attributes:
        last_grad_norm: See `FusedOptimizer`.
    """

    STATES: ClassVar[tuple[StateSpec, ...]] = ()
    REFERENCES: ClassVar[dict[str, backends.base.Reference]] = {}
    ASKING: ClassVar[dict[str, backends.base.AskingReference]] = {}
    NAMES: ClassVar[dict[str, dict[str, Any]]] = {}

    # What a name stands for elsewhere and not here: a warning to whoever makes an optimizer by it.
    NOTES: ClassVar[dict[str, str]] = {}

    # What validation goes by: learning rates that are usual, and a sentence for whoever is above; the largest weight
    # decay that is; and the RMS of an update over the learning rate, None where it depends on the gradients' size.
    USUAL_LR: ClassVar[tuple[float, float]] = (1e-8, 1e-2)
    USUAL_LR_NOTE: ClassVar[str] = ""
    USUAL_WEIGHT_DECAY: ClassVar[float] = 0.1
    UPDATE_RMS: ClassVar[float | None] = 1.0

    # Whether a learning rate that is a tensor on the parameters' device is read there; else `hyper` waits for it.
    derives_on_device: ClassVar[bool] = True

    key: str  # what compiled steps call it
    _lock: threading.RLock  # steps and loading come one after the other, whatever threads they are called in
    # Whether a gradient that is sparse may be taken for one with zeros: nothing moves where it has no number.
    takes_sparse: ClassVar[bool] = False

    # Whether rules take sums over a whole parameter: steps of shards then meet other ranks.
    takes_sums: ClassVar[bool] = False

    # Whether torch makes states in the first step that needs them and not before it: each listing of a parameter then
    # begins anew, and steps are counted from when a state was made.
    begins_in_first_step: ClassVar[bool] = False

    # Whether a step changes its param groups: it is not traced or captured then, and waits to learn if it is taken.
    changes_groups: ClassVar[bool] = False

    # Whether averages of the weights do what the end of a schedule does: one that decays as well is one too many.
    replaces_schedules: ClassVar[bool] = False

    # Why one block of a parameter cannot be left out of a step, as a clause; None if it can.
    why_no_block_is_skipped: ClassVar[str | None] = None

    last_grad_norm: Tensor | None = None
    last_grad_scale: Tensor | None = None  # what the last step divided gradients by, which still have that factor
    _release: Release | None = None  # steps parameters during the backward pass
    has_warned = False  # that nothing is quantized

    @property
    def release_handle(self) -> Release | None:
        """What `release_gradients` returned, while gradients are stepped during backward passes; else None."""
        return self._release

    # ---- what a subclass answers -----------------------------------------------------------------

    @classmethod
    def implied(cls, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that one of the NAMES stands for; those that are given win over them."""
        return cls.NAMES[name]

    def own_defaults(self) -> dict[str, Any]:
        """Entries of param groups that the constructor of a subclass's base does not know."""
        return {}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError if a hyperparameter of the optimizer's own is out of range."""
        raise NotImplementedError

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the compiled rule that steps a group; `_` and a layout follow if there are several."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """The rule's hyperparameters for a group."""
        raise NotImplementedError

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        """The states that a group's parameters have; all that are declared unless a subclass says less."""
        return self.STATES

    def layouts(self, group: dict[str, Any]) -> dict[str, Sequence[StateSpec]]:
        """The states of a group's parameters by layout; `states` are those of all layouts if there are several."""
        return {"": self.states(group)}

    def layout_of(self, group: dict[str, Any], param: Tensor) -> str:
        """Which of its group's layouts a parameter has, by its global shape."""
        return ""

    def row_dim(self, group: dict[str, Any], param: Tensor) -> int | None:
        """The dimension that counts the rows of a parameter's matrices, of those that take sums over them."""
        return None

    def refusal(self, group: dict[str, Any], param: Tensor) -> str | None:
        """Why the equation cannot step a parameter, as a sentence; None if it can."""
        return None

    def first_value(self, spec: StateSpec, group: dict[str, Any]) -> float:
        """What a state begins with."""
        return 0.0

    def before_step(self) -> None:
        """Raises ValueError if no step may be taken now."""
        if self.changes_groups and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"a step of {type(self).__name__} cannot be captured in a CUDA graph: its param groups change in every "
                "step, and replays would not see it; call step() outside of the graph"
            )

    def after_step(self) -> None:
        """Changes param groups after a step that was taken; for optimizers with `changes_groups`."""

    def translated_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A complete param group from a state dict that another package may have written, as ours are."""
        return group

    def translated(self, group: dict[str, Any], param: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state from a state dict that another package may have written, with our names and shapes."""
        return held

    def as_torchs_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A complete group of ours as torch's optimizer of the same name has it; undone by `translated_group`."""
        return group

    def as_torchs_state(self, group: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        """A parameter's dense state, with the names and shapes of torch's optimizer; undone by `translated`."""
        return held

    # ---- what follows ----------------------------------------------------------------------------

    def sparse_refusal(self, group: dict[str, Any]) -> str | None:
        """Why a group's gradients cannot be sparse, as a sentence; None if they can."""
        if not self.takes_sparse:
            return "where a gradient has no number, moments would decay and move the parameter all the same"
        if group["weight_decay"] != 0:
            return f"weight_decay={group['weight_decay']!r} would decay all of it, not what the gradient touches"
        return None

    def states_of(self, group: dict[str, Any], param: Tensor) -> Sequence[StateSpec]:
        """The states that a parameter has."""
        return self.layouts(group)[self.layout_of(group, param)]

    def all_states(self, group: dict[str, Any]) -> list[StateSpec]:
        """Every declared state, as a group has it where it has it."""
        return list({spec.name: spec for spec in (*self.STATES, *self.states(group))}.values())

    def checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """A copy of a complete group with everything checked and in the form that checkpoints keep."""
        group = {key: value if key == "params" else checks.plain(value) for key, value in group.items()}
        if checks.switch("differentiable", group["differentiable"]):
            raise ValueError(
                "differentiable=True is not supported by compiled kernels; "
                "use torch.optim's optimizer to differentiate through a step"
            )
        checks.switch("maximize", group["maximize"])
        self.check_group(group)
        checks.one_of("backend", group["backend"], backends.names())
        reason = self.why_no_block_is_skipped
        if checks.one_of("nonfinite", group["nonfinite"], NONFINITE) == "skip_block" and reason is not None:
            raise ValueError(
                f"nonfinite='skip_block' is not possible in {type(self).__name__}: {reason}; "
                "leave nonfinite='propagate' and skip whole steps, as torch.amp.GradScaler does"
            )
        checks.uint32("seed", group["seed"])
        checks.whole("min_quantized_numel", group["min_quantized_numel"])
        checks.whole("reserve_bytes", group["reserve_bytes"])
        homes.check_step_device(group)
        if checks.whole("stream_bytes", group["stream_bytes"]) < 1 << 16:
            raise ValueError(
                f"stream_bytes={group['stream_bytes']!r} is too small to pay; pass at least 65536 (2**16) bytes"
            )
        checks.process_group("grad_norm_group", group["grad_norm_group"])
        if group["max_grad_norm"] is not None and not checks.nonnegative("max_grad_norm", group["max_grad_norm"]) > 0:
            raise ValueError("max_grad_norm=0 would make every gradient zero; pass a number > 0, or None not to clip")
        if group["skip_step_above"] is not None:
            checks.positive("skip_step_above", group["skip_step_above"])
        return {
            **group,
            "state_device": homes.normalize(group["state_device"]),
            "state_dtype": normalize_dtype(group["state_dtype"], self.all_states(group)),
            "state_rounding": normalize_rounding(group["state_rounding"], self.STATES),
            "rounding": masters.normalize_rounding(group["rounding"]),
            "master_weights": masters.normalize(group["master_weights"]),
        }

    def with_any_lr(self, group: dict[str, Any]) -> dict[str, Any]:
        """A complete group with a learning rate that passes every check, in the place of what a scheduler has set."""
        return {**group, "lr": 1.0}

    def group_step(self, group: dict[str, Any], layout: str = "", index: int = 0) -> GroupStep:
        """What backends need of a param group, the one of an index, and of its parameters of a layout."""
        specs = tuple(self.layouts(group)[layout])
        lr = group["lr"]
        if isinstance(lr, Tensor) and self.derives_on_device and lr.device.type != "cpu":
            group = {**group, "lr": 1.0}
        else:
            lr = None  # as a number
        return GroupStep(
            rule=f"{self.rule(group)}_{layout}" if layout else self.rule(group),
            hyper=self.hyper(group),
            states=specs,
            roundings=tuple(rounding_of(spec, group["state_rounding"]) for spec in specs),
            seed=group["seed"],
            maximize=group["maximize"],
            rounding=masters.rounding_of(group),
            master=group["master_weights"],
            skips_blocks=group["nonfinite"] == "skip_block",
            layout=layout,
            param_group=index,
            lr=lr,
        )

    def backends_of(self, group: int) -> list[backends.Backend]:
        """The backends that a group may be stepped by, the best first."""
        return backends.candidates(self.param_groups[group]["backend"])

    def common_max_grad_norm(self) -> float | None:
        """The norm that all groups clip to; infinity if it is only looked at, None if there is no need of it.

        Raises:
            ValueError: It differs between groups.
        """
        found = self._common("max_grad_norm")
        return math.inf if found is None and self.common_skip_step_above() is not None else found

    def common_skip_step_above(self) -> float | None:
        """The norm above which a step is not taken; None if all are.

        Raises:
            ValueError: It differs between groups.
        """
        return self._common("skip_step_above")

    def _common(self, name: str) -> float | None:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{name} differs between param groups ({values}); one norm is taken over all of them, "
                "so give all the same value"
            )
        return values[0]

    @staticmethod
    def takes_norm(group: dict[str, Any]) -> bool:
        """Whether steps take the norm of all gradients first."""
        return group["max_grad_norm"] is not None or group["skip_step_above"] is not None

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
    ) -> str:
        """See FusedOptimizer; the name is torch.compile's."""
        raise NotImplementedError

    def _recorded(self) -> dict[str, Any]:
        """What steps are told to count and measure, as keyword arguments."""
        raise NotImplementedError

    def _count_step(self, counts: Health, is_taken: bool = True) -> None:
        """Notes what a whole step counted and measured."""
        raise NotImplementedError

    def _agreement(self) -> Any:
        """What it has told other ranks (collectives.Agreement), for as long as the optimizer lives."""
        raise NotImplementedError

    def _sessions(self) -> dict[str, backends.Session]:
        """One of every backend, for as long as the optimizer lives."""
        raise NotImplementedError
