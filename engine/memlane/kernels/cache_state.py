"""What the kernels of the row cache and their twin read and write: which rows lie in which slots, and what was counted.

    words   one int64 a slot, WAYS of them a window: one load of a warp
            | window 0 | ... | window sets-1 | scratch, even lookups | scratch, odd lookups |
            |<-- sets * WAYS slots kept ---->|<---- buckets ------->|<---- buckets ------->|  windows
            |<--- between lookups ---------->|<-- of one lookup only; two can be open ---->|

    word    0 where the slot is empty, else

             63 | 62 ............ 32 | 31 ........ 0
              0 | stamp              | row + 1

    slot    index of the word: window * WAYS + way, and the row's place in the arena
    stamp   the number of the lookup that last used the row, its lowest STAMP_BITS bits

Lookups are numbered from 1 by a 64-bit clock that never wraps. Its stamps do wrap, so all that is ever asked of a stamp is
its age: how many lookups ago, modulo 2^31. That is right as long as nothing gets older than 2^31; so each lookup looks
after one window, in turns, and makes words younger that are older than OLDEST = 2^30. There are at most 2^26 windows, each
is seen at least that often, and no word gets older than 2^30 + 2^26. No number of lookups is too many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["COUNTERS", "EMPTY_AGE", "OLDEST", "STAMP_BITS", "WAYS", "CacheState", "LookupBuffers"]

WAYS = 32  # slots of a set, as FBGEMM's cache has; one a lane of a warp
STAMP_BITS = 31
EMPTY_AGE = (1 << STAMP_BITS) - 1  # of a slot without a row: it is taken first
OLDEST = 1 << 30  # a row unused for longer counts as unused for so long
MOST_SLOTS = 1 << 31  # slots are int32

# Names as FBGEMM's caches count (UVMCacheStatsIndex), then ours. They only grow; each name's place is its index.
COUNTERS = (
    "num_calls",
    "num_requested_indices",
    "num_unique_indices",  # different rows of each lookup, but for rows read in place
    "num_unique_misses",  # rows on a miss list: what a fill reads
    "num_conflict_unique_misses",  # of these, rows in scratch: every way of their set was locked
    "num_conflict_misses",  # ids whose row found no way, in scratch or in place
    "num_hits",  # ids whose row was cached when their lookup began
    "num_evictions",
    "num_in_place_misses",  # ids left to be read where the row lies: no scratch, or no more of it
)


class CacheState(NamedTuple):
    """The cache of one table, all on one device.

    words: int64 [sets + 2 * buckets, WAYS]. clock: int64 [2], the number of the latest lookup that has ended and of the
    one running: the first of a lookup's kernels reads the one and writes the other, the last one the other way round,
    so that no program reads what another writes. counters: int64 [len(COUNTERS)]. probes: buckets of scratch that are
    looked through for a row before it is left where it lies.
    """

    words: Tensor
    clock: Tensor
    counters: Tensor
    sets: int
    probes: int

    @classmethod
    def empty(
        cls, sets: int, scratch: int, device: torch.device | str, most_probes: int | None = None
    ) -> CacheState:
        """sets of WAYS slots each, and for each of two open lookups at least `scratch` slots more.

        most_probes: None to look through all scratch, so that no row is left in place while there is room.
        """
        if sets < 1 or scratch < 0:
            raise ValueError(
                f"a row cache has at least one set (not {sets}) and no negative scratch ({scratch})"
            )
        buckets = -(-scratch // WAYS)
        windows = sets + 2 * buckets
        if windows * WAYS >= MOST_SLOTS:
            raise ValueError(f"{windows * WAYS} slots are more than 31 bits can number")
        return cls(
            torch.zeros(windows, WAYS, dtype=torch.int64, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(len(COUNTERS), dtype=torch.int64, device=device),
            sets,
            buckets if most_probes is None else min(buckets, most_probes),
        )

    @property
    def buckets(self) -> int:
        """Windows of scratch that one lookup has."""
        return (len(self.words) - self.sets) // 2


class LookupBuffers(NamedTuple):
    """Where a lookup of n ids leaves its answer. Made once for each n and used again, so that graphs find them.

    slots: int32 [n], where each id's row lies; negative, ~row, where it is to be read in place.
    miss_rows: int64 [n], miss_slots: int32 [n], miss_count: int64 [1]: the rows to be brought, each once, and where to.
    """

    slots: Tensor
    miss_rows: Tensor
    miss_slots: Tensor
    miss_count: Tensor

    @classmethod
    def of(cls, ids: int, device: torch.device | str) -> LookupBuffers:
        """Uninitialised: a lookup writes what is read of them."""
        return cls(
            torch.empty(ids, dtype=torch.int32, device=device),
            torch.empty(ids, dtype=torch.int64, device=device),
            torch.empty(ids, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.int64, device=device),
        )
