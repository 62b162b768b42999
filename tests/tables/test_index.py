"""The row index against obvious twins, thousands of random steps, with its integrity checked after each.

What holds for every policy and both maps is tested for all of them; which row a policy gives up is tested against its
own twin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest

from memlane.native import RowIndex, cache_policies

POLICIES = cache_policies()
MAPS = {"direct": 200, "hash": 40_000}  # rows that make the index choose the map, at 64 slots and fewer


class LruTwin:
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
    batch = index.begin()
    begin = 0
    while begin < len(ids):
        count = index.lookup(batch, ids[begin:], slots)
        assert count > 0
        rows, places = index.misses()
        assert rows.tolist() == sorted(set(rows.tolist()))
        content |= dict(zip(places.tolist(), rows.tolist(), strict=True))
        read += zip(rows.tolist(), places.tolist(), strict=True)
        for row, slot in zip(ids[begin : begin + count].tolist(), slots[:count].tolist(), strict=True):
            assert content.get(slot, row) == row
        assert len(set(zip(ids[begin : begin + count].tolist(), slots[:count].tolist(), strict=True))) == len(
            set(slots[:count].tolist())
        )
        begin += count
        if begin < len(ids):
            index.release_scratch(batch)
    index.end(batch)
    return read


@pytest.mark.parametrize(("rows", "slots"), [(40, 1), (40, 7), (300, 64), (50, 50), (40_000, 7)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_lru_follows_an_ordered_dictionary(rows: int, slots: int, dtype: type) -> None:
    rng = np.random.default_rng(slots)
    index, twin = RowIndex(rows, slots, 5), LruTwin(slots)
    assert index.map == ("hash" if rows == 40_000 else "direct")
    counted = dict.fromkeys(("requested_rows", "hits", "misses", "unique_rows", "unique_misses"), 0)
    for _ in range(1500):
        pool = rng.integers(0, rows, min(slots, rng.integers(1, 30))) % 300
        ids = rng.choice(pool, rng.integers(1, 2 * len(pool) + 1)).astype(dtype)
        hits, misses, read = twin.batch(ids.tolist())
        assert [row for row, _ in run_batch(index, ids)] == read
        assert index.ranking().tolist() == list(reversed(twin.rows))
        assert_sound(index)
        for name, more in zip(
            counted, (len(ids), hits, misses, len(set(ids.tolist())), len(read)), strict=True
        ):
            counted[name] += more
    counters = index.counters()
    assert {name: counters[name] for name in counted} == counted
    assert counters["evictions"] == twin.evictions
    assert counters["scratch_rows"] == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize(("slots", "scratch"), [(0, 1), (1, 1), (3, 2), (10, 4), (64, 16)])
def test_batches_of_any_size_fit(policy: str, map_name: str, slots: int, scratch: int) -> None:
    rng = np.random.default_rng(slots)
    index = RowIndex(MAPS[map_name], slots, scratch, policy)
    assert (index.policy, index.map) == (policy, map_name)
    table = rng.choice(MAPS[map_name], 200, replace=False)
    for _ in range(300):
        ids = table[rng.integers(0, 200, rng.integers(0, 120))]
        run_batch(index, ids)
        assert_sound(index)
        assert index.used <= slots
    counters = index.counters()
    assert counters["hits"] + counters["misses"] == counters["requested_rows"]
    assert counters["scratch_rows"] > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("map_name", MAPS)
def test_rows_of_an_open_batch_are_not_evicted(policy: str, map_name: str) -> None:
    rng = np.random.default_rng(3)
    index = RowIndex(MAPS[map_name], 40, 8, policy)
    slots = np.empty(32, np.int32)
    for _ in range(400):
        open_batches = []
        for _ in range(rng.integers(1, 3)):  # the second begins while the first is open
            ids = rng.integers(0, 120, rng.integers(1, 16))
            batch = index.begin()
            assert index.lookup(batch, ids, slots) == len(ids)
            open_batches.append((batch, ids, slots[: len(ids)].copy()))
            for _, asked, given in open_batches:
                assert all(index.contains(row) for row in asked.tolist())
                assert len(set(zip(asked.tolist(), given.tolist(), strict=True))) == len(set(given.tolist()))
            assert_sound(index)
        for batch, _, _ in open_batches:
            index.end(batch)
        assert_sound(index)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_later_batch_waits_for_one_that_is_served_in_part(policy: str) -> None:
    index = RowIndex(1000, 4, 4, policy)
    slots, later = np.empty(64, np.int32), np.empty(64, np.int32)
    first, second = index.begin(), index.begin()
    ids = np.arange(20)
    assert index.lookup(first, ids, slots) == 8  # 4 slots and 4 of scratch
    assert index.lookup(second, np.array([0, 1, 500]), later) == 0
    assert len(index.misses()[0]) == 0
    done = 8
    while done < 20:
        index.release_scratch(first)
        served = index.lookup(first, ids[done:], slots)
        assert served > 0
        done += served
        assert_sound(index)
    index.end(first)
    assert index.lookup(second, np.array([0, 1, 500]), later) == 3
    index.end(second)
    assert_sound(index)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_in_scratch_stay_while_a_later_batch_uses_them(policy: str) -> None:
    index = RowIndex(1000, 2, 4, policy)
    slots, later = np.empty(8, np.int32), np.empty(8, np.int32)
    first = index.begin()
    assert index.lookup(first, np.arange(6), slots) == 6
    second = index.begin()
    assert index.lookup(second, np.arange(6), later) == 6
    assert later[:6].tolist() == slots[:6].tolist()
    index.end(first)
    assert all(index.contains(row) for row in range(6))
    assert_sound(index)
    index.end(second)
    assert sum(index.contains(row) for row in range(6)) == 2
    assert_sound(index)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_failed_leave_the_index(policy: str) -> None:
    rng = np.random.default_rng(0)
    index = RowIndex(100, 8, 4, policy)
    slots = np.empty(64, np.int32)
    for _ in range(1000):
        ids = rng.integers(0, 100, rng.integers(1, 64))
        batch = index.begin()
        index.lookup(batch, ids, slots)
        rows, places = index.misses()
        failed = rng.random(len(rows)) < 0.3
        index.drop(places[failed])
        assert not any(index.contains(row) for row in rows[failed].tolist())
        if rng.random() < 0.5:  # a later batch does not get a dropped slot
            other = index.begin()
            count = index.lookup(other, rng.integers(0, 100, 3), slots)
            assert not set(index.misses()[1].tolist()) & set(places[failed].tolist()) or count == 0
            index.end(batch)
            index.end(other)
        else:
            index.end(batch)
        assert_sound(index)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_brought_in_beside_the_batches(policy: str) -> None:
    index = RowIndex(1000, 10, 4, policy)
    slots = index.reserve(6)
    assert len(slots) == 6
    run_batch(index, np.array([3, 4]))  # a request brings row 3 in first
    assert_sound(index)
    assert index.adopt(np.array([1, 2, 3]), slots[:3]) == 2
    index.give_back(slots[3:])
    assert_sound(index)
    assert index.used == 4
    assert run_batch(index, np.array([1, 2, 3, 4])) == []
    assert len(index.reserve(100)) == 6
    with pytest.raises(IndexError):
        index.give_back(np.array([10_000], np.int32))
    with pytest.raises(RuntimeError):
        index.clear()


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_rows_are_never_evicted(policy: str) -> None:
    rng = np.random.default_rng(1)
    index = RowIndex(500, 12, 6, policy)
    pinned = np.array([7, 300, 41, 9], np.int64)
    index.adopt(pinned, index.reserve(4), True)
    assert index.pinned == 4
    for _ in range(300):
        run_batch(index, rng.integers(0, 500, rng.integers(1, 40)))
        assert all(index.contains(row) for row in pinned.tolist())
        assert_sound(index)
    assert set(index.ranking()[:4].tolist()) == set(pinned.tolist())
    assert index.counters()["hits"] > 0
    index.clear()
    assert (index.used, index.pinned) == (0, 0)
    assert_sound(index)


def test_adopted_rows_can_be_ranked_behind_what_was_used() -> None:
    index = RowIndex(100, 6, 2)
    index.adopt(np.array([1, 2, 3, 4]), index.reserve(4))
    run_batch(index, np.array([3, 50]))
    index.rank_last(np.array([4, 2, 1, 3]))  # 3 has been used since: it stays where it is
    assert index.ranking().tolist() == [50, 3, 4, 2, 1]
    assert_sound(index)


def test_lru_of_one_batch() -> None:
    index = RowIndex(100, 4, 8)
    run_batch(index, np.array([1, 2, 3, 4]))
    run_batch(
        index, np.array([3, 50, 51, 52, 53, 54])
    )  # 3 is locked, three evict 1, 2 and 4, two go to scratch
    assert set(index.ranking().tolist()) == {3, 50, 51, 52}
    assert index.counters()["evictions"] == 3
    assert index.counters()["scratch_rows"] == 2


def misuses() -> list[tuple[type[Exception], Callable[[RowIndex], object]]]:
    one = np.array([0], np.int32)
    return [
        (RuntimeError, lambda index: index.lookup(77, np.array([1]), one)),
        (RuntimeError, lambda index: index.end(77)),
        (IndexError, lambda index: index.drop(one + 8)),
        (IndexError, lambda index: index.adopt(np.array([1]), one)),
        (ValueError, lambda index: index.adopt(np.array([10]), one)),
        (ValueError, lambda index: index.lookup(index.begin(), np.arange(5), one)),
        (ValueError, lambda index: RowIndex(10, 4, 4, "guess")),
        (ValueError, lambda index: RowIndex(2**31, 4, 4)),
    ]


@pytest.mark.parametrize("number", range(len(misuses())))
def test_protocol_errors_are_refused(number: int) -> None:
    index = RowIndex(10, 4, 4)
    kind, misuse = misuses()[number]
    with pytest.raises(kind):
        misuse(index)
    assert_sound(index)


def test_ids_outside_the_table_change_nothing() -> None:
    index = RowIndex(10, 4, 4)
    slots = np.empty(4, np.int32)
    batch = index.begin()
    for bad in (-1, 10, 2**40):
        with pytest.raises(IndexError, match=str(bad)):
            index.lookup(batch, np.array([0, bad]), slots)
    index.end(batch)
    assert (index.used, index.counters()["requested_rows"]) == (0, 0)
    assert_sound(index)


@pytest.mark.parametrize("slots", [4, 1 << 16])
def test_opening_a_huge_index_takes_no_memory_for_rows(slots: int) -> None:
    index = RowIndex(2**31 - 1, slots, 4)
    assert index.map == "hash"
    assert index.nbytes < 64 * slots + 4096
    run_batch(index, np.array([0, 2**31 - 2]))
    assert index.contains(2**31 - 2)
    assert_sound(index)


@pytest.mark.parametrize("rows", [3000, 2**21 + 5, 2**31 - 1])
def test_misses_of_a_long_batch_come_in_order(rows: int) -> None:
    rng = np.random.default_rng(rows)
    index = RowIndex(rows, 20_000, 4)
    ids = rng.integers(0, rows, 12_000)
    slots = np.empty(len(ids), np.int32)
    batch = index.begin()
    assert index.lookup(batch, ids, slots) == len(ids)
    missed, places = index.misses()
    assert missed.tolist() == np.unique(ids).tolist()
    where = dict(zip(missed.tolist(), places.tolist(), strict=True))
    assert slots.tolist() == [where[row] for row in ids.tolist()]
    index.end(batch)
    assert_sound(index)
