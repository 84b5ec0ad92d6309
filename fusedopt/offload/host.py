"""Steps parameters of a device on the host: gradients go there as they come, and weights come back."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import Scaling
from ..backends.base import Health
from .runtime import Runtime, runtime_of

_WINDOW_NUMEL = 1 << 20  # elements that are stepped together, while others are still copied


class Inner(Protocol):
    """What is asked of the optimizer that steps on the host."""

    param_groups: list[dict[str, Any]]
    state: Any
    _health: Any
    _norms: Any
    _repeats: bool
    _lock: threading.RLock  # the thread steps while the backward pass measures

    def _gather(self, listed: list[list[int]] | None = None) -> Any:
        """Checks what is to be stepped."""

    def _step_some(
        self, listed: list[list[int]], scaling: Scaling, multiplier: float | None = None
    ) -> tuple[Health, Tensor | None]:
        """Steps parameters by group and position."""

    def _square_sums(self, listed: list[list[int]]) -> list[Tensor]:
        """The sums of squares of their gradients."""


@dataclass
class Span:
    """When something of a parameter was under way, in seconds.

    Attributes:
        what: "copy in" (of its gradient, until the host has it), or "step".
        begin: When it began.
        end: When it ended.
    """

    what: str
    begin: float
    end: float


class _Twin:
    """A parameter on the host: its weights and its gradient, pinned."""

    def __init__(self, param: Tensor, runtime: Runtime) -> None:
        if not param.is_contiguous() or type(param.detach()) is not Tensor:
            kind = type(param.detach()).__name__
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} in a group with step_device='cpu' is "
                f"{'not contiguous' if kind == 'Tensor' else f'a {kind}'}, and only contiguous plain tensors are "
                "stepped on the host; put it in a group with step_device=None"
            )
        self.runtime = runtime
        self.device = runtime.device_of(param)
        size = param.numel() * param.element_size()
        self.bytes = runtime.pinned(max(1, size))[:size]
        self.param = torch.nn.Parameter(self.bytes.view(param.dtype).view(param.shape), param.requires_grad)
        self.grad: Tensor | None = None
        self.ready, self.fetched, self.returned = (runtime.new_event() for _ in range(3))
        self.begun = 0.0
        # Which gradient was fetched, and how often it and the weights had been written to; None after the step.
        self.of: tuple[weakref.ref[Tensor], int, int] | None = None

    def fits(self, param: Tensor, runtime: Runtime) -> bool:
        """Whether it still is a twin of a parameter, which others may have reshaped, converted or moved."""
        own = self.param
        return own.shape == param.shape and own.dtype == param.dtype and self.device == runtime.device_of(param)

    def has(self, param: Tensor) -> bool:
        """Whether the gradient and the weights as they are now were fetched."""
        if self.of is None or param.grad is None:
            return False
        grad, of_grad, of_param = self.of
        return grad() is param.grad and of_grad == param.grad._version and of_param == param._version

    def grad_bytes(self, grad: Tensor) -> Tensor:
        """Where a gradient goes, as bytes."""
        if self.grad is None or self.grad.dtype != grad.dtype:
            size = grad.numel() * grad.element_size()
            self.grad = self.runtime.pinned(max(1, size))[:size].view(grad.dtype).view(grad.shape)
        return _bytes(self.grad)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


class HostSide:
    """An optimizer's twin on the host, one thread that steps it, and the streams in between.

    Args:
        make: Makes an optimizer of the same kind from param groups.
    """

    def __init__(self, make: Callable[[list[dict[str, Any]]], Inner]) -> None:
        self._make = make
        self._inner: Inner | None = None
        self._is_mirrored = False
        self._stands_for: dict[Tensor, Tensor] = {}
        self._state: dict[Tensor, Any] = {}
        self._twins: dict[Tensor, _Twin] = {}
        self._streams: dict[torch.device, tuple[Any, Any]] = {}  # to the host, and back
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fusedopt-host")
        self._pending: list[Future[Health]] = []
        self._busy: set[Tensor] = set()  # what the thread may be stepping
        self._sent: list[_Twin] = []
        self.trace: list[Span] | None = None  # filled if it is a list

    def mirror(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Inner:
        """The optimizer on the host, with the param groups' options as they are and their states."""
        inner = self._inner
        if (
            inner is not None
            and self._is_mirrored
            and self._state is state
            and len(inner.param_groups) == len(param_groups)
        ):
            return inner
        self.settle()  # what the thread still steps goes by what there was
        groups = []
        for group in param_groups:
            params = [self._twin_of(group, param) for param in group["params"]]
            groups.append({**group, "params": params, "step_device": None, "state_device": None, "backend": "auto"})
        if self._inner is None:
            self._inner = self._make(groups)
        with self._inner._lock:
            listed = zip(param_groups, groups)
            self._stands_for = {p: twin for group, mine in listed for p, twin in zip(group["params"], mine["params"])}
            self._inner.param_groups = groups
            self._state = state
            for param, twin in self._pairs():
                held = state.get(param)  # one dict, which both see
                if held:
                    self._inner.state[twin] = held
                else:
                    self._inner.state.pop(twin, None)
            listed_twins = set(self._stands_for.values())
            for twin in [twin for twin in self._inner.state if twin not in listed_twins]:
                del self._inner.state[twin]
        for param in [param for param in self._twins if param not in self._stands_for]:
            self._drop(param)
        self._is_mirrored = True
        return self._inner

    def forget_options(self) -> None:
        """Has the next step look at the param groups anew, which may have been mended since one was refused."""
        self._is_mirrored = False

    def split(
        self, param_groups: list[dict[str, Any]], listed: Sequence[list[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Positions by group of what is stepped on the host, and of the rest."""
        found: tuple[list[list[int]], list[list[int]]] = ([], [])
        for group, places in zip(param_groups, listed):
            params = group["params"]
            found[0].append([i for i in places if self._stands_for[params[i]] is not params[i]])
            found[1].append([i for i in places if self._stands_for[params[i]] is params[i]])
        return found

    def _pairs(self, params: Iterable[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Parameters and those that stand for them on the host; one that is there stands for itself."""
        return [(param, self._stands_for[param]) for param in (self._stands_for if params is None else params)]

    def _twin_of(self, group: dict[str, Any], param: Tensor) -> Tensor:
        runtime = runtime_of(param)
        if runtime is None or group["step_device"] != "cpu":
            return param
        twin = self._twins.get(param)
        if twin is not None and not twin.fits(param, runtime):
            self._drop(param)
            twin = None
        if twin is None:
            twin = self._twins[param] = _Twin(param, runtime)
            if twin.device not in self._streams:
                self._streams[twin.device] = (runtime.new_stream(twin.device), runtime.new_stream(twin.device))
        return twin.param

    def _drop(self, param: Tensor) -> None:
        """Lets go of a parameter's twin, once nothing is copied to or from its memory any more."""
        twin = self._twins.pop(param)
        for event in (twin.fetched, twin.returned):
            twin.runtime.synchronize(event)

    # ---- copies ------------------------------------------------------------------------------------

    def fetch(self, params: Iterable[Tensor]) -> None:
        """Has gradients, and weights as they are now, copied to the host, unless they are there or on the way."""
        listed = list(params)
        if any(param in self._busy for param in listed):  # a backward pass has raised, and here is the next
            self.settle()
            self._bring_back()
        for param in listed:
            twin = self._twins[param]
            if param.grad is None or twin.has(param):
                continue
            runtime = twin.runtime
            twin.of = (weakref.ref(param.grad), param.grad._version, param._version)
            grad = param.grad.detach()
            grad = (grad.to_dense() if grad.layout != torch.strided else grad).contiguous()
            twin.begun = time.perf_counter()
            inward, current = self._streams[twin.device][0], runtime.current_stream(twin.device)
            runtime.record(twin.ready, current)
            runtime.wait(inward, twin.ready)
            runtime.copy(twin.bytes, _bytes(param), inward)
            runtime.copy(twin.grad_bytes(grad), _bytes(grad), inward)
            runtime.keep(grad, inward)
            runtime.record(twin.fetched, inward)

    def _await(self, params: Iterable[Tensor]) -> None:
        """Lets the host go on when it has them."""
        for param in params:
            twin = self._twins[param]
            twin.runtime.synchronize(twin.fetched)
            twin.param.grad = twin.grad
            self._note("copy in", twin.begun)

    def _send(self, params: Iterable[Tensor]) -> None:
        """Has weights copied back, behind all that has read them on the device."""
        for param in params:
            twin = self._twins[param]
            twin.param.grad = twin.of = None
            outward = self._streams[twin.device][1]
            twin.runtime.wait(outward, twin.ready)
            twin.runtime.copy(_bytes(param), twin.bytes, outward)
            twin.runtime.record(twin.returned, outward)
            self._sent.append(twin)

    def _note(self, what: str, begin: float) -> None:
        if self.trace is not None:
            self.trace.append(Span(what, begin, time.perf_counter()))

    # ---- steps -------------------------------------------------------------------------------------

    def step_some(self, inner: Inner, params: list[Tensor], listed: list[list[int]], multiplier: float) -> None:
        """Has the thread step parameters, gradients times a number; `join` tells what was counted."""
        self.fetch(params)
        torch.autograd.graph.increment_version(params)

        def run() -> Health:
            self._await(params)
            begin = time.perf_counter()
            try:
                with inner._lock:
                    return inner._step_some(listed, Scaling(), multiplier)[0]
            finally:
                self._note("step", begin)
                for param, twin in self._pairs(params):
                    if inner.state.get(twin):
                        self._state[param] = inner.state[twin]
                self._send(params)

        self._busy.update(params)
        self._pending.append(self._thread.submit(run))

    def square_sums(self, inner: Inner, params: list[Tensor], listed: list[list[int]]) -> list[Tensor]:
        """The sums of squares of parameters' gradients."""
        self.fetch(params)
        self._await(params)
        with inner._lock:
            return inner._square_sums(listed)

    def check(self, inner: Inner, params: Iterable[Tensor], listed: list[list[int]]) -> None:
        """Raises ValueError if something cannot be stepped; makes missing states."""
        for param in params:
            twin = self._twins[param]
            if param.grad is not None:
                twin.grad_bytes(param.grad)
                twin.param.grad = twin.grad
        with inner._lock:
            inner._gather(listed)

    def settle(self) -> None:
        """Waits for the thread."""
        wait(self._pending)

    def join(self) -> Health:
        """Waits for the thread, and lets each device's stream wait for its weights; what the thread has counted."""
        counts: Health = {}
        self._is_mirrored = False
        self.settle()
        pending, self._pending = self._pending, []
        try:
            for future in pending:
                counts |= future.result()
        finally:
            self._bring_back()
        return counts

    def _bring_back(self) -> None:
        """Lets each device's stream wait for the weights that are on their way to it; the thread is at rest."""
        for twin in self._sent:
            twin.runtime.wait(twin.runtime.current_stream(twin.device), twin.returned)
        self._sent = []
        self._busy.clear()


def windows(param_groups: list[dict[str, Any]], listed: Sequence[list[int]]) -> list[list[list[int]]]:
    """The same positions by group, some at a time."""
    found: list[list[list[int]]] = []
    held = _WINDOW_NUMEL
    for index, (group, places) in enumerate(zip(param_groups, listed)):
        for position in places:
            if held >= _WINDOW_NUMEL:
                found.append([[] for _ in param_groups])
                held = 0
            found[-1][index].append(position)
            held += group["params"][position].numel()
    return found
