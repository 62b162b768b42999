"""Rows kept in RAM between batches: a byte budget of slots under a policy, and a scratch region for what does not fit.

    arena   | slot 0 | slot 1 | ... | slot S-1 | scratch 0 | ... | scratch C-1 |
            |<------- cache_bytes ------------>|<-- of the running batch only ->|

It does not know what a row means, nor what is computed from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlane.native import RowIndex, row_index_bytes
from memlane.tables.errors import RowReadError, TableError
from memlane.tables.source import Read, RowSource, SlotMemory

__all__ = ["CacheBatch", "Ids", "Part", "RowCache", "cache_overhead"]

_SCRATCH_BYTES = 8 << 20
_MOST_SCRATCH_ROWS = 16_384

Ids = NDArray[np.int32] | NDArray[np.int64]


def scratch_rows(rows: int, stride: int, slots: int) -> int:
    """Slots beside the cache's own, for batches that need more rows than those can hold."""
    return 0 if slots == rows else min(rows, _MOST_SCRATCH_ROWS, max(1, _SCRATCH_BYTES // stride))


def cache_overhead(rows: int, stride: int, slots: int) -> int:
    """Bytes that a cache of so many slots takes beside its rows: index, states and scratch (policies take a little more)."""
    scratch = scratch_rows(rows, stride, slots)
    return row_index_bytes(rows, slots, scratch) + slots + scratch * (stride + 1)


class Part(NamedTuple):
    """Ids [begin, begin + len(slots)) of a flat batch, and where their rows lie, or will once `read` has brought them.

    read: None where nothing of this part is missing.
    """

    begin: int
    slots: NDArray[np.int32]
    read: Read | None


class RowCache:
    """Slots for rows of one table, filled from a source. One thread at a time.

    Several batches may be under way: each takes its slots and starts its reads when it begins, and they end in the
    order in which they began. Rows of a batch cannot be evicted while it is under way.
    """

    def __init__(
        self, rows: int, stride: int, cache_bytes: int, source: RowSource, policy: str = "lru"
    ) -> None:
        """A cache of as many rows as fit cache_bytes (none is possible: every row then goes through scratch)."""
        slots = min(rows, max(0, cache_bytes) // stride)
        scratch = scratch_rows(rows, stride, slots)
        self.index = RowIndex(rows, slots, scratch, policy)
        self.memory = SlotMemory.of(slots + scratch, stride)
        self.source = source
        self.stride = stride
        self.read_seconds = 0.0
        self.stall_seconds = 0.0
        self.errors = 0
        self.last_reason = ""  # of the latest failure
        self._under_way: deque[CacheBatch] = deque()

    @property
    def slots(self) -> int:
        return self.index.slots

    @property
    def scratch_bytes(self) -> int:
        return self.index.scratch * self.stride

    def begin(self, ids: Ids) -> CacheBatch:
        """Takes slots for a flat batch of ids and starts the reads of missing rows.

        IndexError for an id outside the table, before anything is read.
        """
        batch = CacheBatch(self, ids)
        self._under_way.append(batch)
        try:
            batch.number = self.index.begin()
            batch.start()
        except BaseException:
            batch.close()
            raise
        return batch

    def retire(self) -> None:
        """Ends, in their order, the batches that have been closed."""
        while self._under_way and self._under_way[0].closed:
            batch = self._under_way.popleft()
            if batch.number:
                self.index.end(batch.number)

    def is_next(self, batch: CacheBatch) -> bool:
        """Whether all batches that began before this one have ended."""
        return self._under_way[0] is batch

    def check_integrity(self) -> None:
        """Walks the whole index; AssertionError with the broken invariant. Slow: for tests and after faults."""
        fault = self.index.check()
        assert not fault, fault
        assert self.index.open == len(self._under_way), "index and cache disagree on the batches under way"


class CacheBatch:
    """A batch of ids on its way through a cache: begun by RowCache.begin, gone through by `parts`, ended by `close`."""

    def __init__(self, cache: RowCache, ids: Ids) -> None:
        self.number = 0  # the index's name for it, once it has begun
        self.closed = False
        self._cache, self._ids = cache, ids
        self._slots = np.empty(len(ids), np.int32)
        self._part: Part | None = None
        self._served = 0  # ids that have had their part
        self._bad: list[int] = []

    def start(self) -> int:
        """Looks up what is not yet served and starts reading: as many ids as there are slots for, perhaps none.

        Returns how many.
        """
        index, cache, begin = self._cache.index, self._cache, self._served
        read = None
        try:
            count = index.lookup(self.number, self._ids[begin:], self._slots)
            if index.miss_count():
                rows, slots = index.misses()
                read = cache.source.start(rows, slots, cache.memory)
        except BaseException:
            # Interrupted: rows that are not read must not count as cached. Reads may have begun without our getting hold
            # of them; they must not end in a slot that another row has taken meanwhile.
            cache.source.drain()
            index.drop(index.misses()[1])
            raise
        self._served += count
        self._part = Part(begin, self._slots[:count], read)
        return count

    def parts(self) -> Generator[Part]:
        """The parts of the batch, one after the other; each part's slots hold until the next is asked for.

        Usually one part; more when the batch needs more rows than there are slots. Parts after the first bad row are
        read, to name every bad row, but not handed out.
        """
        if not self._cache.is_next(
            self
        ):  # rows that it found on their way belong to a lookup that did not wait for them
            raise TableError("lookups of a table must end in the order in which they began")
        while True:
            part = self._part
            assert part is not None
            if len(part.slots):
                if not self._bad:
                    yield part
                self._finish(part)
            if self._served == len(self._ids):
                return
            self._cache.index.release_scratch(self.number)
            if not self.start():
                raise TableError("no slot of the cache is free for any row of a batch")

    def _finish(self, part: Part) -> None:
        """Waits for the part's reads; rows that could not be read leave the index."""
        cache = self._cache
        if part.read is not None:
            try:
                part.read.finish()
            except RowReadError as error:
                cache.errors += len(error.rows)
                cache.last_reason = error.reason
            finally:
                cache.read_seconds += part.read.seconds
        self._part = part._replace(read=None)  # not earlier: an interrupted wait is to be gone on with
        # Also what an earlier batch failed to read while this one counted on it.
        lost = cache.memory.states.failed(part.slots)
        if len(lost):
            cache.index.drop(part.slots[lost])
            self._bad += self._ids[part.begin + lost].tolist()

    def bad_rows(self) -> list[int]:
        """Rows that could not be read so far, ascending."""
        return sorted(set(self._bad))

    def close(self) -> None:
        """Gives the slots free for eviction; waits for reads that are still under way. Idempotent."""
        if self.closed:
            return
        if self._part is not None and self._part.read is not None:
            self._finish(self._part)
        self.closed = True
        self._cache.retire()
