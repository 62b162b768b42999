"""The row index against an ordered dictionary, thousands of random steps, with its integrity checked after each."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from memlane.native import RowIndex


class Twin:
    """Exact LRU by batches, the obvious way."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.rows: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.evictions = 0

    def batch(self, ids: list[int]) -> tuple[int, int, list[int]]:
        """(hits, misses, rows to read); only for batches that fit the cache."""
        before = set(self.rows)
        read = sorted(set(ids) - before)
        hits = sum(row in before for row in ids)
        for row in dict.fromkeys(ids):
            if row in before:
                self.rows.move_to_end(row)
        for row in dict.fromkeys(ids):
            if row in before:
                continue
            if len(self.rows) == self.slots:
                self.rows.popitem(last=False)
                self.evictions += 1
            self.rows[row] = None
        return hits, len(ids) - hits, read


def assert_sound(index: RowIndex) -> None:
    assert index.check() == ""


def run_batch(index: RowIndex, ids: np.ndarray) -> list[tuple[int, int]]:
    """Serves a batch, checking that every id has its row's slot; returns the (row, slot) pairs that were read."""
    read: list[tuple[int, int]] = []
    content: dict[int, int] = {}
    slots = np.empty(len(ids), np.int32)
    index.begin_batch()
    begin = 0
    while begin < len(ids):
        count = index.lookup(ids[begin:], slots)
        rows, places = index.misses()
        assert rows.tolist() == sorted(set(rows.tolist()))
        index.commit()
        content |= dict(zip(places.tolist(), rows.tolist(), strict=True))
        read += zip(rows.tolist(), places.tolist(), strict=True)
        for row, slot in zip(ids[begin : begin + count].tolist(), slots[:count].tolist(), strict=True):
            assert content.get(slot, row) == row
        assert len(set(zip(ids[begin : begin + count].tolist(), slots[:count].tolist(), strict=True))) == len(
            set(slots[:count].tolist())
        )
        begin += count
        if begin < len(ids):
            index.release_scratch()
    index.end_batch()
    return read


@pytest.mark.parametrize(("rows", "slots"), [(40, 1), (40, 7), (300, 64), (50, 50)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_follows_an_ordered_dictionary(rows: int, slots: int, dtype: type) -> None:
    rng = np.random.default_rng(slots)
    index, twin = RowIndex(rows, slots, 5), Twin(slots)
    counted = dict.fromkeys(("requested_rows", "hits", "misses", "unique_rows", "unique_misses"), 0)
    for _ in range(1500):
        pool = rng.integers(0, rows, min(slots, rng.integers(1, 30)))
        ids = rng.choice(pool, rng.integers(1, 2 * len(pool) + 1)).astype(dtype)
        hits, misses, read = twin.batch(ids.tolist())
        assert [row for row, _ in run_batch(index, ids)] == read
        assert index.recency().tolist() == list(reversed(twin.rows))
        assert_sound(index)
        for name, more in zip(
            counted, (len(ids), hits, misses, len(set(ids.tolist())), len(read)), strict=True
        ):
            counted[name] += more
    counters = index.counters()
    assert {name: counters[name] for name in counted} == counted
    assert counters["evictions"] == twin.evictions
    assert counters["scratch_rows"] == 0


@pytest.mark.parametrize(("slots", "scratch"), [(0, 1), (1, 1), (3, 2), (10, 4), (64, 16)])
def test_batches_of_any_size_fit(slots: int, scratch: int) -> None:
    rng = np.random.default_rng(slots)
    index = RowIndex(200, slots, scratch)
    for _ in range(500):
        ids = rng.integers(0, 200, rng.integers(0, 120))
        run_batch(index, ids)
        assert_sound(index)
        assert index.used <= slots
    counters = index.counters()
    assert counters["hits"] + counters["misses"] == counters["requested_rows"]
    assert counters["scratch_rows"] > 0


def test_rows_of_the_running_batch_are_not_evicted() -> None:
    index = RowIndex(100, 4, 8)
    run_batch(index, np.array([1, 2, 3, 4]))
    run_batch(
        index, np.array([3, 50, 51, 52, 53, 54])
    )  # 3 is locked, three evict 1, 2 and 4, two go to scratch
    assert set(index.recency().tolist()) == {3, 50, 51, 52}
    assert index.counters()["evictions"] == 3
    assert index.counters()["scratch_rows"] == 2


def test_rows_that_failed_leave_the_index() -> None:
    rng = np.random.default_rng(0)
    index = RowIndex(100, 8, 4)
    slots = np.empty(64, np.int32)
    for step in range(1000):
        ids = rng.integers(0, 100, rng.integers(1, 64))
        index.begin_batch()
        index.lookup(ids, slots)
        rows, _ = index.misses()
        failed = np.flatnonzero(rng.random(len(rows)) < 0.3)
        if step % 5 == 0:
            index.abort()
            failed = np.arange(len(rows))
        elif step % 7 != 0:
            index.commit(failed)
        else:
            failed = np.arange(len(rows))  # neither: end_batch must drop them
        index.end_batch()
        assert_sound(index)
        assert not any(index.contains(row) for row in rows[failed].tolist())


def test_protocol_errors_are_refused() -> None:
    index = RowIndex(10, 4, 4)
    slots = np.empty(4, np.int32)
    index.begin_batch()
    for bad in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=str(bad)):
            index.lookup(np.array([0, bad]), slots)
    index.lookup(np.array([1, 2]), slots)
    with pytest.raises(RuntimeError, match="neither committed nor aborted"):
        index.lookup(np.array([3]), slots)
    with pytest.raises(IndexError):
        index.commit(np.array([2]))
    with pytest.raises(ValueError, match="slots must hold"):
        index.lookup(np.arange(5), slots)
    index.commit()
    index.end_batch()
    assert_sound(index)
    index.clear()
    assert index.used == 0
    assert_sound(index)


def test_opening_a_huge_index_touches_nothing() -> None:
    index = RowIndex(2**31 - 1, 4, 4)  # 8 GiB of address space, of which nothing is used yet
    run_batch(index, np.array([0, 2**31 - 2]))
    assert index.contains(2**31 - 2)
