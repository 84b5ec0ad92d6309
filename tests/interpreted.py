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


@pytest.fixture(scope="session")
def _quick() -> Iterator[None]:
    """Functions that kernels call patch the language anew with every call, which takes longer than most of them.

    For ours the kernel has done so. What Triton's own patch stays patched, so once is enough for each of their modules.
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
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
