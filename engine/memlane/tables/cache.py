"""Rows kept in RAM between batches: a byte budget of slots with exact LRU, and a scratch region for what does not fit.

    arena   | slot 0 | slot 1 | ... | slot S-1 | scratch 0 | ... | scratch C-1 |
            |<------- cache_bytes ------------>|<-- of the running batch only ->|

It does not know what a row means, nor what is computed from it.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlane.native import Arena, RowIndex
from memlane.tables.errors import RowReadError
from memlane.tables.source import RowSource

__all__ = ["RowCache", "Served"]

_SCRATCH_BYTES = 8 << 20
_MOST_SCRATCH_ROWS = 16_384

Ids = NDArray[np.int32] | NDArray[np.int64]


class Served(NamedTuple):
    """Part of a batch whose rows lie in slots now: ids [begin, begin + len(slots)) of the flat batch."""

    begin: int
    slots: NDArray[np.int32]


class RowCache:
    """Slots for rows of one table, filled from a source. One thread at a time; not reentrant."""

    def __init__(self, rows: int, stride: int, cache_bytes: int) -> None:
        """A cache of as many rows as fit cache_bytes (none is possible: every row then goes through scratch)."""
        slots = min(rows, max(0, cache_bytes) // stride)
        scratch = 0 if slots == rows else min(rows, _MOST_SCRATCH_ROWS, max(1, _SCRATCH_BYTES // stride))
        self.index = RowIndex(rows, slots, scratch)
        self.arena = Arena((slots + scratch) * stride)
        self.stride = stride
        self.read_seconds = 0.0
        self.errors = 0

    @property
    def slots(self) -> int:
        return self.index.slots

    @property
    def scratch_bytes(self) -> int:
        return self.index.scratch * self.stride

    def serve(self, ids: Ids, source: RowSource) -> Generator[Served]:
        """Brings the rows of a flat batch into slots, part by part; each part's slots hold until the next is asked for.

        Usually one part; more when the batch needs more rows than there are slots. The rows of a batch cannot be
        evicted while it runs. IndexError for an id outside the table, before anything is read. RowReadError after
        all parts have been tried, naming every bad row; parts after the first bad row are not handed out. Whatever
        ends the batch, no slot keeps a row that was not read in full.
        """
        bad: list[RowReadError] = []
        begin = 0
        slots = np.empty(len(ids), np.int32)
        batch = self.index.begin()
        try:
            while begin < len(ids):
                count = self.index.lookup(batch, ids[begin:], slots)
                if self.index.miss_count():
                    try:
                        self._fill(source)
                    except RowReadError as error:
                        bad.append(error)
                if not bad:
                    yield Served(begin, slots[:count])
                begin += count
                if begin < len(ids):
                    self.index.release_scratch(batch)
        finally:
            self.index.end(batch)
        if bad:
            rows = sorted({row for error in bad for row in error.rows})
            raise RowReadError(bad[0].table, rows, bad[0].reason)

    def _fill(self, source: RowSource) -> None:
        rows, slots = self.index.misses()
        started = time.perf_counter()
        try:
            source.read(rows, self.arena, slots)
        except RowReadError as error:
            self.errors += len(error.rows)
            self.index.drop(slots[np.searchsorted(rows, np.asarray(error.rows, np.int64))])
            raise
        except BaseException:
            self.index.drop(
                slots
            )  # an interrupt between lookup and read must not leave rows that were never read
            raise
        finally:
            self.read_seconds += time.perf_counter() - started

    def check_integrity(self) -> None:
        """Walks the whole index; AssertionError with the broken invariant. Slow: for tests and after faults."""
        fault = self.index.check()
        assert not fault, fault
