"""Steps that sum over shards: in rounds, in which all of them tell together what they have found.

So ranks meet once in a round, however many parameters and backends take part. Which rounds a step goes through, and
what it sums in each, hangs on what all ranks have in common alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from ..reference.asking import Asking, Result
from .base import Asked, Spread, Summing


def over_shards(asking: Asking[Result], spread: Spread) -> Summing[Result]:
    """The step of a parameter that is spread over ranks."""
    totals: Sequence[Tensor] | None = None
    try:
        while True:
            totals = yield [(spread, over, numbers) for over, numbers in asking.send(totals)]  # type: ignore[arg-type]
    except StopIteration as end:
        return end.value


def together(steps: Sequence[Summing[Result]]) -> Summing[list[Result]]:
    """Steps as one, whose rounds have what each of them asks, in order. Returns what each of them does."""
    results: dict[int, Result] = {}
    totals: dict[int, Sequence[Tensor] | None] = dict.fromkeys(range(len(steps)))
    while totals:
        asked: list[Asked] = []
        counts = {}
        for i, found in totals.items():
            try:
                wanted = steps[i].send(found)  # type: ignore[arg-type]
            except StopIteration as end:
                results[i] = end.value
                continue
            asked += wanted
            counts[i] = len(wanted)
        if not counts:
            break
        sums = iter((yield asked))
        totals = {i: list(islice(sums, count)) for i, count in counts.items()}
    return [results[i] for i in range(len(steps))]


def taken(step: Summing[Result]) -> Result:
    """The result of a step: meets the other ranks in each round in which something is asked."""
    totals: Sequence[Tensor] | None = None
    try:
        while True:
            asked = step.send(totals)  # type: ignore[arg-type]
            totals = asked[0][0].sums(asked) if asked else []
    except StopIteration as end:
        return end.value
