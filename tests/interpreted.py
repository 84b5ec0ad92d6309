"""The Triton kernels on the CPU: Triton's interpreter runs them on CPU tensors.

It is asked for by an environment variable before triton is imported, which `conftest.py` sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import make_params, shifted

from fusedopt.backends.triton import is_interpreting, missing


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """Types of blocks, and what tensors of each have in common, are made once: they took a third of the time."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    types: dict[Any, Any] = {}
    describe, make, unwrap = core.block_type.__init__, core.block_type.__new__, core._unwrap_if_constexpr
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        key = (element_ty.name, *map(unwrap, shape))
        if key not in types:
            types[key] = made = make(cls)
            describe(made, element_ty, shape)
            made.of_tensors = core.constexpr(made.numel), core.tuple([core.constexpr(size) for size in made.shape])
        return types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors if type.is_block() else scalar

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind not in holds:
            holds[kind] = issubclass(kind, (core.constexpr, core.tuple, list, tuple))
        return unwrap(value) if holds[kind] else value

    holds: dict[type, bool] = {}
    scalar = core.constexpr(1), core.tuple([])
    found: dict[str, Any] = {}
    numpy_type = interpreter._get_np_dtype

    def get_np_dtype(type: Any) -> Any:
        if type.name not in found:
            found[type.name] = numpy_type(type)
        return found[type.name]

    patch.setattr(core.block_type, "__new__", new)
    patch.setattr(core.block_type, "__init__", lambda *_: None)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(core, "_unwrap_if_constexpr", unwrap_if_constexpr)
    patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcast_impl_value)
    patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)


def hasten(patch: pytest.MonkeyPatch) -> None:
    """What the interpreter does anew with every operation it does once.

    Functions that kernels call patch the language with every call, which takes longer than most of them. For ours the
    kernel has done so. What Triton's own patch stays patched, so once is enough for each of their modules.
    """
    from triton.runtime import interpreter

    patched = interpreter.InterpretedFunction.__call__
    done: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("fusedopt.") or module in done:
            return self.rewrite()(*args, **kwargs)
        if module.startswith("triton.language."):
            done.add(module)
        return patched(self, *args, **kwargs)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)
    _remember_types(patch)


@pytest.fixture(scope="session")
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        yield


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> None:
    """backend="triton" steps CPU tensors."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    if not is_interpreting():
        pytest.skip("TRITON_INTERPRET=1 is not set, because there is a GPU")
    request.getfixturevalue("_quick")


def offset_params(dtype: torch.dtype, shapes: list[Any]) -> list[torch.nn.Parameter]:
    """The last shape once more, one element behind an aligned address."""
    *params, last = make_params([*shapes, shapes[-1]], dtype)
    return [*params, shifted(last)]
