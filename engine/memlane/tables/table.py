"""A value table that is read: rows in RAM, or on disk behind a cache. Results do not depend on which.

weighted_sum(ids, weights) = begin(ids).weighted_sum(weights)
  host   ids ------------------------------------> kernel over the whole table in RAM
  disk   ids -> RowCache: hit -> slot              kernel over the slots, in the order of the ids,
                          miss -> slot, read begins       each token as far as its rows have come
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.native import RowView, SlotStates
from memlane.tables.at_once import AtOnce
from memlane.tables.cache import Ids, RowCache
from memlane.tables.errors import TableError
from memlane.tables.host_rows import HostRows
from memlane.tables.layout import TableLayout
from memlane.tables.lookup import TableLookup
from memlane.tables.source import DEADLINE, MERGE_GAP, FileIO, FileSource, SlotMemory
from memlane.tables.stats import TableStats
from memlane.tables.warm import Warmer

__all__ = ["MOST_ROWS", "Placement", "Reading", "ValueTable"]

logger = logging.getLogger(__name__)

Placement = Literal["device", "host", "disk"]


class Reading(NamedTuple):
    """How rows on disk are read and kept: arguments of ValueTable.open by their names."""

    policy: str = "lru"
    io: FileIO = "auto"
    merge_gap: int = MERGE_GAP
    deadline: float = DEADLINE


MOST_ROWS = (1 << 31) - 1  # slots are 32-bit numbers


class ValueTable(AtOnce):
    """A table opened for reading. Used by one thread at a time (TableError otherwise); stats() by any.

    Sums and products are taken in fp32, in the order k = 0..K-1, and are bit-identical whatever the placement, the
    cache's size, policy and state, the batch, the number of threads and the processor's instruction set (NaNs in rows
    aside).

    recorder: called with the flat ids of each lookup, if set.
    """

    def __init__(
        self,
        layout: TableLayout,
        source: FileSource,
        cache: RowCache | None,
        memory: SlotMemory,
        count: int,
        host_rows: HostRows | None = None,
    ) -> None:
        """Use ValueTable.open."""
        self.recorder: Callable[[Ids], None] | None = None
        self._layout = layout
        self._source = source
        self.cache = cache
        self._memory = memory
        self._host_rows = host_rows
        self._view: RowView | None = RowView(memory.arena, 0, count, layout.dtype.code, layout.width)
        self._busy = threading.Lock()
        self._calls = 0
        self._requested = 0
        self._warmer: Warmer | None = None
        self._warmed = 0
        self._backend = "ram" if cache is None else source.backend

    @classmethod
    def open(
        cls,
        layout: TableLayout,
        placement: Placement = "disk",
        cache_bytes: int = 64 << 20,
        *,
        policy: str = "lru",
        io: FileIO = "auto",
        allow_uring: bool = True,
        merge_gap: int = MERGE_GAP,
        deadline: float = DEADLINE,
        verify: bool = True,
        shared: bool = False,
    ) -> ValueTable:
        """Opens a table; "host" reads all of it into RAM now, "disk" keeps cache_bytes of its rows at most.

        policy: which rows the cache gives up, one of `memlane.native.cache_policies()`. shared: "host" keeps the rows in
        memory that processes of this machine share, see HostRows. The rest as FileSource has it.
        Raises OSError (no such file), TableFormatError (the file is too short), TableError, and for "host"
        RowReadError (part of it cannot be read) and MemoryError.
        """
        if placement not in ("host", "disk"):
            raise ValueError(f"placement must be 'host' or 'disk', not {placement!r}")
        if layout.rows > MOST_ROWS:
            raise TableError(f"table {layout.name!r}: {layout.rows} rows; at most {MOST_ROWS} are supported")
        source = FileSource(
            layout, io=io, allow_uring=allow_uring, merge_gap=merge_gap, deadline=deadline, verify=verify
        )
        if placement == "host":
            rows = HostRows(layout, source, shared=shared)
            source.close()
            memory = SlotMemory(rows.arena, SlotStates(0))  # all of them are there
            return cls(layout, source, None, memory, layout.rows, rows)
        cache = RowCache(layout.rows, layout.stride, cache_bytes, source, policy)
        share = cache.slots / layout.rows if layout.rows else 1.0
        logger.info(
            "table %s: %d of %d rows (%.1f %%) fit the cache (%s, %s index of %.1f MiB)",
            layout.name,
            cache.slots,
            layout.rows,
            100 * share,
            cache.index.policy,
            cache.index.map,
            cache.index.nbytes / 2**20,
        )
        return cls(layout, source, cache, cache.memory, cache.slots + cache.index.scratch)

    @property
    def name(self) -> str:
        return self._layout.name

    @property
    def rows(self) -> int:
        return self._layout.rows

    @property
    def width(self) -> int:
        return self._layout.width

    @property
    def layout(self) -> TableLayout:
        return self._layout

    @property
    def source(self) -> FileSource:
        """Where missing rows are read from."""
        return self._source

    @property
    def states(self) -> SlotStates:
        """Which slots' rows have come."""
        return self._memory.states

    @property
    def placement(self) -> Placement:
        return "host" if self.cache is None else "disk"

    def begin(self, ids: Tensor, live: Tensor | None = None) -> TableLookup:
        """ids int32 or int64 [tokens, k]: looks them up, starts the reads of missing rows, and does not wait for them.

        The result's weighted_sum, dot, gather or wait ends the lookup, its close gives it up. Lookups end in the order
        in which they began. IndexError: an id outside the table; nothing is read then. live: ignored, on a CPU nothing is
        padded.
        """
        flat = _ids(ids, 2)
        with self.busy() as view:
            batch = None
            if self.cache is not None:
                batch = self.cache.begin(flat)
            else:
                view.check(flat)
            lookup = TableLookup(self, flat, ids.shape[0], ids.shape[1], batch)
            if self.recorder is not None:
                try:
                    self.recorder(flat)
                except BaseException:
                    if batch is not None:
                        batch.close()
                    raise
            return lookup

    @contextmanager
    def busy(self, wait: bool = False) -> Iterator[RowView]:
        """Holds the table for one thread. TableError where another has it (unless it is to wait), or where it is closed."""
        if not self._busy.acquire(blocking=wait):
            raise TableError(f"table {self.name!r} is used by two threads at once")
        try:
            if self._view is None:
                raise TableError(f"table {self.name!r} is closed")
            yield self._view
        finally:
            self._busy.release()

    def count(self, ids: int) -> None:
        """A lookup of so many ids was answered."""
        self._calls += 1
        self._requested += ids

    def warm(self, row_ids: Sequence[int] | NDArray[np.int64] | Tensor) -> int:
        """Reads rows into free slots now, hottest first, as many as there are; returns how many rows are cached then.

        On "host" nothing is to be done. IndexError: an id outside the table.
        """
        self.start_warming(row_ids)
        while self.warm_some(1.0):
            pass
        return self.rows if self.cache is None else self.cache.index.used

    def start_warming(self, row_ids: Sequence[int] | NDArray[np.int64] | Tensor, pin: int = 0) -> None:
        """Gets ready to read rows into free slots, bit by bit, by `warm_some`. row_ids: hottest first.

        pin: the first so many stay for good. Warming counts as reads and as warmed_rows, never as requests or misses:
        a hit rate is about what was asked for. IndexError: an id outside the table.
        """
        ids = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise IndexError(f"a row id is outside [0, {self.rows})")
        while self.warm_some(1.0):  # what was asked for before holds slots
            pass
        if self.cache is not None:
            self._warmer = Warmer(self.name, self.cache, ids, pin)

    def warm_some(self, patience: float = 0.0) -> bool:
        """Goes on with warming, waiting at most `patience` seconds for reads; whether there is more to do."""
        if self._warmer is None:
            return False
        with self.busy():
            before = self._warmer.warmed
            more = self._warmer.advance(patience)
            self._warmed += self._warmer.warmed - before
            if not more:
                self._warmer = None
        return more

    def ranking(self) -> NDArray[np.int64]:
        """Cached rows, the one to be kept longest first, as start_warming takes them. Empty on "host".

        While the cache is being warmed, the rows that it still waits for come last, as far as there are slots.
        """
        with self.busy():
            if self.cache is None:
                return np.empty(0, np.int64)
            rows = self.cache.index.ranking()
            if (
                self._warmer is not None
            ):  # a stop in the middle of a warm start must not make the next one colder
                waited_for = self._warmer.missing()
                rows = np.concatenate([rows, waited_for[~np.isin(waited_for, rows)]])[: self.cache.slots]
            return rows

    @property
    def on_disk(self) -> ValueTable | None:
        """This table if it reads a file through its cache; else there is nothing to warm."""
        return None if self.cache is None else self

    @property
    def most_ids(self) -> None:
        """A lookup takes any number of ids, in parts where it must, whatever else is open."""

    def start_counting(self) -> None:
        """Nothing: no step is run that nobody asked for."""

    def note_tokens(self, tokens: int) -> None:
        """Nothing: lookups are counted as they end."""

    def abandon(self) -> None:
        """Nothing: a lookup that is closed leaves nothing half done."""

    def tiers(self) -> list[TableStats]:
        """The counters of each cache that a row passes."""
        return [self.stats()]

    def stats(self) -> TableStats:
        """A snapshot of the counters; cheap, from any thread. Stays readable after close."""
        cache, layout, source = self.cache, self._layout, self._source
        warmer = self._warmer
        if cache is None:
            counters = dict.fromkeys(
                ("unique_rows", "misses", "unique_misses", "evictions", "scratch_rows"), 0
            )
            counters |= {"requested_rows": self._requested, "hits": self._requested}
            resident = layout.nbytes if self._view is not None else 0
        else:
            counters = cache.index.counters()
            resident = (
                cache.index.used * layout.stride
                + cache.scratch_bytes
                + cache.index.nbytes
                + len(cache.memory.states)
                + source.buffer_bytes
            )
        return TableStats(
            name=layout.name,
            placement=self.placement,
            tier=self.placement,
            backend=self._backend,
            policy="" if cache is None else cache.index.policy,
            calls=self._calls,
            **counters,
            bytes_read=source.bytes_read,
            reads=source.reads,
            retries=source.retries,
            read_seconds=0.0 if cache is None else cache.read_seconds,
            stall_seconds=0.0 if cache is None else cache.stall_seconds,
            warmed_rows=self._warmed,
            errors=0 if cache is None else cache.errors,
            corrupt_pages=source.corrupt_pages,
            in_flight=source.in_flight,
            warming_rows=0 if warmer is None else warmer.left,
            cache_slots=layout.rows if cache is None else cache.slots,
            used_slots=layout.rows if cache is None else cache.index.used,
            pinned_slots=0 if cache is None else cache.index.pinned,
            row_bytes=layout.stride,
            capacity_bytes=layout.nbytes if cache is None else cache.slots * layout.stride,
            resident_bytes=resident,
            page_cache_bytes=source.page_cache_bytes,
        )

    @property
    def stall_seconds(self) -> float:
        """As in stats(), for those who ask at every step."""
        return 0.0 if self.cache is None else self.cache.stall_seconds

    def check_integrity(self) -> None:
        """AssertionError if the cache contradicts itself. Walks everything: for tests, and when idle after faults."""
        if self.cache is not None:
            self.cache.check_integrity()

    def close(self) -> None:
        """Gives the file and the memory back; later calls raise TableError. Idempotent; not while a call runs."""
        self._source.close()
        self._view = None
        self._warmer = None
        self._memory = SlotMemory.of(0, 1)
        if self.cache is not None:
            self.cache.memory = self._memory
        if self._host_rows is not None:
            self._host_rows.close()


def _ids(ids: Tensor, dim: int) -> Ids:
    if ids.dtype not in (torch.int32, torch.int64) or ids.device.type != "cpu":
        raise TypeError(f"ids must be int32 or int64 on the CPU, not {ids.dtype} on {ids.device}")
    if ids.dim() != dim:
        raise ValueError(f"ids must have {dim} dimension(s), not shape {list(ids.shape)}")
    flat: Ids = ids.contiguous().numpy().reshape(-1)
    return flat
