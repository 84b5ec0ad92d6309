"""FusedOptimizer: everything about an optimizer but its equation."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Scaling, Session
from ..backends.base import ASKING, REFERENCES, Spread
from ..offload.homes import RESERVE_BYTES
from ..offload.stream import STREAM_BYTES
from ..reference.norm import pairwise_sum
from . import checkpoint, compiled, members, sharding
from .collectives import Agreement
from .edits import begin_anew, settle
from .gather import Gathered, Ranks
from .options import OWN_DEFAULTS, note_own_defaults, spell_out
from .partial import Partial
from .sessions import all_sessions, size_buffers
from .shard_sums import shard_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Every optimizer's class by each of its NAMES; subclasses fill it as they are defined.
CLASSES: dict[str, type[FusedOptimizer]] = {}


class FusedOptimizer(Partial):
    """Base of all optimizers: param groups, state, steps and checkpoints.

    What a subclass declares and answers is described in `Contract`.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups. Every option may differ between
            groups, except max_grad_norm and skip_step_above.
        defaults: The subclass's own hyperparameters.
        state_dtype: How states are stored: "float32", "bfloat16", "float16", "8bit" (1.02 bytes per element; see
            docs/formats.md), a torch.dtype, or a dict {state: one of them} whose missing states are float32.
        state_rounding: How 16- and 8-bit states are rounded: "stochastic", "nearest", or a dict {state:
            rounding}. Default: stochastic, because a rounded-to-nearest second moment stops moving at beta2 =
            .999; running maxima to nearest.
        min_quantized_numel: Parameters with fewer elements keep float32 state when 8 bits are asked for, as do
            those of fewer than two dimensions or with rows shorter than 64 elements.
        rounding: How 16-bit parameters are rounded: "nearest", as torch does, or "stochastic". Default: nearest,
            and stochastic where master_weights="split24".
        master_weights: What 16-bit parameters keep beside them so that small updates are not lost: "kahan" (2
            bytes), "split24" (1 byte), "split32" (2 bytes, exactly a float32 run), "float32" (4 bytes); None
            keeps nothing. float16 parameters take "float32" only. Others ignore it: they need none.
        nonfinite: What becomes of weights whose step would leave inf, NaN or a number of 3.36e38 or more in them or
            in their states: "propagate", as in torch, or "skip_block", which leaves them as they were, states included;
            `health_report` counts them. With an 8-bit state, which such a number spoils for all of its block of 64,
            the block is left; else the single weight. Not in optimizers that take means over a parameter. See
            docs/options.md.
        seed: Seed of stochastic rounding, an int in [0, 2**32).
        max_grad_norm: Clip gradients to this global norm (over all groups) inside the step; None does
            not. Gradients are not written to; the norm is left in `last_grad_norm`. Of DTensors it is that of the
            whole, over all shards, with each replica counted once.
        skip_step_above: Leave out every step whose gradients have a larger norm, or one that is NaN: nothing changes,
            the step is not counted, and `last_grad_norm` tells. It is looked at before clipping, inside the step and
            without waiting for a device. None takes all.
        grad_norm_group: A process group over whose members the parameters of a param group are spread without being
            DTensors of a mesh with all of them, such as the stages of a pipeline or experts: their part of the norm
            is summed over it. Not saved in state dicts. None: this process, or the meshes of DTensors.
        state_device: Where the states of parameters on a GPU are kept: None, beside them; "cpu", in pinned memory of
            the host, from which a step streams them; "auto", beside them while there is room; "disk:FOLDER", in files,
            from which a step streams them through pinned memory. Parameters on the CPU have theirs in its memory in any
            case, or with "disk:FOLDER" in files. See docs/offload.md.
        stream_bytes: The size of each of the two buffers on the device that a step streams states through.
        step_device: "cpu" steps parameters on a GPU on the host: gradients and weights are copied there, states and
            masters are there, and weights come back. None steps them where they are.
        host_threads: Threads of such a step; None takes as many as torch.
        reserve_bytes: What state_device="auto" leaves free on the device, in bytes.
        backend: "auto", or the name of one: "cpu" and "cuda" (compiled), "triton" (AMD and Intel GPUs, and NVIDIA
            ones without compiled kernels; docs/triton.md), "eager" (plain torch, any device).
        maximize: Ascend instead of descend.
        foreach: Accepted for torch's sake; every step is fused.
        capturable: Accepted for torch's sake.
        differentiable: Must be False.
        fused: Accepted for torch's sake; every step is fused.

    Attributes:
        last_grad_norm: 0-d float32 tensor, the global gradient norm that the last step found before
            clipping; None if it took none, without max_grad_norm and skip_step_above.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REFERENCES.update(cls.REFERENCES)
        ASKING.update(cls.ASKING)
        checkpoint.STATE_KEYS.update(key for spec in cls.STATES for key in (spec.name, spec.codes, spec.scales))
        if "NAMES" in cls.__dict__:
            CLASSES.update(dict.fromkeys(cls.NAMES, cls))
        if "__init__" in cls.__dict__:
            spell_out(cls.__init__, FusedOptimizer.__init__)

    def __new__(cls, *args: Any, **kwargs: Any) -> FusedOptimizer:
        checks.known_keywords(cls, kwargs)
        optimizer = super().__new__(cls)
        # Here, because copies and unpickled ones are not constructed.
        optimizer._lock = threading.RLock()
        optimizer.key = compiled.new_key(optimizer)
        return optimizer

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        state_dtype: Any = "float32",
        state_rounding: Any = None,
        min_quantized_numel: int = 4096,
        rounding: str | None = None,
        master_weights: str | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        max_grad_norm: float | None = None,
        skip_step_above: float | None = None,
        state_device: str | None = None,
        stream_bytes: int = STREAM_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
        step_device: str | None = None,
        host_threads: int | None = None,
        grad_norm_group: ProcessGroup | None = None,
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:  # `__new__` has looked already, unless a user's subclass hands on keyword arguments of its own
            checks.known_to_bases(type(self), unknown)
        defaults = {
            **defaults,
            **self.own_defaults(),
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "state_rounding": state_rounding,
            "min_quantized_numel": min_quantized_numel,
            "rounding": rounding,
            "master_weights": master_weights,
            "nonfinite": nonfinite,
            "seed": seed,
            "max_grad_norm": max_grad_norm,
            "skip_step_above": skip_step_above,
            "state_device": state_device,
            "stream_bytes": stream_bytes,
            "reserve_bytes": reserve_bytes,
            "step_device": step_device,
            "host_threads": host_threads,
            "grad_norm_group": grad_norm_group,
            "backend": backend,
        }
        super().__init__(params, self.checked_group(defaults))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over its scale and whether it found inf, instead of unscaling gradients itself.

        As in torch, only where fused=True asks for it, because whoever clips between backward and step, as Lightning
        does, needs gradients that are unscaled by then; or where the step clips, which needs the scale. Where gradients
        are released, it finds none, and the step says what to do.
        """
        return self._release is not None or any(group["fused"] or self.takes_norm(group) for group in self.param_groups)

    # ---- param groups ----------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its values are checked before anything changes."""
        if isinstance(param_group, dict):
            for key in param_group:
                near = difflib.get_close_matches(str(key), self.defaults, n=1, cutoff=0.8)
                if near and key not in self.defaults and key != "params":
                    warnings.warn(
                        f"param group key {key!r} is not used; did you mean {near[0]!r}?",
                        stacklevel=checks.callers_level(),
                    )
            checked = self.checked_group({**self.defaults, **param_group})
            param_group.update({key: checked[key] for key in self.defaults})
        super().add_param_group(param_group)
        self._repeats = self._repeats or members.repeats(self.param_groups[-1:])
        if self._release is not None:
            self._release.attach()

    # ---- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        if torch.compiler.is_compiling() and self._is_traceable():
            compiled.step(self)
        else:
            self._take_step()
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _take_step(self) -> None:
        with self._lock:
            if self._release is not None:
                self._release.finish()
            else:
                self._take_whole_step()

    def _take_whole_step(self) -> None:
        if members.only_wants_state(self):
            members.init_state(self, lambda param: param.grad is not None)
            return
        self.before_step()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.last_grad_scale = None if grad_scale is None else grad_scale.clone()  # GradScaler changes it in place
        scaling = Scaling(grad_scale, found_inf, self.common_max_grad_norm(), self.common_skip_step_above())
        meshes = self._agreement().meshes(self)
        if meshes is None and found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return
        self._is_taken = False
        ranks = None if meshes is None else Ranks(self._agreement(), self, meshes)
        if self._uses_host():
            counts, norm = self._step_all_with_host(scaling, ranks)
        elif self._reads_in_place() and not self._repeats and ranks is None:
            counts, norm = self._step_in_windows(scaling)
        else:
            counts, norm = self._step_some(None, scaling, ranks=ranks)
        if norm is not None or scaling.max_grad_norm is None:
            self.last_grad_norm = norm
        self._count_step(counts, self._is_taken)
        if self._is_taken:
            self.after_step()

    def _sessions(self) -> dict[str, Session]:
        # Kept in __dict__ only: copies and pickles of an optimizer make their own.
        if "_session_cache" not in self.__dict__:
            self._session_cache = all_sessions()
        return self._session_cache

    def _agreement(self) -> Agreement:
        if "_agreement_cache" not in self.__dict__:
            self._agreement_cache = Agreement()
        return self._agreement_cache

    def _sums_over_ranks(self, sums: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor] | None:
        """The sum of squares of each whole gradient, of which `sums` is what is here, by chunk; None if that is all."""
        meshes = self._agreement().meshes(self)
        if meshes is None or not meshes.meshes:
            return None
        here = {place: float(pairwise_sum(found)) for place, found in sums.items()}
        whole = self._agreement().whole_sums(self, meshes, here)
        return {place: torch.tensor([total], dtype=torch.float64, device="cpu") for place, total in whole.items()}

    def _spread_of(self, group: int, param: Tensor) -> Spread | None:
        return shard_sums(self, self.param_groups[group], param)

    def _gather(self, listed: Sequence[list[int]] | None = None) -> Gathered:
        """Everything that this step touches, or what is at these positions, checked; only makes missing state."""
        max_grad_norm = self.common_max_grad_norm()
        groups, positions = members.parts(self, listed)
        size_buffers(self._sessions(), self.param_groups)
        gathered = Gathered(
            self._sessions(),
            groups,
            positions,
            takes_sums=max_grad_norm is not None,
            spread_of=self._spread_of if self.takes_sums else None,
        )
        left = gathered.collect(self.param_groups, self.state)
        if not left:
            return gathered
        for member in left:
            members.check_param(self, member.group, member.position)
        if members.make_state(self, ((m.group, self.param_groups[m.group]["params"][m.position]) for m in left)):
            left = gathered.collect(self.param_groups, self.state)
        for member in left:
            param = self.param_groups[member.group]["params"][member.position]
            spread = self._spread_of(member.group, param)
            gathered.add(member, param, param.grad, self.state[param], self.backends_of(member.group), spread)
        return gathered

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
    ) -> str:
        """Appends a group's tensors to the lists, making missing state.

        Returns:
            Of each parameter, joined by colons: its layout; the keys of what it appended to `states`, joined by
            commas; its position in the group; "sharded" if it is a DTensor, or nothing. Parameters are joined by
            semicolons. One string, because torch.compile takes what this returns for a constant.

        torch.compile knows a method of this name: it runs it while tracing, so that making state is not
        traced, and takes the tensors in the lists for inputs of the graph.
        """
        settle(self)  # once for each group that is traced: few are
        keys = []
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        positions = [i for i, param in enumerate(group["params"]) if param.grad is not None]
        for position in positions:
            members.check_param(self, index, position)
        members.make_state(self, ((index, group["params"][position]) for position in positions))
        if self.takes_norm(group) and self.last_grad_norm is None:
            self.last_grad_norm = torch.zeros((), dtype=torch.float32, device=group["params"][0].device)
        for position in positions:
            param = group["params"][position]
            params.append(param)
            grads.append(param.grad)
            held = self.state[param]
            own = checkpoint.state_keys(self, group, param, held)
            kind = "sharded" if sharding.is_dtensor(param) else ""
            keys.append(":".join((self.layout_of(group, param), ",".join(own), str(position), kind)))
            states.extend(held[key] for key in own)
            steps.append(held["step"])
        return ";".join(keys)

    @torch.no_grad()
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def init_state(self) -> None:
        """Makes the state of all parameters that require gradients, as their first step would, and steps nothing.

        For what wants state before there is a gradient, such as templates for torch.distributed.checkpoint.

        Raises:
            ValueError: A parameter cannot be stepped. Nothing has changed then.
        """
        with self._lock:
            members.init_state(self, lambda param: param.requires_grad)

    # ---- checkpoints -----------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The state dict, as torch.optim.

        Options that torch's optimizers do not have stand in its groups only where they differ from their defaults. So
        distributed checkpoints of torch's optimizers load into ours, and ours into later versions with more options.
        """
        hook = checkpoint.without_defaults  # before the user's own hooks
        with self._lock, checkpoint.hooked(self.register_state_dict_post_hook, hook, prepend=True):
            return super().state_dict()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch.optim's optimizer of the same name.

        Hyperparameters come from the state dict, as in torch; `backend`, and what does not stand in a state dict, as
        options of ours in one of torch's, stay as they are here. States are converted to the group's `state_dtype`,
        not to the parameter's dtype.

        Raises:
            ValueError: It is no optimizer's, or of other groups, sizes or shapes. Nothing has changed then.
            OSError: A disk is full. Nothing has changed then, either, as after any other error of loading itself.
        """
        hook = checkpoint.prepare  # after the user's own hooks
        with self._lock, checkpoint.hooked(self.register_load_state_dict_pre_hook, hook):
            super().load_state_dict(checkpoint.a_dict(state_dict))

    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.copied(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        def take(state: dict[str, Any]) -> None:
            super(FusedOptimizer, self).__setstate__(state)
            self.defaults = {**OWN_DEFAULTS, **self.defaults}  # those of an older version's pickle are fewer
            self._repeats = members.repeats(self.param_groups)

        checkpoint.take_over(self, take, state)
        begin_anew(self)


note_own_defaults(FusedOptimizer.__init__)
