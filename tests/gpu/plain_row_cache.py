"""The row cache told in the plainest words: one id after the other, lists and dicts. And what holds in any order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from memlane.kernels.cache_state import (
    COUNTERS,
    EMPTY_AGE,
    OLDEST,
    STAMP_BITS,
    WAYS,
    CacheState,
    LookupBuffers,
)

LOW = 0xFFFFFFFF


def fmix32(x: int) -> int:
    """MurmurHash3's finaliser, as its author wrote it."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & LOW
    x ^= x >> 13
    x = x * 0xC2B2AE35 & LOW
    return x ^ x >> 16


class Answer(NamedTuple):
    slots: list[int | str]  # of each id; "scratch" or "in place" where its set was locked
    missing: set[int]
    counts: dict[str, int]


class PlainCache:
    """Takes ids one by one. Stamps are plain numbers that never wrap."""

    def __init__(self, sets: int, scratch: int, clock: int = 0) -> None:
        self.sets: list[list[tuple[int, int] | None]] = [[None] * WAYS for _ in range(sets)]  # row, stamp
        self.scratch = scratch
        self.now = clock

    def find(self, row: int) -> tuple[int, int | None]:
        """The row's set, and its way in it."""
        s = fmix32(row) % len(self.sets)
        return s, next((w for w, held in enumerate(self.sets[s]) if held and held[0] == row), None)

    def lookup(self, ids: list[int], open_lookups: int, live: int | None = None) -> Answer:
        self.now += 1
        live = len(ids) if live is None else live
        count = dict.fromkeys(COUNTERS, 0)
        count["num_calls"], count["num_requested_indices"] = 1, live
        cached = {row for row in ids if self.find(row)[1] is not None}
        for row in cached:
            s, way = self.find(row)
            self.sets[s][way] = (row, self.now)
        slots: list[int | str] = []
        missing: set[int] = set()
        conflicts: set[int] = set()
        for i, row in enumerate(ids):
            s, way = self.find(row)
            if way is None:
                free = [
                    (held[1] if held else -1, w)
                    for w, held in enumerate(self.sets[s])
                    if not held or held[1] <= self.now - open_lookups
                ]
                if free:
                    stamp, way = min(free)
                    count["num_evictions"] += stamp >= 0
                    self.sets[s][way] = (row, self.now)
                    missing.add(row)
            if way is not None:
                slots.append(s * WAYS + way)
            else:
                if row not in conflicts and len(conflicts) < self.scratch:
                    conflicts.add(row)
                slots.append("scratch" if row in conflicts else "in place")
            if i < live:
                count["num_hits"] += row in cached
                count["num_conflict_misses"] += way is None
                count["num_in_place_misses"] += slots[-1] == "in place"
        count["num_unique_misses"] = len(missing | conflicts)
        count["num_conflict_unique_misses"] = len(conflicts)
        count["num_unique_indices"] = len(cached | missing | conflicts)
        return Answer(slots, missing | conflicts, count)


class Snapshot(NamedTuple):
    """A cache's words [windows, WAYS] and clock, on the host."""

    words: NDArray[np.int64]
    clock: int
    counters: NDArray[np.int64]

    @classmethod
    def of(cls, state: CacheState) -> Snapshot:
        return cls(state.words.cpu().numpy().copy(), int(state.clock[0]), state.counters.cpu().numpy().copy())

    def ages(self, now: int) -> NDArray[np.int64]:
        age = (now - (self.words >> 32)) & ((1 << STAMP_BITS) - 1)
        return np.where(self.words == 0, EMPTY_AGE, age)


def check_lookup(
    before: Snapshot,
    state: CacheState,
    ids: NDArray[np.int64],
    buffers: LookupBuffers,
    open_lookups: int,
    live: int | None = None,
) -> None:
    """All that must hold of a lookup in whatever order its ids were taken: AssertionError if it does not."""
    after = Snapshot.of(state)
    live, now, kept = len(ids) if live is None else live, before.clock + 1, state.sets * WAYS
    assert state.clock.tolist() == [now, now]
    slots = buffers.slots.cpu().numpy().astype(np.int64)
    count = int(buffers.miss_count)
    missing = buffers.miss_rows[:count].cpu().numpy()
    targets = buffers.miss_slots[:count].cpu().numpy().astype(np.int64)
    flat = after.words.reshape(-1)
    rows_after = (flat & LOW) - 1
    region = kept + (now & 1) * state.buckets * WAYS
    placed, conflict = slots >= 0, (slots < 0) | (slots >= kept)

    # Every id's slot holds its row and is stamped; scratch is this lookup's own; what has no slot is read in place.
    assert (rows_after[slots[placed]] == ids[placed]).all()
    assert (after.ages(now).reshape(-1)[slots[placed]] == 0).all()
    assert (slots[~placed] == ~ids[~placed]).all()
    outside = slots[placed & conflict]
    assert ((outside >= region) & (outside < region + state.buckets * WAYS)).all()
    assert len(np.unique(slots)) == len(np.unique(ids)), "two slots for a row, or two rows in a slot"

    # The miss list: what was not cached and has a slot, each once.
    rows_before = (before.words[: state.sets].reshape(-1) & LOW) - 1
    hit = np.isin(ids, rows_before)
    assert sorted(missing) == sorted(np.unique(ids[~hit & placed]))
    assert (rows_after[targets] == missing).all()

    # Kept rows: one slot each, locked ones stay where they were, and nothing changes but to this lookup's number, and that
    # in one window what is too old is made younger first.
    cached = rows_after[:kept][rows_after[:kept] >= 0]
    assert len(np.unique(cached)) == len(cached)
    young = before.words.copy()
    window, window_ages = young[now % len(young)], before.ages(now)[now % len(young)]
    aged = (window != 0) & (window_ages > OLDEST)
    window[aged] = ((now - OLDEST) % (1 << STAMP_BITS)) << 32 | window[aged] & LOW
    before = before._replace(words=young)
    ages = before.ages(now)[: state.sets]
    kept_before, kept_after = before.words[: state.sets], after.words[: state.sets]
    locked = ages < open_lookups
    assert ((kept_after & LOW) == (kept_before & LOW))[locked].all()
    changed = kept_before != kept_after
    assert (after.ages(now)[: state.sets][changed] == 0).all()

    # LRU: of the ways that were neither locked nor asked for, the oldest went, of equals the lowest.
    gone = changed & ((kept_before & LOW) != (kept_after & LOW))
    order = ages * WAYS + np.arange(WAYS)[::-1]
    stayed = ~changed & ~locked
    least_gone = np.where(gone, order, np.iinfo(np.int64).max).min(axis=1)
    most_stayed = np.where(stayed, order, -1).max(axis=1)
    assert (least_gone > most_stayed).all()

    # A conflict needs a set without any way left.
    full = (after.ages(now)[: state.sets] < open_lookups).all(axis=1)
    sets = np.array([fmix32(int(row)) % state.sets for row in np.unique(ids[conflict])], dtype=np.int64)
    assert full[sets].all()
    if state.probes == state.buckets > 0 and not placed.all():
        assert (after.ages(now).reshape(-1)[region : region + state.buckets * WAYS] == 0).all(), (
            "room in scratch"
        )

    in_place = np.unique(ids[~placed])
    expected = {
        "num_calls": 1,
        "num_requested_indices": live,
        "num_unique_indices": len(np.unique(ids)) - len(in_place),
        "num_unique_misses": count,
        "num_conflict_unique_misses": len(np.unique(ids[conflict & placed])),
        "num_conflict_misses": int(conflict[:live].sum()),
        "num_hits": int(hit[:live].sum()),
        "num_evictions": int((gone & (kept_before != 0)).sum()),
        "num_in_place_misses": int((~placed[:live]).sum()),
    }
    counted = dict(zip(COUNTERS, (after.counters - before.counters).tolist(), strict=True))
    assert counted == expected


def poisoned(ids: int, device: str) -> LookupBuffers:
    """Buffers that hold nothing true."""
    buffers = LookupBuffers.of(ids, device)
    for buffer in buffers:
        buffer.view(torch.uint8).fill_(0xFF)
    return buffers
