"""A table in pinned host memory, which a GPU reads by itself through a row cache. See gpu_stores.py."""

from __future__ import annotations

import torch
from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.row_memory import without_rows
from memlane.tables.device_cache import DeviceRowCache
from memlane.tables.gpu_cached import CachedStore
from memlane.tables.gpu_stores import StoredRows
from memlane.tables.host_rows import HostRows
from memlane.tables.layout import TableLayout
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable

__all__ = ["HostStore"]


class _HostRows:
    """Rows that the GPU fetches from pinned memory by itself."""

    fetched = True

    def __init__(self, store: HostStore, ids: Tensor, live: Tensor | None) -> None:
        self._store = store
        self.near = store.cache.memory
        self.far: RowMemory | None = store.memory
        self._buffers = store.cache.buffers(len(ids))
        self._number = store.look_up(ids, self._buffers, live)
        self.slots = self._buffers.slots
        self._closed = self._joined = False
        with store.side.branch():
            store.cache.fill(store.memory, self._buffers)
        self._filled = store.side.mark()

    def launched(self) -> None:
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


class HostStore(CachedStore):
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

    def begin(self, ids: Tensor, live: Tensor | None) -> StoredRows:
        return _HostRows(self, ids, live)

    def tiers(self) -> list[TableStats]:
        return [self.first_tier("host", "host", "gpu+pinned", self._host.nbytes)]

    def close(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.memory = without_rows(self.memory)
        self.cache.close()
        self._host.close()
