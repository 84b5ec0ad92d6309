"""Steps that ask for sums over a whole parameter, of which only a shard may be here.

Such a step is a generator. It yields rounds: in each, lists what numbers here add up to, and over what each sum goes,
"rows", "columns" or "all", and is sent the sums over the whole. Where everything is here, those are the same numbers.
Rounds of several parameters are asked together, so a step goes through as many as the others of its kind.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")
Asking = Generator["list[tuple[str, Tensor]]", "Sequence[Tensor]", Result]


@dataclass(frozen=True)
class Extent:
    """How large a whole parameter is: its elements, and the rows and columns of a matrix of it."""

    numel: int
    rows: int = 0
    columns: int = 0


def all_here(asking: Asking[Result]) -> Result:
    """The result of a step, if everything is here."""
    totals: Sequence[Tensor] | None = None
    try:
        while True:
            totals = [numbers for _, numbers in asking.send(totals)]  # type: ignore[arg-type]
    except StopIteration as end:
        return end.value
