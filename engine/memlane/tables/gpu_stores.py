"""Where a GPU's rows are. A store begins lookups of flat ids; GpuTable computes with what they bring.

    device  ids --------------------------------------------> slots are ids: the whole table lies in GPU memory
    host    ids -> DeviceRowCache: hit -> slot
                                   miss -> slot, which the GPU fills itself from pinned host memory, on a side stream
    disk    ids -> DeviceRowCache: hit -> slot
                                   miss -> slot; ids go to the host (1), whose ValueTable brings the rows into its
                                           pinned cache (2), from where the GPU fills its slots (3)

                      begin                    fetch (disk alone)                 end
    main stream   | touch, claim |                                            | weighted_sum
    side stream                  | (1) ids to the host |    | (3) copy rows | ^ waits for it
    processor                                          | (2) read rows |

Everything but (1) and (2) can be captured in a CUDA graph.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.row_memory import without_rows
from memlane.tables.device_cache import CacheCounters, DeviceRowCache, LookupBuffers
from memlane.tables.errors import RowReadError, TableError
from memlane.tables.host_rows import HostRows
from memlane.tables.layout import TableLayout
from memlane.tables.lookup import TableLookup
from memlane.tables.pinning import PinnedRange
from memlane.tables.side_stream import Mark, SideStream, host_buffer, new_stream
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable

__all__ = ["DeviceStore", "DiskStore", "HostStore", "Store", "StoredRows"]


class StoredRows(Protocol):
    """Rows of flat ids, on their way. Slots below zero are rows ~slot of `far`."""

    near: RowMemory
    far: RowMemory | None
    slots: Tensor

    @property
    def fetched(self) -> bool:
        """Whether the processor's part is done, or there is none."""

    def asked(self) -> None:
        """As `Lookup.asked`."""

    def fetch(self) -> None:
        """The processor's part. Again at each replay of a graph that `begin` was captured in. RowReadError."""

    def wait(self) -> None:
        """What is launched on the main stream from now on finds the rows in their slots."""

    def close(self) -> None:
        """What is launched on the main stream from now on does not need them. Idempotent."""


class Store(Protocol):
    """Rows of one table for a GPU. One thread, except for `tiers`."""

    placement: Placement
    on_disk: ValueTable | None
    most_ids: int | None  # that one lookup takes; None: any number

    @property
    def stall_seconds(self) -> float:
        """As GpuTable has it."""

    def begin(self, ids: Tensor) -> StoredRows: ...

    def note_tokens(self, tokens: int) -> None: ...

    def abandon(self) -> None: ...

    def tiers(self) -> list[TableStats]: ...

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...


class _Resident:
    """Rows that are always there."""

    fetched = True
    far: RowMemory | None = None

    def __init__(self, near: RowMemory, slots: Tensor) -> None:
        self.near, self.slots = near, slots

    def asked(self) -> None:
        """Nobody waits."""

    def fetch(self) -> None:
        """Nothing is missing."""

    def wait(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing is held."""


class DeviceStore:
    """The whole table in GPU memory."""

    placement: Placement = "device"
    on_disk: ValueTable | None = None
    most_ids: int | None = None

    def __init__(self, layout: TableLayout, memory: RowMemory, reads_per_token: int) -> None:
        """memory: all rows, on the device. reads_per_token: ids that a token asks for, all layers together."""
        self._layout, self._memory = layout, memory
        self._reads_per_token = reads_per_token
        self._steps = self._tokens = 0

    @property
    def stall_seconds(self) -> float:
        return 0.0

    def begin(self, ids: Tensor) -> StoredRows:
        return _Resident(self._memory, ids)

    def note_tokens(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def abandon(self) -> None:
        """Nothing can be half there."""

    def tiers(self) -> list[TableStats]:
        requested = self._tokens * self._reads_per_token
        nbytes = self._memory.data.nbytes
        return [
            TableStats(
                name=self._layout.name,
                placement="device",
                tier="device",
                backend="gpu",
                policy="",
                calls=self._steps,
                requested_rows=requested,
                hits=requested,
                cache_slots=self._layout.rows,
                used_slots=self._layout.rows,
                row_bytes=self._layout.stride,
                capacity_bytes=nbytes,
                resident_bytes=nbytes,
            )
        ]

    def check_integrity(self) -> None:
        """There is nothing that could contradict itself."""

    def close(self) -> None:
        self._memory = without_rows(self._memory)


class _Cached:
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
        self.live: Tensor | None = None  # int64 [1] on the device: ids of a lookup that are not padding

    def buffers(self, ids: int) -> LookupBuffers:
        """Uninitialised: the kernels write what is read of them."""
        return LookupBuffers(
            slots=torch.empty(ids, dtype=torch.int32, device=self.device),
            miss_rows=torch.empty(ids, dtype=torch.int64, device=self.device),
            miss_slots=torch.empty(ids, dtype=torch.int32, device=self.device),
            miss_count=torch.empty(1, dtype=torch.int64, device=self.device),
        )

    def look_up(self, ids: Tensor, buffers: LookupBuffers) -> int:
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
        self.cache.lookup(ids, buffers, span, self.live)
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
        self._forgotten = _placed(self.counts())

    def first_tier(self, placement: Placement, tier: str, backend: str, beside: int) -> TableStats:
        """beside: bytes the store holds in addition to the cache."""
        c, cache = self.counts(), self.cache
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
            used_slots=_placed(c) - self._forgotten,
            row_bytes=self.layout.stride,
            capacity_bytes=cache.slots * cache.memory.data.shape[1],
            resident_bytes=cache.nbytes + beside,
        )

    def check_integrity(self) -> None:
        self.cache.check_integrity()


def _placed(c: CacheCounters) -> int:
    """Slots that rows have been given and have not been evicted from."""
    return c.num_unique_misses - c.num_conflict_unique_misses - c.num_evictions


class _HostRows:
    """Rows that the GPU fetches from pinned memory by itself."""

    fetched = True

    def __init__(self, store: HostStore, ids: Tensor) -> None:
        self._store = store
        self.near = store.cache.memory
        self.far: RowMemory | None = store.memory
        self._buffers = store.buffers(len(ids))
        self._number = store.look_up(ids, self._buffers)
        self.slots = self._buffers.slots
        self._closed = self._joined = False
        with store.side.branch():
            store.cache.fill(store.memory, self._buffers)
        self._filled = store.side.mark()

    def asked(self) -> None:
        """The side stream was told where it forks, within the graph if there is one."""

    def fetch(self) -> None:
        """The processor has no part in it."""

    def wait(self) -> None:
        self._store.side.join(self._filled)
        self._joined = True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._store.ended(self._number)
        if not self._joined:
            self.wait()  # the side stream still writes into memory that is given back


class HostStore(_Cached):
    """The whole table in pinned host memory, behind a row cache on the GPU."""

    placement: Placement = "host"
    on_disk: ValueTable | None = None
    most_ids: int | None = None

    def __init__(
        self, layout: TableLayout, cache: DeviceRowCache, host: HostRows, device: torch.device, link: float
    ) -> None:
        """Owns `host`, whose memory is pinned where the device is a GPU."""
        super().__init__(layout, cache, device, link)
        self._host = host
        self.memory = host.memory

    def begin(self, ids: Tensor) -> StoredRows:
        return _HostRows(self, ids)

    def tiers(self) -> list[TableStats]:
        return [self.first_tier("host", "host", "gpu+pinned", self._host.nbytes)]

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.memory = without_rows(self.memory)
        self.cache.close()
        self._host.close()


class _HostSide(NamedTuple):
    """What a lookup sends to the host and back, int64 [1 + n] each. Made at the first fetch: not within a capture."""

    missing: Tensor
    places: Tensor
    places_there: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> _HostSide:
        return cls(
            host_buffer((n,), torch.int64, device),
            host_buffer((n,), torch.int64, device),
            torch.empty(n, dtype=torch.int64, device=device),
        )


class _DiskRows:
    """Rows that the processor reads from a file into its own cache, and the GPU copies from there."""

    far: RowMemory | None = None

    def __init__(self, store: DiskStore, ids: Tensor) -> None:
        self._store = store
        self.near = store.cache.memory
        self._fetched = self._closed = False
        # One copy each way: the number of missing rows, then the rows; what lies behind them is not looked at.
        self._packet = torch.empty(1 + len(ids), dtype=torch.int64, device=store.device)
        self._buffers = store.buffers(len(ids))._replace(
            miss_count=self._packet[:1], miss_rows=self._packet[1:]
        )
        self._host: _HostSide | None = None
        self._number = store.look_up(ids, self._buffers)
        self.slots = self._buffers.slots
        self._asked: Mark = None
        if not store.side.capturing:
            self.asked()

    @property
    def fetched(self) -> bool:
        """Within a capture nothing is computed yet; whoever replays the graph fetches."""
        return self._fetched or self._store.side.capturing

    def asked(self) -> None:
        self._asked = self._store.side.main_mark()

    def fetch(self) -> None:
        store = self._store
        host = self._host = self._host or _HostSide.of(len(self._packet), store.device)
        # Not after all that was launched: the other half is computing, and to wait for that would hide nothing.
        with store.side.branch(self._asked):
            host.missing.copy_(self._packet, non_blocking=True)
        store.wait_for(store.side.mark())
        count = int(host.missing[0])
        if count:
            store.bring(host.missing[1 : 1 + count], self._copy)
        self._fetched = True

    def _copy(self, begin: int, places: NDArray[np.int32]) -> Mark:
        """Have the GPU copy missing rows from `begin` on, which lie in these slots of the cache in RAM."""
        store, m, host = self._store, len(places), self._host
        assert host is not None
        host.places[0] = m
        host.places[1 : 1 + m] = torch.from_numpy(places)
        with store.side.branch(self._asked):  # who read these slots before did so before that
            host.places_there[: 1 + m].copy_(host.places[: 1 + m], non_blocking=True)
            store.cache.copy(
                store.memory,
                host.places_there[1 : 1 + m],
                self._buffers.miss_slots[begin : begin + m],
                host.places_there[:1],
            )
        mark = store.side.mark()
        store.side.join(mark)
        return mark

    def wait(self) -> None:
        """`fetch` has had the main stream wait."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._store.ended(self._number)
        if not self.fetched:
            self._store.abandon()  # slots were taken for rows that will not come


class DiskStore(_Cached):
    """The table in a file, behind a cache of rows in pinned RAM, behind a row cache on the GPU."""

    placement: Placement = "disk"

    def __init__(
        self, layout: TableLayout, cache: DeviceRowCache, table: ValueTable, device: torch.device, link: float
    ) -> None:
        """Owns `table`, a table on disk with a cache."""
        super().__init__(layout, cache, device, link)
        assert table.cache is not None, "a table on disk has a cache"
        self.on_disk: ValueTable | None = table
        self.most_ids: int | None = cache.scratch
        arena = torch.from_numpy(table.cache.memory.arena.array())
        rows = len(arena) // layout.stride
        self._pinned = (
            PinnedRange.of_arena(table.cache.memory.arena, device=device) if device.type == "cuda" else None
        )
        self.memory = RowMemory(
            arena[: rows * layout.stride].view(rows, layout.stride), layout.dtype.value, layout.width
        )
        self._held: deque[tuple[TableLookup, Mark]] = deque()  # rows in RAM that the GPU may still be copying

    @property
    def stall_seconds(self) -> float:
        assert self.on_disk is not None
        return super().stall_seconds + self.on_disk.stall_seconds

    def begin(self, ids: Tensor) -> StoredRows:
        return _DiskRows(self, ids)

    def bring(self, rows: Tensor, copy: _Copy) -> None:
        """Read rows int64 [m], on the host and different from each other, and call `copy` for each part of them.

        Their slots in RAM are held until the next call, when the GPU has long copied them.
        """
        assert self.on_disk is not None
        self._let_go()
        lookup = self.on_disk.begin(rows[:, None])
        mark: Mark = None
        try:
            for part in lookup.places():
                mark = copy(part.begin, part.slots)
                if part.begin + len(part.slots) < len(rows):
                    self.wait_for(mark)  # the next part takes the place of this one
        except RowReadError:
            self.abandon()
            raise
        finally:
            self._held.append((lookup, mark))

    def wait_for(self, mark: Mark) -> None:
        """Stops the processor."""
        if mark is not None:
            mark.synchronize()

    def abandon(self) -> None:
        super().abandon()
        self._let_go()

    def tiers(self) -> list[TableStats]:
        assert self.on_disk is not None
        return [self.first_tier("disk", "host", "gpu+pinned", 0), self.on_disk.stats()]

    def check_integrity(self) -> None:
        super().check_integrity()
        self._let_go()
        assert self.on_disk is not None
        self.on_disk.check_integrity()

    def close(self) -> None:
        assert self.on_disk is not None
        self._let_go()
        self.memory = without_rows(self.memory)
        self.cache.close()
        if self._pinned is not None:
            self._pinned.close()
        self.on_disk.close()

    def _let_go(self) -> None:
        while self._held:
            lookup, mark = self._held.popleft()
            self.wait_for(mark)
            lookup.close()


class _Copy(Protocol):
    def __call__(self, begin: int, places: NDArray[np.int32]) -> Mark: ...
