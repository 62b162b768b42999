"""Steps of single tokens, each padded to one of few batch sizes, so that a GPU replays them as graphs.

    sequences   1  2  3  4  5 ...  8  9 ... 12  13 ... 16  17 ... 24  25 ... 32  33 ... 48  49 ... 64  ...
    batch size  1  2    4         8        12         16         24         32         48         64

The rows that fill a batch up repeat its last sequence and write to the sink, so they ask for no row that is not asked for
anyway. Without a capture the same padded batches run eagerly: the same kernels, the same tokens.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.models import Transformer
from memlane.models.attention import Attention
from memlane.models.pieces import Pieces
from memlane.runner.attention.protocol import AttentionBackend
from memlane.runner.captured import Captured, Cut, Eager, Part, Whole
from memlane.runner.decode_batch import DecodeBatch, DecodeBatches
from memlane.runner.graphs import Capture
from memlane.runner.kv import KVCache
from memlane.runner.overlap import MIN_SEQUENCES
from memlane.runner.sampler import Greedy
from memlane.scheduler import StepPlan
from memlane.tables import RowReadError

__all__ = ["DecodeGraphs", "ladder"]

logger = logging.getLogger(__name__)

MOST = 512  # sequences of a batch that is captured: beyond, launching takes less time than computing
MIN_HALVES = MIN_SEQUENCES  # rows of a batch that may be worth reading all weights twice for


def ladder(most: int) -> list[int]:
    """Batch sizes for up to `most` sequences, ascending: 1, 2, 4, 8, then two for each doubling, and `most` itself."""
    most = min(most, MOST)
    sizes = {1, 2, 4, 8, most}
    size = 8
    while size < most:
        sizes |= {size + size // 2, 2 * size}
        size *= 2
    return sorted(n for n in sizes if n <= most)


class _Key(NamedTuple):
    """Rows of a batch, positions that the longest of them may have, and whether it runs as two halves."""

    rows: int
    longest: int
    halves: bool


class _Set(NamedTuple):
    """What runs batches of one key, over these parts of it."""

    captured: Captured
    parts: list[DecodeBatch]


class DecodeGraphs:
    """Runs decode steps of up to `sizes[-1]` sequences. One thread owns it, and uses one stream."""

    def __init__(
        self,
        transformer: Transformer,
        kv: KVCache,
        backend: AttentionBackend,
        batches: DecodeBatches,
        capture: Capture | None,
        *,
        cut: bool = False,
        halves: bool = False,
        split: Callable[[int], bool] | None = None,
    ) -> None:
        """capture: how graphs are made; None to run eagerly. cut: one graph a piece, for tables that need the host in
        between. halves: larger batches run as two halves in turns; where `split` is given, those of which it says so, of
        so many sequences, each time. Captures nothing yet."""
        self.transformer, self.kv, self.backend, self.batches = transformer, kv, backend, batches
        self.cut, self.halves, self._split = cut, halves, split
        self.sizes = ladder(batches.rows)
        self._capture = capture
        device = kv.layers[0].device
        # Two at least: a compiler would take a single one for a shape of its own.
        self._previous = torch.zeros(max(2, batches.rows), dtype=torch.int64, device=device)
        self._logits = torch.empty(self.sizes[-1], transformer.config.vocab_size, device=device)
        self._choices = torch.zeros_like(self._previous)
        self._sets: dict[_Key, _Set] = {}
        self._chosen = False  # whether the latest run came to its end, so that choices are of its logits

    def takes(self, plan: StepPlan) -> bool:
        """Whether it is a step of single tokens, and not too many."""
        return plan.all_single and plan.singles <= self.sizes[-1]

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Capture every size now, for sequences as short as they come; others are captured when they are needed."""
        if self._capture is None:
            return
        started = time.perf_counter()
        for rows in reversed(self.sizes):  # what the largest left in the pool suffices for the others
            longest = self.backend.bound(1, self.batches.max_length)
            ways = {self._in_halves(rows), self._in_halves(rows) and self._split is None}
            try:
                for halves in sorted(ways):
                    self._set(_Key(rows, longest, halves))
            except RowReadError as error:
                logger.warning("decode batches of %d are not captured yet: %s", rows, error)
        logger.info(
            "decode batches of %s captured in %.1f s, %.1f MiB",
            ", ".join(map(str, self.sizes)),
            time.perf_counter() - started,
            self._capture.nbytes / 2**20,
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan, previous: Tensor | None = None) -> Tensor:
        """Compute a plan that it takes, and write its KV -> logits fp32 [sequences, vocab], valid until the next run.

        previous: tokens int64 [m] that the step before sampled, on the device. Raises RowReadError, with the plan's
        tokens; the same or a smaller plan may then be run again.
        """
        live = plan.singles
        rows = self.sizes[bisect_left(self.sizes, live)]
        longest = self.batches.fill(plan, rows)
        if previous is not None and previous.data_ptr() != self._previous.data_ptr():
            self._previous[: len(previous)].copy_(previous)
        self._chosen = False
        try:
            halves = self._in_halves(rows) and (self._split is None or self._split(live))
            key = _Key(rows, self.backend.bound(longest, self.batches.max_length), halves)
            found = self._set(key)
            for part in found.parts:
                self.backend.prepare(part)
            logits = found.captured.run()[:live]
            self._chosen = True
            return logits
        except RowReadError as error:
            tokens = sorted({min(token, live - 1) for token in error.tokens})
            raise RowReadError(error.table, error.rows, error.reason, tokens) from None

    def greedy(self, logits: Tensor) -> Greedy | None:
        """What the run that these logits are the result of chose greedily; None if they are of something else.

        Valid until the next run, to which its tokens may be given as `previous`.
        """
        if not self._chosen or logits.data_ptr() != self._logits.data_ptr():
            return None
        return Greedy(self._previous[: len(logits)], self._choices[: len(logits)])

    def _in_halves(self, rows: int) -> bool:
        """Whether batches of so many rows may run as two halves."""
        return self.halves and rows >= MIN_HALVES

    def _set(self, key: _Key) -> _Set:
        """What runs batches of that key, captured now if it has not been."""
        if key not in self._sets:
            if key.halves:
                static = list(self.batches.halves(key.rows, key.longest))
            else:
                static = [self.batches.batch(key.rows, key.longest)]
            parts, begin = [], 0
            for rows in static:
                attention = self.backend.decode(self.kv, rows)
                self.backend.prepare(rows)
                parts.append(Part(begin, partial(self._pieces, rows, attention)))
                begin += rows.n
            # To capture is to run once, which chooses tokens in place of those that this very step may still need.
            previous = self._previous.clone()
            try:
                self._sets[key] = _Set(self._captured(key, parts), static)
            finally:
                self._previous.copy_(previous)
        return self._sets[key]

    def _captured(self, key: _Key, parts: Sequence[Part]) -> Captured:
        if self._capture is not None:
            try:
                return (Cut if self.cut else Whole)(self._capture, parts, self._tail)
            except RuntimeError as error:  # torch's own, for whatever CUDA minds
                logger.warning(
                    "decode batches of %d (to %d positions) run without graphs, they could not be captured: %s",
                    key.rows,
                    key.longest,
                    error,
                )
        return Eager(parts, self._tail)

    def _pieces(self, rows: DecodeBatch, attention: Attention) -> Pieces:
        return (
            yield from self.transformer.run(
                rows.token_ids, rows.positions, attention, self._previous, rows.live
            )
        )

    def _tail(self, results: Sequence[Tensor]) -> Tensor:
        """Hidden states of all parts -> logits, where they always lie."""
        hidden = torch.cat(list(results)) if len(results) > 1 else results[0]
        n = len(hidden)
        logits = self.transformer.logits(hidden, out=self._logits[:n])
        self.transformer.greedy(logits, self._previous[:n], self._choices[:n])
        return logits
