"""What a cache would have done: recorded lookups summarised, and replayed over cache policies and sizes.

Two ways to a hit rate. A replay runs the cache's own index, of any policy, without reading a row. The LRU curve comes
from stack distances: one pass for all sizes. They agree but for the order within a batch: the index puts a batch's
misses before its hits, the curve keeps the order of first occurrence, which moves rows at the edge of the cache only.
Below as many slots as the largest batch has different rows the curve does not describe the cache, which locks rows in
use and passes the rest by; replays are right there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memlane.native import RowIndex, StackDistances, cache_policies
from memlane.tables.trace import Trace

__all__ = [
    "LruCurve",
    "Point",
    "Recommendation",
    "Simulation",
    "Summary",
    "lru_curve",
    "policies",
    "recommend",
    "simulate",
    "summarise",
]

TOP_SHARES = (0.01, 0.1, 0.2, 0.5)
_NEAR = 0.005  # a smaller size is as good if it hits at most half a percentage point less
_INDIFFERENT = 0.001  # another policy than LRU must hit a tenth of a point more to be recommended
_MANY_FIRST_READS = 0.05
_SCRATCH = 16_384  # hits do not depend on how many rows of a large batch pass by at a time


@dataclass(frozen=True, eq=False)
class Summary:
    """What was recorded of one table.

    read: ids of the rows that were read, ascending. largest_batch: different rows of the lookup that had most.
    top: share of the table's rows, the most read ones -> their share of reads.
    """

    lookups: int
    ids: int
    read: NDArray[np.uint32]
    largest_batch: int
    top: Mapping[float, float]

    @property
    def different_rows(self) -> int:
        return len(self.read)


@dataclass(frozen=True)
class Point:
    """What one cache did with the part of the record that counts."""

    policy: str
    slots: int
    hits: int
    ids: int

    @property
    def hit_rate(self) -> float:
        """Hits per id asked for; 0 where nothing was."""
        return self.hits / self.ids if self.ids else 0.0


@dataclass(frozen=True)
class LruCurve:
    """Hits of LRU for every number of slots: hits[s] for s slots, the last entry for all larger ones."""

    hits: NDArray[np.uint64]
    ids: int

    @property
    def first_reads(self) -> float:
        """Ids whose row was never asked for before, per id: what no cache hits. Where they are many, the record is
        short, and a server that runs longer hits more and has use for a larger cache."""
        return 1 - int(self.hits[-1]) / self.ids if self.ids else 0.0

    @property
    def is_short(self) -> bool:
        """Whether first reads are more than a twentieth."""
        return self.first_reads > _MANY_FIRST_READS

    def hit_rate(self, slots: int) -> float:
        """Hits per id asked for, of a cache of so many slots."""
        return int(self.hits[min(slots, len(self.hits) - 1)]) / self.ids if self.ids else 0.0

    def slots_for(self, hit_rate: float) -> int | None:
        """The fewest slots that reach a hit rate; None if no number does."""
        wanted = int(np.ceil(hit_rate * self.ids - 1e-6))
        slots = int(np.searchsorted(self.hits, wanted))
        return slots if slots < len(self.hits) else None

    def as_good_as(self, slots: int) -> int:
        """The fewest slots that hit at most half a percentage point less than so many."""
        found = self.slots_for(max(0.0, self.hit_rate(slots) - _NEAR))
        return slots if found is None else min(slots, found)


@dataclass(frozen=True)
class Simulation:
    """All points of one table, and its LRU curve; both leave out the part that only warmed the caches."""

    points: tuple[Point, ...]
    curve: LruCurve

    def at(self, slots: int) -> dict[str, Point]:
        """The points of one size, by policy."""
        return {point.policy: point for point in self.points if point.slots == slots}


@dataclass(frozen=True)
class Recommendation:
    """The best policy for a budget, what half and twice the size would give, and a smaller size that is as good."""

    best: Point
    half: Point
    double: Point
    smaller: Point | None


def policies() -> list[str]:
    """Names of the cache policies that can be replayed, the default first."""
    return cache_policies()


def summarise(trace: Trace) -> list[Summary]:
    """One summary for each of the trace's tables, in one pass. OSError if the file cannot be read."""
    counts = [np.zeros(table.rows, np.uint32) for table in trace.tables]
    lookups, largest = [0] * len(counts), [0] * len(counts)
    for table, ids in trace:
        rows, times = np.unique(ids, return_counts=True)
        counts[table][rows] += times.astype(np.uint32)
        lookups[table] += 1
        largest[table] = max(largest[table], len(rows))
    return [_summary(*found) for found in zip(counts, lookups, largest, strict=True)]


def _summary(counts: NDArray[np.uint32], lookups: int, largest: int) -> Summary:
    read = np.flatnonzero(counts).astype(np.uint32)
    times = np.sort(counts[read])[::-1].astype(np.int64)
    ids = int(times.sum())
    top = {s: int(times[: int(len(counts) * s)].sum()) / ids if ids else 0.0 for s in TOP_SHARES}
    return Summary(lookups, ids, read, largest, top)


def simulate(
    trace: Trace,
    table: int,
    summary: Summary,
    sizes: Sequence[int],
    names: Sequence[str],
    warm_up: float = 0.2,
) -> Simulation:
    """Replay one table's lookups over every policy of `names` and every number of slots of `sizes`, in one pass.

    table: its number in the trace; summary: of this table. warm_up: share of the ids, from the beginning, that is not
    counted. OSError if the file cannot be read.
    """
    replays = [
        _Replay(summary.different_rows, slots, name) for name in names for slots in dict.fromkeys(sizes)
    ]
    distances = StackDistances(summary.different_rows)
    for ids, counted in _lookups(trace, table, summary, warm_up):
        distances.add(ids, counted)
        for replay in replays:
            replay.add(ids.view(np.int32), counted)
    return Simulation(tuple(replay.point() for replay in replays), _curve(distances))


def lru_curve(trace: Trace, table: int, summary: Summary, warm_up: float = 0.2) -> LruCurve:
    """The LRU curve alone, as `simulate` finds it."""
    distances = StackDistances(summary.different_rows)
    for ids, counted in _lookups(trace, table, summary, warm_up):
        distances.add(ids, counted)
    return _curve(distances)


def recommend(simulation: Simulation, slots: int) -> Recommendation:
    """The policy for a cache of so many slots. The simulation must hold half and twice that size as well (KeyError).

    Twice a size that is not among the points is taken to be the largest one: the whole table.
    """
    here = simulation.at(slots)
    most = max(here.values(), key=lambda point: point.hit_rate)
    best = here.get("lru", most)
    if most.hit_rate - best.hit_rate >= _INDIFFERENT:
        best = most
    own = sorted((p for p in simulation.points if p.policy == best.policy), key=lambda point: point.slots)
    smaller = next(p for p in own if p.hit_rate >= best.hit_rate - _NEAR)
    return Recommendation(
        best,
        half=simulation.at(slots // 2)[best.policy],
        double=simulation.at(min(2 * slots, own[-1].slots))[best.policy],
        smaller=smaller if smaller.slots < slots else None,
    )


def _lookups(
    trace: Trace, table: int, summary: Summary, warm_up: float
) -> Iterator[tuple[NDArray[np.uint32], bool]]:
    """The ids of each lookup of a table, and whether it counts.

    Rows are numbered anew among those that were read at all: no cache knows the difference, and dozens of indices of a
    table of a hundred million rows would not fit memory.
    """
    number = np.zeros(trace.tables[table].rows, np.uint32)
    number[summary.read] = np.arange(summary.different_rows, dtype=np.uint32)
    uncounted = int(summary.ids * warm_up)
    seen = 0
    for record in trace:
        if record.table == table:
            yield number[record.ids], seen >= uncounted
            seen += len(record.ids)


def _curve(distances: StackDistances) -> LruCurve:
    return LruCurve(np.cumsum(distances.histogram(), dtype=np.uint64), distances.counted)


class _Replay:
    """The index of one cache, fed with lookups, and what it hit."""

    def __init__(self, rows: int, slots: int, policy: str) -> None:
        self._policy = policy
        self._slots = slots
        self._index = make_index(rows, min(rows, slots), policy)
        self._hits = self._ids = 0

    def add(self, ids: NDArray[np.int32], counted: bool) -> None:
        hits = replay_batch(self._index, ids)
        if counted:
            self._hits += hits
            self._ids += len(ids)

    def point(self) -> Point:
        return Point(self._policy, self._slots, self._hits, self._ids)


def make_index(rows: int, slots: int, policy: str) -> RowIndex:
    """The index of a cache as `RowCache` makes it."""
    return RowIndex(rows, slots, min(rows, _SCRATCH), policy)


def replay_batch(index: RowIndex, ids: NDArray[np.int32]) -> int:
    """One batch through an index, as a `CacheBatch` goes but without reading; returns its hits."""
    before = index.counters()["hits"]
    slots = np.empty(len(ids), np.int32)
    begin = 0
    batch = index.begin()
    while begin < len(ids):
        begin += index.lookup(batch, ids[begin:], slots)
        if begin < len(ids):
            index.release_scratch(batch)
    index.end(batch)
    return index.counters()["hits"] - before
