"""A step as two halves that hide each other's reads: where to cut, and how to drive them.

    compute   A to layer 1 | B to layer 1 | A to layer 2 | B to layer 2 | A to the end | B to the end
    reads                    A A A A A      B B B B B      A A A A A      B B B B B

Each half stops at every memory layer, once its rows are asked for, and while they are read the other half computes.
A is always a memory layer ahead, so the cut may lie inside a prompt: B attends to keys and values that A has written.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memlane.models.pieces import Pieces, advance
from memlane.scheduler import Chunk, StepPlan

__all__ = ["MIN_TOKENS", "Halves", "alternate", "cut"]

# Matrix products pack their weights once a call. Where rows lie in RAM and nothing is hidden, halves of 64 tokens cost
# 20 % of a step, of 128 between 1 and 9 %, of 256 and more at most 6 %.
MIN_TOKENS = 128


class Halves(NamedTuple):
    """A plan in two. The tokens of the second follow those of the first in the plan's flat order."""

    first: StepPlan
    second: StepPlan


def cut(plan: StepPlan, at: int) -> Halves:
    """The plan's first `at` tokens and the others, 0 < at < plan.tokens. A chunk that is cut samples from its end alone."""
    first: list[Chunk] = []
    second: list[Chunk] = []
    begin = 0
    for chunk in plan.chunks:
        inside = max(0, min(at - begin, chunk.length))
        if inside == chunk.length:
            first.append(chunk)
        elif inside == 0:
            second.append(chunk)
        else:
            first.append(chunk._replace(length=inside, samples=False))
            second.append(chunk._replace(start=chunk.start + inside, length=chunk.length - inside))
        begin += chunk.length
    singles = min(at, plan.singles)
    return Halves(StepPlan(first, singles), StepPlan(second, plan.singles - singles))


def alternate(first: Pieces, second: Pieces) -> tuple[Tensor, Tensor]:
    """Drive both to their ends, piece by piece in turns; they stop equally often. If one fails, the other is closed."""
    try:
        while True:
            ahead, behind = advance(first), advance(second)
            assert (ahead is None) is (behind is None), "the halves of a step stop at the same layers"
            if ahead is not None and behind is not None:
                return ahead, behind
    finally:
        try:
            first.close()
        finally:
            second.close()
