"""Filling a cache's free slots in the background: a little at a time, between and during the steps of the engine."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlane.tables.cache import RowCache
from memlane.tables.errors import RowReadError
from memlane.tables.source import Read

__all__ = ["Warmer"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20  # of rows under way at once
_PIECES = 4  # a report each


class _Chunk(NamedTuple):
    rows: NDArray[np.int64]
    slots: NDArray[np.int32]
    read: Read
    pinned: bool


class Warmer:
    """Brings the hottest rows into free slots, in the order of the table, so that neighbours are read together.

    It never evicts a row: where requests have filled the cache meanwhile, it is done. Rows that requests bring in
    before it does are theirs. Rows that cannot be read are logged and left out.
    """

    def __init__(self, table: str, cache: RowCache, ids: NDArray[np.int64], pin: int = 0) -> None:
        """ids: hottest first, perhaps with repetitions. pin: the first so many are never evicted."""
        self._table, self._cache = table, cache
        _, first = np.unique(ids, return_index=True)
        self._ids = ids[np.sort(first)][: cache.slots - cache.index.used]
        self._pinned = np.sort(self._ids[:pin])
        self._order = np.concatenate([self._pinned, np.sort(self._ids[pin:])])
        self._per_chunk = max(1, _CHUNK_BYTES // cache.stride)
        self._next = 0
        self._chunk: _Chunk | None = None
        self._began = time.monotonic()
        self.warmed = 0

    @property
    def left(self) -> int:
        """Rows still to be read."""
        return len(self._order) - self._next + (0 if self._chunk is None else len(self._chunk.rows))

    def missing(self) -> NDArray[np.int64]:
        """The rows still to be read, hottest first."""
        rows: NDArray[np.int64] = self._ids[np.isin(self._ids, self._order[len(self._order) - self.left :])]
        return rows

    def advance(self, patience: float) -> bool:
        """Takes in rows that have come, asks for the next ones; waits `patience` seconds at most for the former.

        Returns whether there is more to do.
        """
        until = time.monotonic() + patience
        while self._chunk is not None or self._start():
            assert self._chunk is not None
            if not self._chunk.read.wait(max(0.0, until - time.monotonic())):
                return True
            self._take_in(self._chunk)
            if time.monotonic() >= until and self._start():
                return True  # the next rows are on their way meanwhile
        # Rows were adopted in the order of the table; from now on the least hot go first.
        self._cache.index.rank_last(self._ids[len(self._pinned) :])
        return False

    def _start(self) -> bool:
        """Asks for the next rows; False where there are none, or no slots."""
        pinned = self._next < len(self._pinned)
        end = len(self._pinned) if pinned else len(self._order)
        rows = self._order[self._next : min(self._next + self._per_chunk, end)]
        slots = self._cache.index.reserve(len(rows))
        if not len(slots):
            self._next = len(self._order)
            return False
        rows = rows[: len(slots)]
        try:
            read = self._cache.source.start(rows, slots, self._cache.memory, background=True)
        except BaseException:
            self._cache.source.drain()  # the read may have begun all the same
            self._cache.index.give_back(slots)
            raise
        self._next += len(rows)
        self._chunk = _Chunk(rows, slots, read, pinned)
        return True

    def _take_in(self, chunk: _Chunk) -> None:
        """Adopts rows that have come."""
        rows, slots, read, pinned = chunk
        good = np.ones(len(rows), bool)
        try:
            read.finish()
        except RowReadError as error:
            logger.warning("warming: %s", error)
            good = ~np.isin(rows, error.rows)
        finally:
            self._cache.read_seconds += read.seconds
        self._chunk = None  # not earlier: an interrupted wait is to be gone on with
        self._cache.index.give_back(slots[~good])
        self.warmed += self._cache.index.adopt(rows[good], slots[good], pinned)
        self._report(len(rows))

    def _report(self, count: int) -> None:
        total, done = len(self._order), len(self._order) - self.left
        if done * _PIECES // total > (done - count) * _PIECES // total:
            seconds = time.monotonic() - self._began
            logger.info(
                "table %s: warmed %d of %d rows (%.0f %%) in %.1f s",
                self._table, done, total, 100 * done / total, seconds,
            )  # fmt: skip
