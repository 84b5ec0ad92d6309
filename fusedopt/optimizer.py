"""FusedOptimizer: everything about an optimizer but its equation."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checkpoint, checks, compiled, sharding
from .backends import GroupStep, ParamStep, Session
from .reference.norm import pairwise_sum, square_sums
from .state import (
    DTYPES,
    Request,
    StateSpec,
    allocate,
    keeps_own_precision,
    normalize_dtype,
    normalize_rounding,
    rounding_of,
    stored_dtype,
)

# Added to the gradient norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does.
_CLIP_EPS = 1e-6


class FusedOptimizer(Optimizer):
    """Base of all optimizers: param groups, state, steps and checkpoints.

    A subclass declares its states and answers three questions about a param group: `rule` (which compiled
    equation), `hyper` (its hyperparameters by name) and `reference` (the same equation in plain torch).

    Attributes:
        last_grad_norm: 0-d float32 tensor, the global gradient norm that the last step found before
            clipping; None until a step with max_grad_norm was taken.
    """

    STATES: tuple[StateSpec, ...] = ()

    # torch.amp.GradScaler hands over its scale and whether it found inf instead of unscaling first.
    _step_supports_amp_scaling = True

    last_grad_norm: Tensor | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> FusedOptimizer:
        checks.known_keywords(cls, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        state_dtype: Any = "float32",
        state_rounding: Any = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            **defaults,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "state_rounding": state_rounding,
            "seed": seed,
            "max_grad_norm": max_grad_norm,
            "backend": backend,
        }
        super().__init__(params, self._checked(defaults))

    # ---- what a subclass answers -----------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError if a hyperparameter of the optimizer's own is out of range."""
        raise NotImplementedError

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the compiled rule that steps a group."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """The rule's hyperparameters for a group."""
        raise NotImplementedError

    def reference(self, group: dict[str, Any]) -> backends.base.Reference:
        """The rule in plain torch."""
        raise NotImplementedError

    def states(self, group: dict[str, Any]) -> Sequence[StateSpec]:
        """The states that a group's parameters have; all that are declared unless a subclass says less."""
        return self.STATES

    # ---- param groups ----------------------------------------------------------------------------

    def _checked(self, group: dict[str, Any]) -> dict[str, Any]:
        """A copy of a complete group with everything checked and in the form that checkpoints keep."""
        if group["differentiable"]:
            raise ValueError(
                "differentiable=True is not supported by compiled kernels; use torch.optim's optimizer to differentiate through a step"
            )
        self.check_group(group)
        checks.one_of("backend", group["backend"], backends.names())
        checks.uint32("seed", group["seed"])
        if group["max_grad_norm"] is not None and not checks.nonnegative("max_grad_norm", group["max_grad_norm"]) > 0:
            raise ValueError("max_grad_norm=0 would make every gradient zero; pass a number > 0, or None not to clip")
        return {
            **group,
            "state_dtype": normalize_dtype(group["state_dtype"], self.STATES),
            "state_rounding": normalize_rounding(group["state_rounding"], self.STATES),
        }

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its values are checked before anything changes."""
        if isinstance(param_group, dict):
            for key in param_group:
                near = difflib.get_close_matches(str(key), self.defaults, n=1, cutoff=0.8)
                if near and key not in self.defaults and key != "params":
                    warnings.warn(f"param group key {key!r} is not used; did you mean {near[0]!r}?", stacklevel=3)
            checked = self._checked({**self.defaults, **param_group})
            param_group.update({key: checked[key] for key in self.defaults})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="optimizer contains a parameter group with duplicate")
            try:
                super().add_param_group(param_group)
            except UserWarning:
                raise ValueError("params lists a parameter more than once in one group; list each once") from None

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss; run with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: A parameter, its gradient or its state cannot be stepped. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            compiled.step(self)
        else:
            self._take_step()
        return loss

    def _take_step(self) -> None:
        if not self._found_inf():
            gathered = self._gather()
            gathered.step(self._grad_multipliers(gathered))
            gathered.write_back()

    def _found_inf(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf.item())

    def group_step(self, group: dict[str, Any]) -> GroupStep:
        """What backends need of a param group."""
        specs = self.states(group)
        return GroupStep(
            rule=self.rule(group),
            hyper=self.hyper(group),
            reference=self.reference(group),
            state_names=tuple(spec.name for spec in specs),
            roundings=tuple(rounding_of(spec, group["state_rounding"]) for spec in specs),
            seed=group["seed"],
            maximize=group["maximize"],
        )

    def _sessions(self) -> dict[str, Session]:
        # Kept in __dict__ only: copies and pickles of an optimizer make their own.
        return self.__dict__.setdefault("_session_cache", {name: b.session() for name, b in backends.BACKENDS.items()})

    def _max_grad_norm(self) -> float | None:
        values = [group["max_grad_norm"] for group in self.param_groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"max_grad_norm differs between param groups ({values}); one norm is taken over all of them, so give all the same value"
            )
        return values[0]

    def _gather(self) -> _Gathered:
        """Everything that this step touches, checked. Makes missing state; changes nothing else."""
        max_grad_norm = self._max_grad_norm()
        gathered = _Gathered(self._sessions(), [self.group_step(group) for group in self.param_groups])
        left = gathered.collect(self.param_groups, self.state)
        if not left:
            return gathered
        for group, position in left:
            self._check_param(group, position, max_grad_norm)
        if self.make_state((group, self.param_groups[group]["params"][position]) for group, position in left):
            left = gathered.collect(self.param_groups, self.state)
        for group, position in left:
            param = self.param_groups[group]["params"][position]
            gathered.add(group, position, param, self.state[param], self._backends(group))
        return gathered

    def _backends(self, group: int) -> list[backends.Backend]:
        return backends.candidates(self.param_groups[group]["backend"])

    def _check_param(self, group_index: int, position: int, max_grad_norm: float | None) -> None:
        """Raises ValueError if a parameter that has a gradient cannot be stepped."""
        group = self.param_groups[group_index]
        param = group["params"][position]
        where = f"parameter {position} of group {group_index}"
        if "param_names" in group:
            where += f" ({group['param_names'][position]!r})"
        where += f", of shape {tuple(param.shape)},"
        grad = param.grad
        if param.device.type == "meta":
            raise ValueError(f"{where} is on the meta device and has no values; materialize the model before stepping")
        if grad.layout != torch.strided:
            raise ValueError(f"{where} has a gradient of layout {grad.layout}; sparse gradients need torch.optim.SparseAdam")
        if grad.shape != param.shape:
            raise ValueError(f"{where} has a gradient of shape {tuple(grad.shape)}; clear it with zero_grad() after reshaping")
        if grad.device != param.device or grad.is_complex() != param.is_complex():
            raise ValueError(f"{where} is {param.dtype} on {param.device} but its gradient {grad.dtype} on {grad.device}")
        reason = sharding.refusal(param, max_grad_norm)
        if reason is not None:
            raise ValueError(f"{where} cannot be stepped: {reason}")
        refusals = [(backend.name, backend.refusal(sharding.local(param))) for backend in self._backends(group_index)]
        if all(reason is not None for _, reason in refusals):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
            raise ValueError(
                f"{where} cannot be stepped by backend={group['backend']!r} ({reasons}); "
                "use backend='auto' or convert the parameter to float32, bfloat16 or float16"
            )
        checkpoint.check_state(self, group, param, self.state.get(param, {}), where)

    def make_state(self, members: Any) -> bool:
        """Allocates the states that (group index, parameter) pairs lack; whether there were any."""
        wanted: list[tuple[Tensor, str]] = []
        requests: list[Request] = []
        for group_index, param in members:
            group = self.param_groups[group_index]
            held = self.state.get(param, {})
            local = sharding.local(param)
            if "step" not in held:
                wanted.append((param, "step"))
                requests.append(Request(torch.Size(), torch.float32, local.device))
            for spec in self.states(group):
                if spec.name not in held:
                    wanted.append((param, spec.name))
                    requests.append(Request(local.shape, stored_dtype(spec, group["state_dtype"], param), local.device))
        for (param, name), tensor in zip(wanted, allocate(requests)):
            self.state[param][name] = tensor if name == "step" else sharding.like_param(tensor, param)
        return bool(wanted)

    def _grad_multipliers(self, gathered: _Gathered) -> list[float]:
        """What each group's gradients are multiplied by: +- inverse loss scale x clip coefficient."""
        grad_scale = getattr(self, "grad_scale", None)
        multiplier = 1.0 if grad_scale is None else 1.0 / float(grad_scale.item())
        max_grad_norm = self._max_grad_norm()
        if max_grad_norm is not None:
            norm = math.sqrt(gathered.square_sum(self.param_groups)) * multiplier
            self.last_grad_norm = torch.tensor(norm, dtype=torch.float32)
            coefficient = max_grad_norm / (norm + _CLIP_EPS)
            multiplier *= 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN
        return [-multiplier if group.maximize else multiplier for group in gathered.groups]

    # ---- checkpoints -----------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch.optim's optimizer of the same name.

        Hyperparameters come from the state dict, as in torch; `backend`, and what a state dict of torch's
        does not have, stay as they are here. States are converted to the group's `state_dtype`, not to
        the parameter's dtype.

        Raises:
            ValueError: The state dict has other groups, sizes or shapes. Nothing has changed then.
        """
        handle = self.register_load_state_dict_pre_hook(checkpoint.prepare)  # after the user's own hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        checkpoint.restore(self)
        for session in self.__dict__.get("_session_cache", {}).values():
            session.forget()


class _Gathered:
    """The tensors of one step, by backend, and the copies to write back."""

    def __init__(self, sessions: dict[str, Session], groups: list[GroupStep]) -> None:
        self.sessions = sessions
        self.groups = groups
        self._copies: list[tuple[Tensor, Tensor]] = []

    def collect(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> list[tuple[int, int]]:
        """Lets each group's first backend take what it can; what is left, as (group, position)."""
        for session in self.sessions.values():
            session.begin(self.groups)
        left = []
        for index, group in enumerate(param_groups):
            session = self.sessions[backends.candidates(group["backend"])[0].name]
            left += [(index, position) for position in session.collect(index, group["params"], state)]
        return left

    def add(
        self,
        group: int,
        position: int,
        param: Tensor,
        held: dict[str, Tensor],
        candidates: list[backends.Backend],
    ) -> None:
        """Hands a checked parameter to the first backend that takes it."""
        local = sharding.local(param)
        entry = ParamStep(
            group=group,
            position=position,
            param=self._plain(local),
            grad=self._gradient(sharding.local(param.grad), local),  # type: ignore[arg-type]
            states=tuple(self._plain(sharding.local(held[name])) for name in self.groups[group].state_names),
            step=held["step"],
            first_index=sharding.first_index(param),
        )
        for backend in candidates:
            if backend.refusal(local) is None and self.sessions[backend.name].add(entry):
                return
        raise AssertionError(f"no backend took parameter {position} of group {group}, which was checked")

    def _plain(self, tensor: Tensor) -> Tensor:
        """The tensor itself if it is plain and contiguous, else a copy that `write_back` returns."""
        tensor = tensor.detach()
        if type(tensor) is not Tensor:
            tensor = tensor.as_subclass(Tensor)
        if tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0:
            return tensor
        copy = tensor.clone(memory_format=torch.contiguous_format).resolve_neg()
        self._copies.append((tensor, copy))
        return copy

    @staticmethod
    def _gradient(grad: Tensor, param: Tensor) -> Tensor:
        """The gradient as plain numbers in memory, in a dtype that goes with the parameter's."""
        grad = grad.detach()
        if not keeps_own_precision(param) and grad.dtype not in DTYPES.values():
            grad = grad.float()
        return grad.contiguous().resolve_neg().resolve_conj()

    def square_sum(self, param_groups: list[dict[str, Any]]) -> float:
        """The sum of squares of all gradients, before any multiplier."""
        active = [session for session in self.sessions.values() if len(session) > 0]
        if len(active) == 1:
            sums = active[0].square_sums()
        else:  # list order runs across backends: the reference takes them all
            grads = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
            sums = torch.cat([square_sums(sharding.local(grad)).cpu() for grad in grads]) if grads else torch.zeros(0)
        return float(pairwise_sum(sums).item())

    def step(self, grad_multipliers: list[float]) -> None:
        for session in self.sessions.values():
            if len(session) > 0:
                session.step(grad_multipliers)

    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)
