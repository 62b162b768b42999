"""Stack distances against a list that is searched, replays against the index, summaries against counting."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memlane.native import RowIndex, StackDistances
from memlane.tables import simulate as simulate_module
from memlane.tables.simulate import lru_curve, policies, recommend, simulate, summarise
from memlane.tables.trace import RowRecorder, Trace, TracedTable, read_trace

Ids = NDArray[np.uint32]


class Twin:
    """The order of use as a list, newest first."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.histogram: Counter[int] = Counter()
        self.first_uses = 0

    def add(self, ids: list[int], counted: bool = True) -> None:
        for row in ids if counted else []:
            if row in self.order:
                self.histogram[self.order.index(row) + 1] += 1
            else:
                self.first_uses += 1
        for row in dict.fromkeys(ids):
            if row in self.order:
                self.order.remove(row)
            self.order.insert(0, row)


def record(path: Path, batches: list[Ids], rows: int) -> Trace:
    recorder = RowRecorder(path, [TracedTable("t", rows, 100)])
    for ids in batches:
        recorder.record(0, ids.astype(np.int64))
    recorder.close()
    return read_trace(path)


def skewed(seed: int, rows: int, batches: int, longest: int) -> list[Ids]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    lengths = rng.integers(1, longest + 1, batches)
    return [order[(rows * rng.random(n) ** 3).astype(np.int64)].astype(np.uint32) for n in lengths]


@pytest.mark.parametrize("seed", range(6))
def test_distances_are_those_of_the_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 150))
    distances, twin = StackDistances(rows), Twin()
    for _ in range(300):
        ids = rng.integers(0, rows, rng.integers(0, 40)).astype(np.uint32)
        counted = bool(rng.random() < 0.8)
        distances.add(ids, counted)
        twin.add(ids.tolist(), counted)
    assert dict(enumerate(distances.histogram().tolist())) | {0: 0} == {
        d: twin.histogram[d] for d in range(len(distances.histogram()))
    }
    assert max(twin.histogram, default=0) < len(distances.histogram())
    assert (distances.first_uses, distances.different) == (twin.first_uses, len(twin.order))
    assert distances.counted == twin.first_uses + twin.histogram.total()


def test_distances_survive_renumbering() -> None:
    """More uses than there are moments (65,536 for a small table), with batches larger than what is left of them."""
    rows = 3000
    rng = np.random.default_rng(7)
    distances, stamps = StackDistances(rows), {}
    hits: Counter[int] = Counter()
    moment = 0
    for step in range(260):
        ids = rng.integers(0, rows, 40_000 if step % 50 == 49 else 700).astype(np.uint32)
        distances.add(ids, step % 20 == 0)
        if step % 20 == 0:
            ordered = np.sort(np.array(list(stamps.values())))
            for row in ids.tolist():
                if row in stamps:
                    hits[len(ordered) - int(np.searchsorted(ordered, stamps[row]))] += 1
        for row in dict.fromkeys(ids.tolist()):
            moment += 1
            stamps[row] = moment
    assert moment > 2 * 65_536
    assert distances.histogram().tolist() == [hits[d] for d in range(len(distances.histogram()))]


def test_an_id_outside_the_table_is_refused() -> None:
    distances = StackDistances(5)
    with pytest.raises(IndexError):
        distances.add(np.array([1, 5], np.uint32))
    assert distances.different == 0


def test_the_curve_is_what_the_index_hits(tmp_path: Path) -> None:
    """Within half a point once the cache holds four of the largest batches, within a point where it holds one.

    They differ because the index puts a batch's misses before its hits, whatever the order of the ids (see below).
    """
    rows = 4000
    trace = record(tmp_path / "t", skewed(1, rows, 1500, 300), rows)
    (summary,) = summarise(trace)
    one, four = summary.largest_batch, 4 * summary.largest_batch
    sizes = [one, one * 2, four, four + 200, rows // 2, rows]
    result = simulate(trace, 0, summary, sizes, ["lru"])
    for point in result.points:
        assert abs(point.hit_rate - result.curve.hit_rate(point.slots)) < (
            0.005 if point.slots >= four else 0.01
        )
        assert point.ids == result.curve.ids
    assert result.points[-1].hits == result.curve.hits[-1], "in a cache of the whole table order is nothing"
    alone = lru_curve(trace, 0, summary)
    assert np.array_equal(alone.hits, result.curve.hits)


def test_only_the_order_within_a_batch_makes_the_difference(tmp_path: Path) -> None:
    """With the rows used last first in each batch, hits come before misses at every size: then both agree exactly."""
    rows = 400
    twin, batches = Twin(), []
    for ids in skewed(8, rows, 600, 60):
        place = {row: at for at, row in enumerate(twin.order)}
        batches.append(np.array(sorted(ids.tolist(), key=lambda row: place.get(row, rows)), np.uint32))
        twin.add(batches[-1].tolist(), counted=False)
    trace = record(tmp_path / "t", batches, rows)
    (summary,) = summarise(trace)
    result = simulate(trace, 0, summary, range(summary.largest_batch, rows + 1, 7), ["lru"])
    assert [p.hits for p in result.points] == [int(result.curve.hits[p.slots]) for p in result.points]


def test_single_rows_leave_no_difference(tmp_path: Path) -> None:
    """In batches of one id there is no order to differ in: the curve is exactly what the index hits, at any size."""
    rows = 60
    trace = record(tmp_path / "t", skewed(2, rows, 3000, 1), rows)
    (summary,) = summarise(trace)
    result = simulate(trace, 0, summary, range(1, rows + 1), ["lru"])
    assert [p.hits for p in result.points] == [
        round(result.curve.hit_rate(p.slots) * p.ids) for p in result.points
    ]


def test_summary_is_what_counting_finds(tmp_path: Path) -> None:
    rows = 500
    batches = skewed(3, rows, 80, 60)
    (summary,) = summarise(record(tmp_path / "t", batches, rows))
    counts = Counter(np.concatenate(batches).tolist())
    assert (summary.lookups, summary.ids, summary.different_rows) == (80, counts.total(), len(counts))
    assert summary.largest_batch == max(len(set(ids.tolist())) for ids in batches)
    for share, part in summary.top.items():
        most = sum(times for _, times in counts.most_common(int(rows * share)))
        assert part == pytest.approx(most / counts.total())


def test_the_beginning_is_not_counted(tmp_path: Path) -> None:
    trace = record(tmp_path / "t", [np.array([i % 10], np.uint32) for i in range(100)], 10)
    (summary,) = summarise(trace)
    result = simulate(trace, 0, summary, [10], ["lru"], warm_up=0.25)
    assert (result.points[0].ids, result.points[0].hits) == (75, 75)
    assert result.curve.ids == 75
    everything = simulate(trace, 0, summary, [10], ["lru"], warm_up=0.0)
    assert (everything.points[0].ids, everything.points[0].hits) == (100, 90)


def test_fewest_slots_of_a_hit_rate(tmp_path: Path) -> None:
    trace = record(tmp_path / "t", skewed(4, 300, 400, 20), 300)
    (summary,) = summarise(trace)
    curve = lru_curve(trace, 0, summary)
    for rate in (0.1, 0.5, 0.8):
        slots = curve.slots_for(rate)
        assert slots is not None
        assert curve.hit_rate(slots) >= rate > curve.hit_rate(slots - 1)
    assert curve.slots_for(1.0) is None
    small = curve.as_good_as(300)
    assert curve.hit_rate(small) >= curve.hit_rate(300) - 0.005 > curve.hit_rate(small - 1)


class FirstCome:
    """A cache that keeps what it has: the opposite of LRU, and better where rows are read round and round."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.rows: set[int] = set()

    def batch(self, ids: NDArray[np.int32]) -> int:
        hits = sum(row in self.rows for row in ids.tolist())
        for row in ids.tolist():
            if len(self.rows) < self.slots:
                self.rows.add(row)
        return hits


def test_the_better_policy_is_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay, make = simulate_module.replay_batch, simulate_module.make_index
    monkeypatch.setattr(
        simulate_module,
        "make_index",
        lambda rows, slots, policy: FirstCome(slots) if policy == "first-come" else make(rows, slots, policy),
    )

    def batch(index: Any, ids: NDArray[np.int32]) -> int:
        return index.batch(ids) if isinstance(index, FirstCome) else replay(index, ids)

    monkeypatch.setattr(simulate_module, "replay_batch", batch)
    names = ["lru", "first-come"]

    circle = [np.arange(i, i + 10, dtype=np.uint32) % 200 for i in range(0, 4000, 10)]
    trace = record(tmp_path / "circle", circle, 200)
    (summary,) = summarise(trace)
    found = recommend(simulate(trace, 0, summary, [50, 100, 200], names), 100)
    assert found.best.policy == "first-come"
    assert found.best.hit_rate == pytest.approx(0.5)
    assert (found.half.slots, found.double.slots) == (50, 200)
    assert found.double.hit_rate == 1.0
    assert found.smaller is None

    recent = [np.full(10, i // 5, np.uint32) for i in range(1000)]  # each row five times, then never again
    trace = record(tmp_path / "recent", recent, 200)
    (summary,) = summarise(trace)
    found = recommend(simulate(trace, 0, summary, [2, 50, 100, 200], names), 100)
    assert found.best.policy == "lru"
    assert found.smaller is not None
    assert found.smaller.slots == 2


def test_lru_is_kept_where_nothing_is_better(tmp_path: Path) -> None:
    trace = record(tmp_path / "t", skewed(5, 400, 200, 20), 400)
    (summary,) = summarise(trace)
    names = policies()
    assert names[0] == "lru"
    result = simulate(trace, 0, summary, [50, 100, 200, 400], names)
    assert {p.policy for p in result.points} == set(names)
    whole = recommend(result, 400)
    assert whole.best.policy == "lru", "in a cache of the whole table all policies are alike"
    assert whole.double.slots == 400


def test_a_replayed_index_is_sound() -> None:
    index = RowIndex(1000, 40, 16)
    for ids in skewed(6, 1000, 200, 150):
        before = {row for row in range(1000) if index.contains(row)}
        hits = simulate_module.replay_batch(index, ids.view(np.int32))
        assert hits == sum(row in before for row in ids.tolist())
        assert index.check() == ""
