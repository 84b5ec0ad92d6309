"""Steps that ask for sums over a whole parameter, of which only a shard may be here.

Such a step is a generator. It yields what the numbers here add up to and over what the sum goes, "rows", "columns" or
"all", and is sent the sum over the whole. Where everything is here, that is the same number.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")
Asking = Generator["tuple[str, Tensor]", Tensor, Result]


@dataclass(frozen=True)
class Extent:
    """How large a whole parameter is: its elements, and the rows and columns of a matrix of it."""

    numel: int
    rows: int = 0
    columns: int = 0


def all_here(asking: Asking[Result]) -> Result:
    """The result of a step, if everything is here."""
    total: Tensor | None = None
    try:
        while True:
            _, total = asking.send(total)  # type: ignore[arg-type]
    except StopIteration as end:
        return end.value
