"""The cache of one table's rows in GPU memory: slots and who lies in them, filled from wherever a kernel can read.

It does not know where rows come from, who waits for them, or what is computed from them. What its memory looks like is
drawn in `memlane.kernels.cache_state`; how rows are found and given up, in `memlane.kernels.jit.row_cache`.

    buffers = cache.buffers(n)                   once for each n
    cache.lookup(ids, buffers)                   slots for all, a list of what is missing
    cache.fill(source, buffers)                  brings it; where the source is the table itself
    ...                                          sums read cache.memory at buffers.slots
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.kernels import RowMemory, reference_cache
from memlane.kernels.cache_state import COUNTERS, OLDEST, STAMP_BITS, WAYS, CacheState, LookupBuffers
from memlane.kernels.choice import cache_kernels
from memlane.kernels.row_memory import device_stride, without_rows

__all__ = ["CacheCounters", "DeviceRowCache", "LookupBuffers", "plan"]

_WORD_BYTES = 8
_PROBES = 4  # of scratch, WAYS rows each, before a row is read in place: looking on costs as much as reading


class CacheCounters(NamedTuple):
    """What a cache counted since it was made, by FBGEMM's names; see `cache_state.COUNTERS`."""

    num_calls: int
    num_requested_indices: int
    num_unique_indices: int
    num_unique_misses: int
    num_conflict_unique_misses: int
    num_conflict_misses: int
    num_hits: int
    num_evictions: int
    num_in_place_misses: int

    @classmethod
    def of(cls, counters: Tensor) -> CacheCounters:
        """From a snapshot; waits for it if it is still on a GPU."""
        return cls(*counters.tolist())


assert CacheCounters._fields == COUNTERS


def plan(rows: int, stride: int, cache_bytes: int) -> int:
    """Sets of a cache of rows of `stride` bytes (as stored) within cache_bytes; 0 where not even one fits.

    Not more than twice what the table could fill: rows are spread by their hash, so some sets are asked for more than
    others, and a cache as large as the table does not quite hold it.
    """
    fitting = max(0, cache_bytes) // (WAYS * (device_stride(stride) + _WORD_BYTES))
    return min(fitting, 2 * -(-rows // WAYS))


class DeviceRowCache:
    """Rows of one table in the memory of one device; on the CPU in plain torch.

    One thread, and on a GPU one order of lookups: that of one stream, or of streams that wait for each other. At most two
    lookups are open at a time. Nothing here waits for the device but what says so, and lookup and fill can be
    captured in a graph: a replay counts as a lookup of its own.
    """

    def __init__(
        self,
        rows: int,
        stride: int,
        row_format: str,
        width: int,
        *,
        sets: int,
        scratch: int = 0,
        in_place: bool = True,
        device: torch.device | str = "cpu",
        interpreted: bool = False,
    ) -> None:
        """A cache of sets * WAYS rows of a table [rows, width] whose rows are `stride` bytes without padding.

        scratch: rows that each open lookup may have beyond those, for what finds no way in its set. in_place: whether rows
        may be left to be read where they lie. Where not, as much scratch as a lookup has ids holds them all, whatever
        they are. interpreted: on a CPU, run the kernels all the same (Triton's interpreter must be on).
        """
        self.rows = rows
        self.state = CacheState.empty(sets, scratch, device, _PROBES if in_place else None)
        arena = torch.empty(self.state.words.numel(), device_stride(stride), dtype=torch.uint8, device=device)
        self.memory = RowMemory(arena, row_format, width)
        self._kernels = cache_kernels(torch.device(device), interpreted)

    @property
    def slots(self) -> int:
        """Rows that can stay from one lookup to the next."""
        return self.state.sets * WAYS

    @property
    def scratch(self) -> int:
        """Rows beside those that one lookup can have."""
        return self.state.buckets * WAYS

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, without the buffers of lookups."""
        return self.memory.data.nbytes + self.state.words.nbytes

    @property
    def counters(self) -> Tensor:
        """int64 [len(COUNTERS)] on the device, as it goes on counting; see CacheCounters."""
        return self.state.counters

    def buffers(self, ids: int) -> LookupBuffers:
        """Room for the answer to lookups of so many ids, to be kept as long as any graph uses it."""
        return LookupBuffers.of(ids, self.memory.data.device)

    def lookup(
        self, ids: Tensor, buffers: LookupBuffers, open_lookups: int = 1, live: Tensor | None = None
    ) -> None:
        """ids int32 or int64 [n] -> buffers: a slot for each, and the rows to be brought before they are used.

        Ids are rows of the table; nobody checks. open_lookups: 2 where the lookup before this one is still open, so that
        its rows are not evicted either; what that one missed counts as a hit in this one, so bring it first. live int64 [1]: ids from there on are padding, copies of others, not counted.
        ValueError if the buffers are for another number of ids.
        """
        if len(buffers.slots) != len(ids):
            raise ValueError(f"a lookup of {len(ids)} ids with buffers for {len(buffers.slots)}")
        if open_lookups not in (1, 2):
            raise ValueError(f"{open_lookups} lookups open; a cache has scratch for two")
        self._kernels.lookup(self.state, ids, buffers, open_lookups, live)

    def fill(self, source: RowMemory, buffers: LookupBuffers, source_rows: Tensor | None = None) -> None:
        """Brings the rows that a lookup missed.

        source: the table, or any memory that the device can read, of which source_rows int64 [n] then says where in it
        the missing rows lie, in the order of buffers.miss_rows.
        """
        rows = buffers.miss_rows if source_rows is None else source_rows
        self._kernels.copy_rows(source, rows, self.memory, buffers.miss_slots, buffers.miss_count)

    def copy(self, source: RowMemory, source_rows: Tensor, slots: Tensor, count: Tensor) -> None:
        """Part of a fill: rows source_rows int64 [most] of source into slots int32 [most], the first `count` int64 [1]."""
        self._kernels.copy_rows(source, source_rows, self.memory, slots, count)

    def clear(self) -> None:
        """Forgets every row. Counters go on."""
        self.state.words.zero_()

    def close(self) -> None:
        """Gives the memory of its rows back. Counters stay."""
        self.memory = without_rows(self.memory)

    def cached(self) -> NDArray[np.int64]:
        """The rows in the cache, those used last first, of equals by slot. Waits for the device."""
        words, ages = self._host_words()
        kept = words[: self.slots]
        held = np.flatnonzero(kept)
        order = np.argsort(ages[held], kind="stable")
        return (kept[held][order] & 0xFFFFFFFF) - 1

    def check_integrity(self) -> None:
        """Walks all words; AssertionError with the broken invariant. Waits for the device: for tests and after faults."""
        words, ages = self._host_words()
        rows, stamps = (words & 0xFFFFFFFF) - 1, words >> 32
        assert (words >= 0).all(), "a stamp has more bits than there are"
        assert ((rows < self.rows) & ((rows >= 0) | (words == 0))).all(), "a slot holds a row that is none"
        kept = rows[: self.slots]
        held = np.flatnonzero(kept >= 0)
        sets = reference_cache.set_of(torch.from_numpy(kept[held]), self.state.sets).numpy()
        assert (held // WAYS == sets).all(), "a row lies in a set that is not its own"
        assert len(np.unique(kept[held])) == len(held), "a row has two slots"
        scratch = np.flatnonzero((words != 0) & (ages < OLDEST) & (np.arange(len(words)) >= self.slots))
        assert len(np.unique(words[scratch])) == len(scratch), "a row has two slots of one lookup's scratch"
        odd = scratch >= self.slots + self.scratch
        assert (stamps[scratch] % 2 == odd).all(), "scratch of another lookup was used"
        ended, running = self.state.clock.tolist()
        assert ended == running, "a lookup has not ended"
        assert ended >> STAMP_BITS or (stamps <= ended).all(), "a stamp is ahead of the clock"
        count = CacheCounters.of(self.counters)
        assert min(count) >= 0, "a counter has overflown"
        assert count.num_unique_misses <= count.num_unique_indices, "more misses than rows"
        assert count.num_conflict_unique_misses <= count.num_unique_misses, "more conflicts than misses"
        assert count.num_in_place_misses <= count.num_conflict_misses, "a row without a conflict was left out"
        assert count.num_hits + count.num_conflict_misses <= count.num_requested_indices, (
            "more found than asked"
        )

    def _host_words(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All words, and how many lookups ago each was used."""
        words = self.state.words.cpu().numpy().reshape(-1)
        return words, (int(self.state.clock[0]) - (words >> 32)) & ((1 << STAMP_BITS) - 1)
