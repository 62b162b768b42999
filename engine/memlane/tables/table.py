"""A value table that is read: rows in RAM, or on disk behind a cache. Results do not depend on which.

weighted_sum(ids, weights)
  host   ids ------------------------------------> kernel over the whole table in RAM
  disk   ids -> RowCache: hit -> slot              kernel over the slots, in the order of the ids
                          miss -> FileSource.read -> slot
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.native import Arena, RowView
from memlane.tables.cache import Ids, RowCache
from memlane.tables.errors import RowReadError, TableError
from memlane.tables.layout import TableLayout
from memlane.tables.protocol import Lookup
from memlane.tables.reference import ReferenceLookup
from memlane.tables.source import FileIO, FileSource
from memlane.tables.stats import TableStats

__all__ = ["Placement", "ValueTable"]

logger = logging.getLogger(__name__)

Placement = Literal["host", "disk"]

_LOAD_BYTES = 64 << 20  # read at once while a table is loaded into RAM
_WARM_ROWS = 65_536


class ValueTable:
    """A table opened for reading. Used by one thread at a time (TableError otherwise); stats() by any.

    Sums and products are taken in fp32, in the order k = 0..K-1, and are bit-identical whatever the placement, the
    cache's size and state, the batch, the number of threads and the processor's instruction set (NaNs in rows aside).
    """

    def __init__(
        self, layout: TableLayout, source: FileSource, cache: RowCache | None, arena: Arena, count: int
    ) -> None:
        """Use ValueTable.open."""
        self._layout = layout
        self._source = source
        self._cache = cache
        self._arena = arena
        self._view: RowView | None = RowView(arena, 0, count, layout.dtype.code, layout.width)
        self._busy = threading.Lock()
        self._calls = 0
        self._requested = 0
        self._warming: Counter[str] = Counter()  # what warm() made the cache count: no request asked for it
        self._warming_seconds = 0.0
        self._backend = "ram" if cache is None else source.backend

    @classmethod
    def open(
        cls,
        layout: TableLayout,
        placement: Placement = "disk",
        cache_bytes: int = 64 << 20,
        *,
        io: FileIO = "auto",
        allow_uring: bool = True,
    ) -> ValueTable:
        """Opens a table; "host" reads all of it into RAM now, "disk" keeps cache_bytes of its rows at most.

        Raises OSError (no such file), TableFormatError (the file is too short), TableError, and for "host"
        RowReadError (part of it cannot be read) and MemoryError.
        """
        if placement not in ("host", "disk"):
            raise ValueError(f"placement must be 'host' or 'disk', not {placement!r}")
        source = FileSource(layout, io=io, allow_uring=allow_uring)
        if placement == "host":
            arena = _load(layout, source)
            source.close()
            return cls(layout, source, None, arena, layout.rows)
        cache = RowCache(layout.rows, layout.stride, cache_bytes)
        share = cache.slots / layout.rows if layout.rows else 1.0
        logger.info(
            "table %s: %d of %d rows (%.1f %%) fit the cache",
            layout.name,
            cache.slots,
            layout.rows,
            100 * share,
        )
        return cls(layout, source, cache, cache.arena, cache.slots + cache.index.scratch)

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
    def placement(self) -> Placement:
        return "host" if self._cache is None else "disk"

    def begin(self, ids: Tensor) -> Lookup:
        """ids int32 or int64 [tokens, k] -> a lookup of them; rows are read when it ends."""
        return ReferenceLookup(self, ids)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids int32 or int64 [tokens, k], weights fp32 [tokens, k] -> fp32 [tokens, width], on the CPU.

        IndexError: an id outside the table. RowReadError: rows could not be read; names rows and tokens.
        """
        flat = _ids(ids, 2)
        given = _floats(weights, "weights")
        if weights.shape != ids.shape:
            raise ValueError(f"weights are {list(weights.shape)}, ids {list(ids.shape)}")
        out = (
            torch.zeros(ids.shape[0], self.width)
            if ids.shape[1] == 0
            else torch.empty(ids.shape[0], self.width)
        )
        with self._batch(flat, ids.shape[1]) as (view, parts):
            for begin, slots in parts:
                view.weighted_sum(slots, given, out.numpy(), begin)
        return out

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids int32 or int64 [tokens, k], x fp32 [tokens, width] -> fp32 [tokens, k]: each row with its token's x."""
        flat = _ids(ids, 2)
        given = _floats(x, "x")
        if x.shape != (ids.shape[0], self.width):
            raise ValueError(f"x is {list(x.shape)}, expected {[ids.shape[0], self.width]}")
        out = torch.empty(ids.shape, dtype=torch.float32)
        with self._batch(flat, ids.shape[1]) as (view, parts):
            for begin, slots in parts:
                view.dot(slots, given, out.numpy(), begin)
        return out

    def gather(self, ids: Tensor) -> Tensor:
        """ids int32 or int64 [n] -> the rows as fp32 [n, width]."""
        flat = _ids(ids, 1)
        out = torch.empty(ids.shape[0], self.width)
        with self._batch(flat, 1) as (view, parts):
            for begin, slots in parts:
                view.gather(slots, out.numpy()[begin : begin + len(slots)])
        return out

    @contextmanager
    def _batch(self, flat: Ids, k: int) -> Iterator[tuple[RowView, Iterator[tuple[int, Ids]]]]:
        """The rows' memory and, part by part, where in it the batch's rows lie. Names the tokens a bad row hits."""
        if not self._busy.acquire(blocking=False):
            raise TableError(f"table {self.name!r} is used by two threads at once")
        try:
            if self._view is None:
                raise TableError(f"table {self.name!r} is closed")
            if self._cache is None:
                yield self._view, iter([(0, flat)] if len(flat) else [])
            else:
                with closing(self._cache.serve(flat, self._source)) as parts:
                    yield self._view, parts
            self._calls += 1
            self._requested += len(flat)
        except RowReadError as error:
            tokens = np.unique(np.flatnonzero(np.isin(flat, error.rows)) // k)
            raise RowReadError(error.table, error.rows, error.reason, tokens.tolist()) from None
        finally:
            self._busy.release()

    def warm(self, row_ids: Sequence[int] | NDArray[np.int64] | Tensor) -> int:
        """Reads rows into the cache, hottest first, as many as it holds; returns how many of them are cached now.

        The first ids become the most recently used. Rows that cannot be read are logged and left out. On "host"
        nothing is to be done. It counts as reads and as warmed_rows, never as requests or misses: a hit rate is
        about what was asked for. IndexError: an id outside the table.
        """
        ids = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        if self._cache is None:
            return len(ids)
        _, first = np.unique(ids, return_index=True)
        ids = ids[np.sort(first)][: self._cache.slots]
        calls, requested, seconds = self._calls, self._requested, self._cache.read_seconds
        before = Counter(self._cache.index.counters())
        try:
            for end in range(len(ids), 0, -_WARM_ROWS):
                part = np.ascontiguousarray(ids[max(0, end - _WARM_ROWS) : end][::-1])
                try:
                    with self._batch(part, 1) as (_, parts):
                        for _ in parts:
                            pass
                except RowReadError as error:
                    logger.warning("warming: %s", error)
        finally:
            self._calls, self._requested = calls, requested
            self._warming += Counter(self._cache.index.counters()) - before
            self._warming_seconds += self._cache.read_seconds - seconds
        return sum(map(self._cache.index.contains, ids.tolist()))

    def stats(self) -> TableStats:
        """A snapshot of the counters; cheap, from any thread. Stays readable after close."""
        cache, layout, source = self._cache, self._layout, self._source
        if cache is None:
            counters = dict.fromkeys(
                ("unique_rows", "misses", "unique_misses", "evictions", "scratch_rows"), 0
            )
            counters |= {"requested_rows": self._requested, "hits": self._requested}
            resident = layout.nbytes if self._view is not None else 0
        else:
            counted = Counter(cache.index.counters())
            counted.subtract(self._warming)
            counters = dict(counted)
            resident = (
                cache.index.used * layout.stride
                + cache.scratch_bytes
                + cache.index.nbytes
                + source.scratch_bytes
            )
        read_seconds = 0.0 if cache is None else cache.read_seconds
        return TableStats(
            name=layout.name,
            placement=self.placement,
            tier=self.placement,
            backend=self._backend,
            calls=self._calls,
            **counters,
            bytes_read=source.bytes_read,
            reads=source.reads,
            retries=source.retries,
            read_seconds=read_seconds,
            stall_seconds=read_seconds - self._warming_seconds,  # nothing else is done meanwhile
            warmed_rows=self._warming["unique_misses"],
            errors=0 if cache is None else cache.errors,
            in_flight=source.in_flight,
            cache_slots=layout.rows if cache is None else cache.slots,
            used_slots=layout.rows if cache is None else cache.index.used,
            row_bytes=layout.stride,
            capacity_bytes=layout.nbytes if cache is None else cache.slots * layout.stride,
            resident_bytes=resident,
        )

    def check_integrity(self) -> None:
        """AssertionError if the cache contradicts itself. Walks everything: for tests, and when idle after faults."""
        if self._cache is not None:
            self._cache.check_integrity()

    def close(self) -> None:
        """Gives the file and the memory back; later calls raise TableError. Idempotent; not while a call runs."""
        self._source.close()
        self._view = None
        self._arena = Arena(0)


def _load(layout: TableLayout, source: FileSource) -> Arena:
    started = time.perf_counter()
    arena = Arena(layout.nbytes)
    step = max(1, _LOAD_BYTES // layout.stride)
    for begin in range(0, layout.rows, step):
        rows = np.arange(begin, min(begin + step, layout.rows), dtype=np.int64)
        source.read(rows, arena, rows.astype(np.int32))
    seconds = time.perf_counter() - started
    logger.info("table %s: %.1f MiB loaded into RAM in %.2f s", layout.name, layout.nbytes / 2**20, seconds)
    return arena


def _ids(ids: Tensor, dim: int) -> Ids:
    if ids.dtype not in (torch.int32, torch.int64) or ids.device.type != "cpu":
        raise TypeError(f"ids must be int32 or int64 on the CPU, not {ids.dtype} on {ids.device}")
    if ids.dim() != dim:
        raise ValueError(f"ids must have {dim} dimension(s), not shape {list(ids.shape)}")
    flat: Ids = ids.contiguous().numpy().reshape(-1)
    return flat


def _floats(values: Tensor, what: str) -> NDArray[np.float32]:
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise TypeError(f"{what} must be fp32 on the CPU, not {values.dtype} on {values.device}")
    if values.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{what} require a gradient; a ValueTable has none (train on a ReferenceTable)")
    array: NDArray[np.float32] = values.detach().contiguous().numpy()
    return array
