"""Whether a batch of decodes is worth running as two halves: found by trying, and tried again now and then.

          stalls take > 20 % of the time             the trial was 5 % faster
    whole ──────────────────────────────► 8 halves ───────────────────────────► halves
      ▲                                       │ it was not                        │ every 200 steps
      └───────────────────────────────────────┴───────────── 8 whole ◄────────────┘

Halves read all weights twice, so they pay only where much is waited for; how much they hide depends on disk and model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from memlane.scheduler import StepPlan

__all__ = ["DecodeSplit"]

logger = logging.getLogger(__name__)

MIN_SEQUENCES = 32  # halves of fewer than 16 rows take other matrix kernels, which round differently
MIN_STALL_SHARE = 0.2
MARGIN = 0.05
TRIAL_STEPS = 8
SETTLED_STEPS = 200
_MEMORY = 16  # steps over which averages run


class DecodeSplit:
    """Decides how decode steps run by timing them. One thread owns it. Shorter batches neither count nor are split."""

    def __init__(self, stalled: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> None:
        """stalled: seconds waited for rows so far, all tables together."""
        self._stalled, self._clock = stalled, clock
        self._split = False  # the way that is settled; a trial goes the other
        self._usual = _RunningMean()  # seconds a sequence, the settled way
        self._stall_share = _RunningMean()  # of the time of such steps
        self._trial: list[float] | None = None  # seconds a sequence, the other way
        self._rest = _MEMORY  # steps before the next trial

    def wanted(self, sequences: int) -> bool:
        """Whether the next step, of so many sequences, is to run as two halves."""
        return sequences >= MIN_SEQUENCES and self._split is (self._trial is None)

    @contextmanager
    def watch(self, plan: StepPlan) -> Iterator[None]:
        """Put around a step that runs as `wanted` says. Steps that fail, or are no decode batches, do not count."""
        if not plan.all_single or plan.singles < MIN_SEQUENCES:
            yield
            return
        stalled, started = self._stalled(), self._clock()
        yield
        seconds = self._clock() - started
        self._note(seconds / plan.singles, (self._stalled() - stalled) / seconds)

    def _note(self, pace: float, stall_share: float) -> None:
        if self._trial is not None:
            self._trial.append(pace)
            if len(self._trial) == TRIAL_STEPS:
                self._judge(fmean(self._trial))
            return
        self._usual.add(pace)
        self._stall_share.add(stall_share)
        self._rest -= 1
        if self._rest <= 0 and (self._split or self._stall_share.value > MIN_STALL_SHARE):
            self._trial = []

    def _judge(self, tried: float) -> None:
        """Go the way of the trial if it was clearly faster."""
        usual = self._usual.value
        if tried < (1 - MARGIN) * usual:
            self._split = not self._split
            way = "in two halves" if self._split else "whole"
            logger.info(
                "large decode batches run %s: %.0f µs a sequence, not %.0f", way, 1e6 * tried, 1e6 * usual
            )
            self._usual, self._stall_share = _RunningMean(), _RunningMean()
        self._trial = None
        self._rest = SETTLED_STEPS


class _RunningMean:
    """The mean of few values, then one that forgets exponentially."""

    def __init__(self) -> None:
        self.value = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, _MEMORY)
        self.value += (value - self.value) / self._count
