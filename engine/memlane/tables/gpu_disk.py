"""A table in a file, which the processor reads for a GPU: file, pinned RAM, row cache on the GPU. See gpu_stores.py."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.row_memory import without_rows
from memlane.tables.device_cache import DeviceRowCache
from memlane.tables.errors import RowReadError
from memlane.tables.gpu_cached import CachedStore
from memlane.tables.gpu_stores import StoredRows
from memlane.tables.layout import TableLayout
from memlane.tables.lookup import TableLookup
from memlane.tables.pinning import PinnedRange
from memlane.tables.side_stream import Mark, host_buffer
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable

__all__ = ["DiskStore"]


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

    def __init__(self, store: DiskStore, ids: Tensor, live: Tensor | None) -> None:
        self._store = store
        self.near = store.cache.memory
        self._fetched = self._closed = False
        # One copy each way: the number of missing rows, then the rows; what lies behind them is not looked at.
        self._packet = torch.empty(1 + len(ids), dtype=torch.int64, device=store.device)
        self._buffers = store.cache.buffers(len(ids))._replace(
            miss_count=self._packet[:1], miss_rows=self._packet[1:]
        )
        self._host: _HostSide | None = None
        self._number = store.look_up(ids, self._buffers, live)
        self.slots = self._buffers.slots
        self._launched: Mark = None
        if not store.side.capturing:
            self.launched()

    @property
    def fetched(self) -> bool:
        """Within a capture nothing is computed yet; whoever replays the graph fetches."""
        return self._fetched or self._store.side.capturing

    def launched(self) -> None:
        self._launched = self._store.side.main_mark()

    def fetch(self) -> None:
        store = self._store
        host = self._host = self._host or _HostSide.of(len(self._packet), store.device)
        # Not after all that was launched: the other half is computing, and to wait for that would hide nothing.
        with store.side.branch(self._launched):
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
        with store.side.branch(self._launched):  # who read these slots before did so before that
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


class DiskStore(CachedStore):
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

    def begin(self, ids: Tensor, live: Tensor | None) -> StoredRows:
        return _DiskRows(self, ids, live)

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
