"""What one step computes: chosen by the scheduler, carried out by the runner."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from memlane.scheduler.sequence import Sequence

__all__ = ["Chunk", "StepPlan"]


class Chunk(NamedTuple):
    """`length` tokens of one sequence from `start` on. A decode is a chunk of one token.

    `samples`: the chunk reaches the sequence's last token, so the next one is sampled from its logits.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool


class StepPlan(NamedTuple):
    """Single tokens first, then longer chunks:  | d | d | d | prefill ...... | prefill .... |

    The runner packs the tokens of all chunks into one dimension in this order. `singles` counts the chunks of
    one token at the front. May be empty.
    """

    chunks: list[Chunk]
    singles: int

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def all_single(self) -> bool:
        """Whether it is a batch of decodes: no chunk has more than one token."""
        return self.singles == len(self.chunks)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that belong to prompts: those computed again after a preemption count again."""
        return sum(
            max(0, min(chunk.start + chunk.length, chunk.sequence.prompt_length) - chunk.start)
            for chunk in self.chunks
        )

    def owners(self, tokens: SequenceOf[int]) -> list[Sequence]:
        """The sequences to which these of the step's tokens belong; all of them where no token is named."""
        wanted = set(tokens)
        owners = []
        begin = 0
        for chunk in self.chunks:
            if not wanted or not wanted.isdisjoint(range(begin, begin + chunk.length)):
                owners.append(chunk.sequence)
            begin += chunk.length
        return owners

    def without(self, sequences: set[Sequence]) -> StepPlan:
        """The same step with these sequences left out."""
        return make_plan([chunk for chunk in self.chunks if chunk.sequence not in sequences])


def make_plan(chunks: list[Chunk]) -> StepPlan:
    """A plan of these chunks, in plan order."""
    singles = [chunk for chunk in chunks if chunk.length == 1]
    if len(singles) == len(chunks):
        return StepPlan(chunks, len(chunks))
    return StepPlan(singles + [chunk for chunk in chunks if chunk.length > 1], len(singles))
