"""What tables on the host and on disk have in common on a GPU: a row cache in its memory, filled on a side stream."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from memlane.tables.device_cache import CacheCounters, DeviceRowCache, LookupBuffers
from memlane.tables.errors import TableError
from memlane.tables.layout import TableLayout
from memlane.tables.side_stream import SideStream, host_buffer, new_stream
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement

__all__ = ["CachedStore"]


class CachedStore:
    """What host and disk have in common: a row cache on the GPU, whose misses are filled on a side stream."""

    def __init__(self, layout: TableLayout, cache: DeviceRowCache, device: torch.device, link: float) -> None:
        """link: bytes a second from pinned host memory to the device."""
        self.layout, self.cache, self._link = layout, cache, link
        self.device = device
        self.side = SideStream(device)
        self._begun = 0  # lookups, each named by its number
        self._open: list[int] = []
        self._peeking = threading.Lock()
        self._peek = new_stream(device, urgent=True)
        self._peeked = host_buffer((len(cache.counters),), torch.int64, device)
        self._forgotten = 0
        self._before = CacheCounters(*[0] * len(CacheCounters._fields))

    def look_up(self, ids: Tensor, buffers: LookupBuffers, live: Tensor | None) -> int:
        """Slots for ids, and what is missing. Rows of lookups that are still open stay where they are.

        Returns the lookup's number, for `ended`. TableError if the cache cannot hold on to what is open: the latest two
        lookups have scratch and keep their rows, and no others.
        """
        span = self._begun + 2 - min(self._open, default=self._begun + 1)
        if span > 2:
            raise TableError(
                f"table {self.layout.name!r}: a lookup is open that is not one of the latest two"
            )
        self._begun += 1
        self._open.append(self._begun)
        self.cache.lookup(ids, buffers, span, live)
        return self._begun

    def ended(self, number: int) -> None:
        """Nothing that is launched from now on reads that lookup's rows."""
        self._open.remove(number)

    def counts(self) -> CacheCounters:
        """What the cache has counted; waits for none of what the main stream has to do. Any thread."""
        with self._peeking:
            if self._peek is None:
                return CacheCounters.of(self.cache.counters)
            with torch.cuda.stream(self._peek):
                self._peeked.copy_(self.cache.counters, non_blocking=True)
            self._peek.synchronize()
            return CacheCounters.of(self._peeked)

    @property
    def stall_seconds(self) -> float:
        """What the link alone took for the rows that were missing."""
        c = self.counts()
        return (c.num_unique_misses + c.num_in_place_misses) * self.layout.stride / self._link

    def note_tokens(self, tokens: int) -> None:
        """The cache counts for itself, on the GPU."""

    def abandon(self) -> None:
        """All that is cached on the GPU is forgotten: rows of a lookup that broke off may have been found by another."""
        self.cache.clear()
        cleared = self.side.main_mark()
        if cleared is not None:
            cleared.synchronize()  # what is still to run counts rows that are then forgotten, too
        self._forgotten = _placed(self.counts())

    def start_counting(self) -> None:
        """What was counted until now is not reported: it came from steps that nobody asked for."""
        self._before = self.counts()

    def first_tier(self, placement: Placement, tier: str, backend: str, beside: int) -> TableStats:
        """beside: bytes the store holds in addition to the cache."""
        counted, cache = self.counts(), self.cache
        c = CacheCounters(*(now - before for now, before in zip(counted, self._before, strict=True)))
        return TableStats(
            name=self.layout.name,
            placement=placement,
            tier=tier,
            backend=backend,
            policy="lru-set",
            calls=c.num_calls,
            requested_rows=c.num_requested_indices,
            unique_rows=c.num_unique_indices,
            hits=c.num_hits,
            misses=c.num_requested_indices - c.num_hits,
            unique_misses=c.num_unique_misses,
            conflict_misses=c.num_conflict_misses,
            evictions=c.num_evictions,
            scratch_rows=c.num_conflict_unique_misses + c.num_in_place_misses,
            bytes_read=(c.num_unique_misses + c.num_in_place_misses) * self.layout.stride,
            cache_slots=cache.slots,
            used_slots=_placed(counted) - self._forgotten,
            row_bytes=self.layout.stride,
            capacity_bytes=cache.slots * cache.memory.data.shape[1],
            resident_bytes=cache.nbytes + beside,
        )

    def check_integrity(self) -> None:
        self.cache.check_integrity()


def _placed(c: CacheCounters) -> int:
    """Slots that rows have been given and have not been evicted from."""
    return c.num_unique_misses - c.num_conflict_unique_misses - c.num_evictions
