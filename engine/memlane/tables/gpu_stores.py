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

Everything but (1) and (2) can be captured in a CUDA graph. Here are the contract and the first kind; gpu_host.py and
gpu_disk.py hold the others, gpu_cached.py what those have in common.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.row_memory import without_rows
from memlane.tables.layout import TableLayout
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable

__all__ = ["DeviceStore", "Store", "StoredRows"]


class StoredRows(Protocol):
    """Rows of flat ids, on their way. Slots below zero are rows ~slot of `far`."""

    near: RowMemory
    far: RowMemory | None
    slots: Tensor

    @property
    def fetched(self) -> bool:
        """Whether the processor's part is done, or there is none."""

    def launched(self) -> None:
        """As `Lookup.launched`."""

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

    def begin(self, ids: Tensor, live: Tensor | None) -> StoredRows:
        """live: as GpuTable.begin has it."""

    def note_tokens(self, tokens: int) -> None: ...

    def start_counting(self) -> None: ...

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

    def launched(self) -> None:
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

    def begin(self, ids: Tensor, live: Tensor | None) -> StoredRows:
        return _Resident(self._memory, ids)

    def start_counting(self) -> None:
        """Tokens are noted only where somebody asked for them."""

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
