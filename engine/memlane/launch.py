"""A step that the device was given and whose tokens the host has not seen yet.

With lookahead the host plans a step, and gives it to the device, while the one before it runs:

    device  │ step 1 ........................│ step 2 ................................│ step 3 ........
    host    │ plan 2 │ launch 2 │ wait ......│ collect 1 │ book 2 │ plan 3 │ launch 3 │ wait │ collect 2
                                                                   one call of Engine.step: └──────────── ends with book

    launch    the model over the plan, and the sampler over its logits; takes tokens that are still expected from the
              step before, on the device
    collect   tokens in place of those expected; deltas; ends of sequences
    book      its tokens count as computed; its sequences expect one more

Without lookahead a step is collected as soon as it is booked, and nothing is ever expected while a step is planned.

How a sequence ends decides what lookahead costs. Its length is known beforehand: nothing is planned past it. A stop
token is not: one token more may be computed, which nobody gets to see. Until that step is collected the sequence keeps
its blocks, as one does that is aborted; one that fails gives them up at once, and they are cleared. Whoever gets them next
writes and reads them in a later launch, which the stream orders behind the clearing, and that behind the step.
"""

from __future__ import annotations

from typing import NamedTuple

from memlane.runner import Pending, Runner
from memlane.runner.penalties import reads_history
from memlane.runner.sampler import PendingGreedy, launch
from memlane.scheduler import Sequence, StepPlan

__all__ = ["Launch"]


class Launch(NamedTuple):
    """The plan, and a result on its way for each of its chunks; meaningless but for `finite` where one does not sample."""

    plan: StepPlan
    pending: Pending | PendingGreedy

    @classmethod
    def start(cls, runner: Runner, plan: StepPlan, previous: Launch | None) -> Launch:
        """Give the plan, which may be empty, to the device. `previous`: the step whose tokens are still expected.

        Raises RowReadError; nothing is on its way then.
        """
        if not plan.chunks:
            return cls(plan, Pending.nothing())
        logits = runner.run(plan, previous=None if previous is None else previous.pending.tokens)
        sequences = [chunk.sequence if chunk.samples else None for chunk in plan.chunks]
        return cls(plan, launch(logits, sequences, runner.greedy(logits)))

    def computes(self, sequence: Sequence) -> bool:
        return any(chunk.sequence is sequence for chunk in self.plan.chunks)

    @property
    def holds_up(self) -> bool:
        """Whether the next step cannot be sampled before this one is collected: penalties need to know its tokens."""
        return any(chunk.samples and reads_history(chunk.sequence) for chunk in self.plan.chunks)
