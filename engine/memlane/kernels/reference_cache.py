"""The row cache in plain torch, for any device: the kernels' twin, and what runs where there is no GPU.

All ids of a lookup take a step at once, and of those that want the same way the first gets it: the result is that of
taking the ids one by one. Reads counts on the host, so on a GPU it waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memlane.kernels.cache_state import (
    COUNTERS,
    EMPTY_AGE,
    OLDEST,
    STAMP_BITS,
    WAYS,
    CacheState,
    LookupBuffers,
)
from memlane.kernels.row_memory import RowMemory

__all__ = ["copy_rows", "lookup", "set_of"]

_STAMP_MASK = (1 << STAMP_BITS) - 1
_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, on int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def set_of(rows: Tensor, sets: int) -> Tensor:
    """The set of each row. rows: int64."""
    return _mix(rows) % sets


class _Lookup:
    """One lookup on its way: now, the rows, and what is known of them so far."""

    def __init__(self, state: CacheState, rows: Tensor) -> None:
        self.words = state.words
        self.flat = state.words.view(-1)
        self.now = int(state.clock[0]) + 1
        self.rows = rows
        self.slots = ~rows
        self.won = torch.zeros_like(rows, dtype=torch.bool)  # this id lists its row as missing
        self.conflict = torch.zeros_like(self.won)  # every way of its set was locked
        self.evictions = 0

    def _ages(self, words: Tensor) -> Tensor:
        age = (self.now - (words >> 32)) & _STAMP_MASK
        return torch.where(words == 0, EMPTY_AGE, age)

    def _new_words(self, rows: Tensor) -> Tensor:
        return ((self.now & _STAMP_MASK) << 32) | (rows + 1)

    def touch(self, sets: int) -> int:
        """Stamps the rows that are cached. -> how many different ones there are."""
        windows = set_of(self.rows, sets)
        same = (self.words[windows] & _LOW) == self.rows[:, None] + 1
        hit = same.any(dim=1)
        self.slots[hit] = (windows * WAYS + same.int().argmax(dim=1))[hit]
        self.flat[self.slots[hit]] = self._new_words(self.rows[hit])
        return len(torch.unique(self.slots[hit]))

    def rejuvenate(self) -> None:
        """Looks after one window of the whole cache, so that no word's age reaches 2^31."""
        window = self.words[self.now % len(self.words)]
        young = (((self.now - OLDEST) & _STAMP_MASK) << 32) | (window & _LOW)
        window.copy_(torch.where((window != 0) & (self._ages(window) > OLDEST), young, window))

    def take(self, at: Tensor, windows: Tensor, locked_age: int) -> tuple[Tensor, Tensor]:
        """One try of ids `at` at a way of their windows. -> those that must try again, and those whose window is full."""
        words, rows = self.words[windows], self.rows[at]
        ages = self._ages(words)
        same = ((words & _LOW) == rows[:, None] + 1) & (ages == 0)
        found = same.any(dim=1)
        oldest, victims = ages.max(dim=1).values, ages.argmax(dim=1)  # of equals the first
        slots = windows * WAYS + torch.where(found, same.int().argmax(dim=1), victims)
        self.slots[at[found]] = slots[found]
        full = ~found & (oldest < locked_age)
        trying = ~found & ~full
        # Of those that try for the same way the first wins.
        wanted, which = torch.unique(slots[trying], return_inverse=True)
        tries = torch.arange(len(which), device=at.device)
        first = torch.full_like(wanted, len(which)).scatter_reduce_(0, which, tries, "amin")
        winners = at[trying][first]
        self.evictions += int((self.flat[wanted] != 0).sum())
        self.flat[wanted] = self._new_words(self.rows[winners])
        self.slots[winners] = wanted
        self.won[winners] = True
        again = trying.clone()
        again[trying.nonzero().view(-1)[first]] = False
        return again, full

    def claim(self, sets: int, buckets: int, probes: int, open_lookups: int) -> None:
        """Ways, or scratch, for the rows that are not cached."""
        at = (self.slots < 0).nonzero().view(-1)
        while len(at):
            again, full = self.take(at, set_of(self.rows[at], sets), open_lookups)
            self.conflict[at[full]] = True
            at = at[again]
        if not probes:
            return
        evictions = self.evictions  # of a set; rows of earlier lookups in scratch are gone anyway
        at = self.conflict.nonzero().view(-1)
        first = sets + (self.now & 1) * buckets
        bucket = _mix(_mix(self.rows[at])) % buckets
        tried = torch.zeros_like(at)
        while len(at):
            again, full = self.take(at, first + bucket, locked_age=1)
            bucket, tried = (bucket + full) % buckets, tried + full
            left = again | (full & (tried < probes))
            at, bucket, tried = at[left], bucket[left], tried[left]
        self.evictions = evictions


def lookup(
    state: CacheState,
    ids: Tensor,
    buffers: LookupBuffers,
    open_lookups: int = 1,
    live: Tensor | None = None,
) -> None:
    """As `row_cache.lookup`."""
    n = len(ids)
    buffers.miss_count.zero_()
    if n == 0:
        return
    asked = n if live is None else min(n, int(live))
    running = _Lookup(state, ids.long())
    unique_hits = running.touch(state.sets)
    hits = running.slots[:asked] >= 0
    running.rejuvenate()
    running.claim(state.sets, state.buckets, state.probes, open_lookups)
    state.clock.fill_(running.now)
    misses = running.won.nonzero().view(-1)
    buffers.slots.copy_(running.slots)
    buffers.miss_count.fill_(len(misses))
    buffers.miss_rows[: len(misses)] = running.rows[misses]
    buffers.miss_slots[: len(misses)] = running.slots[misses].int()
    counts = {
        "num_calls": 1,
        "num_requested_indices": asked,
        "num_unique_indices": unique_hits + len(misses),
        "num_unique_misses": len(misses),
        "num_conflict_unique_misses": int((running.won & running.conflict).sum()),
        "num_conflict_misses": int(running.conflict[:asked].sum()),
        "num_hits": int(hits.sum()),
        "num_evictions": running.evictions,
        "num_in_place_misses": int((running.slots[:asked] < 0).sum()),
    }
    state.counters.add_(torch.tensor([counts[name] for name in COUNTERS], device=state.counters.device))


def copy_rows(
    source: RowMemory, source_rows: Tensor, dest: RowMemory, dest_slots: Tensor, count: Tensor
) -> None:
    """As `row_copy.copy_rows`."""
    n, length = int(count), min(source.data.shape[1], dest.data.shape[1])
    rows = source.data[source_rows[:n].to(source.data.device), :length]
    dest.data[dest_slots[:n].long(), :length] = rows.to(dest.data.device)
