"""When decode batches are split: a machine simulated with a fake clock."""

from __future__ import annotations

import pytest

from memlane.request import SamplingParams
from memlane.runner import DecodeSplit
from memlane.runner.overlap import MIN_SEQUENCES, SETTLED_STEPS, TRIAL_STEPS
from memlane.scheduler import Chunk, Sequence, StepPlan


def decodes(count: int) -> StepPlan:
    sequence = Sequence("a", [1], SamplingParams(), max_length=2)
    return StepPlan([Chunk(sequence, 0, 1, True)] * count, count)


class Machine:
    """Steps cost `whole` or `halves` seconds a sequence, of which `stall` (whole) or nothing (halves) are waits."""

    def __init__(self, whole: float, halves: float, stall: float) -> None:
        self.whole, self.halves, self.stall = whole, halves, stall
        self.now = self.stalled = 0.0
        self.split = DecodeSplit(lambda: self.stalled, lambda: self.now)

    def run(self, steps: int, sequences: int = 40) -> list[bool]:
        """Which of so many steps ran as halves."""
        ways = []
        for _ in range(steps):
            ways.append(self.split.wanted(sequences))
            with self.split.watch(decodes(sequences)):
                self.now += sequences * (self.halves if ways[-1] else self.whole)
                self.stalled += 0.0 if ways[-1] else sequences * self.stall
        return ways


def test_splits_where_much_is_waited_for_and_halves_are_faster() -> None:
    m = Machine(whole=1.0, halves=0.7, stall=0.4)
    ways = m.run(100)
    assert not any(ways[:16])
    assert all(ways[16:])


def test_does_not_even_try_where_little_is_waited_for() -> None:
    assert not any(Machine(whole=1.0, halves=0.5, stall=0.19).run(2 * SETTLED_STEPS))


def test_gives_up_where_halves_are_no_faster_and_tries_again_later() -> None:
    m = Machine(whole=1.0, halves=0.96, stall=0.5)
    ways = m.run(16 + TRIAL_STEPS + SETTLED_STEPS)
    assert [i for i, split in enumerate(ways) if split] == list(range(16, 16 + TRIAL_STEPS))
    m.halves = 0.9
    assert all(m.run(50))


def test_goes_back_to_whole_batches_when_rows_are_cached() -> None:
    m = Machine(whole=1.0, halves=0.7, stall=0.4)
    m.run(100)
    m.whole, m.stall = 0.6, 0.0
    ways = m.run(SETTLED_STEPS + 300)
    assert ways.index(False) <= SETTLED_STEPS
    assert not any(ways[ways.index(False) :])


def test_stays_with_halves_while_they_are_faster() -> None:
    m = Machine(whole=1.0, halves=0.7, stall=0.4)
    m.run(16 + TRIAL_STEPS)
    ways = m.run(5 * (SETTLED_STEPS + TRIAL_STEPS))
    assert ways.count(False) == 5 * TRIAL_STEPS


def test_small_batches_prompts_and_failed_steps_do_not_count() -> None:
    m = Machine(whole=1.0, halves=0.7, stall=0.9)
    assert not any(m.run(100, sequences=MIN_SEQUENCES - 1))
    mixed = decodes(40)._replace(singles=39)
    for _ in range(100):
        with m.split.watch(mixed):
            m.now += 1
            m.stalled += 1
        with pytest.raises(RuntimeError), m.split.watch(decodes(40)):
            raise RuntimeError
    assert not any(m.run(16))
    assert m.split.wanted(40)
    assert not m.split.wanted(MIN_SEQUENCES - 1)
