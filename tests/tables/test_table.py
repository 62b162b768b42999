"""ValueTable: the same bits whatever holds the rows, and nothing stale after any failure."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memlane.native import cache_policies
from memlane.tables import (
    ReferenceTable,
    RowFormat,
    RowReadError,
    Table,
    TableError,
    TableFormatError,
    TableLayout,
    ValueTable,
    decode_rows,
    encode_rows,
    write_table,
)
from memlane.tables.cache import RowCache
from memlane.tables.source import FileSource, RamSource, SlotMemory


def batches(rows: int, width: int, seed: int, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random (ids [tokens, k], weights, x), from one id to several times a small cache."""
    g = torch.Generator().manual_seed(seed)
    for step in range(count):
        tokens, k = [(1, 1), (1, 32), (5, 8), (17, 24), (0, 4), (3, 200)][step % 6]
        spread = rows if step % 2 else max(1, rows // 10)
        ids = torch.randint(
            0, spread, (tokens, k), generator=g, dtype=torch.int64 if step % 3 else torch.int32
        )
        yield ids, torch.randn(tokens, k, generator=g), torch.randn(tokens, width, generator=g)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_equals_the_reference(make_table: Any, row_format: RowFormat) -> None:
    layout, values = make_table(dtype=row_format)
    seen = decode_rows(encode_rows(values, row_format), row_format, layout.width)
    reference = ReferenceTable.from_tensor(seen)
    for placement in ("host", "disk"):
        table = ValueTable.open(layout, placement, 100 * layout.stride)
        assert isinstance(table, Table)
        for ids, weights, x in batches(layout.rows, layout.width, 0, 12):
            with torch.no_grad():
                expected = reference.weighted_sum(ids, weights), reference.dot(ids, x)
            torch.testing.assert_close(table.weighted_sum(ids, weights), expected[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(table.dot(ids, x), expected[1], rtol=1e-4, atol=1e-4)
            assert torch.equal(table.gather(ids.reshape(-1)), seen[ids.reshape(-1).long()])


@pytest.mark.parametrize(
    "row_format", [RowFormat.FLOAT32, RowFormat.BFLOAT16, RowFormat.INT8, RowFormat.INT4, RowFormat.FP8]
)
def test_bits_do_not_depend_on_placement_or_cache(
    make_table: Any, row_format: RowFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlane.tables.cache._MOST_SCRATCH_ROWS", 7)  # so that batches go through many parts
    layout, _ = make_table(dtype=row_format, rows=600)
    host = ValueTable.open(layout, "host")
    disk = [ValueTable.open(layout, "disk", slots * layout.stride) for slots in (0, 1, 5, 100, 600)]
    disk.append(ValueTable.open(layout, "disk", 50 * layout.stride, io="buffered", allow_uring=False))
    for ids, weights, x in batches(600, layout.width, 1, 30):
        expected = host.weighted_sum(ids, weights), host.dot(ids, x), host.gather(ids.reshape(-1))
        # Each token on its own gives what the batch gives.
        for token in range(len(ids)):
            alone = host.weighted_sum(ids[token : token + 1], weights[token : token + 1])
            assert torch.equal(alone[0], expected[0][token])
        for table in disk:
            assert torch.equal(table.weighted_sum(ids, weights), expected[0])
            assert torch.equal(table.dot(ids, x), expected[1])
            assert torch.equal(table.gather(ids.reshape(-1)), expected[2])
            table.check_integrity()
    assert disk[0].stats().scratch_rows > 0
    assert disk[0].stats().used_slots == 0


def test_thousands_of_steps_with_failures(make_table: Any) -> None:
    layout, values = make_table(rows=300, width=8)
    table = ValueTable.open(layout, "disk", 40 * layout.stride)
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(3000):
        fault = int(rng.integers(0, 290))
        table.source.inject_fault(fault, fault + 9, errno.EIO, int(rng.random() < 0.1) * 100)
        ids = torch.from_numpy(rng.integers(0, 300, rng.integers(1, 60)))
        error = None
        try:
            assert torch.equal(table.gather(ids), values[ids])
        except RowReadError as raised:
            error = raised
        if error is not None:
            failures += 1
            assert set(error.rows) <= set(ids.tolist())
            assert error.tokens == [i for i, row in enumerate(ids.tolist()) if row in error.rows]
        table.check_integrity()
    assert failures > 50
    stats = table.stats()
    assert stats.errors > failures
    assert stats.hits + stats.misses == stats.requested_rows
    assert stats.in_flight == 0


def test_truncated_while_serving(make_table: Any) -> None:
    layout, values = make_table(rows=2000, width=64)
    whole = layout.path.read_bytes()
    table = ValueTable.open(layout, "disk", 500 * layout.stride)
    early, late = torch.arange(0, 100), torch.arange(1500, 1600)
    table.gather(late[:50])  # cached rows outlive the file
    os.truncate(layout.path, layout.offset + 1500 * layout.stride)
    ids = torch.stack([early, late])[:, :60]
    with pytest.raises(RowReadError) as caught:
        table.weighted_sum(ids, torch.ones(2, 60))
    assert caught.value.rows == list(range(1550, 1560))
    assert caught.value.tokens == [1]
    assert caught.value.table == "values"
    assert "1550" in str(caught.value)
    assert "ends before" in caught.value.reason
    table.check_integrity()
    assert torch.equal(table.gather(early), values[early])
    assert torch.equal(table.gather(late[:50]), values[late[:50]])
    with pytest.raises(RowReadError):
        table.gather(late)  # again: nothing stale was kept
    layout.path.write_bytes(whole)
    assert torch.equal(table.gather(late), values[late])
    os.truncate(layout.path, layout.offset + 1500 * layout.stride)
    with pytest.raises(TableFormatError):
        ValueTable.open(layout, "host")


def test_every_bad_row_of_a_batch_is_named(make_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlane.tables.cache._MOST_SCRATCH_ROWS", 4)
    layout, _ = make_table(rows=4000, width=1024)  # a row a page: neighbours do not fail with the bad ones
    table = ValueTable.open(layout, "disk", 4 * layout.stride)
    table.source.inject_fault(1000, 1002, errno.EIO, -1)
    ids = torch.tensor([[5, 6], [1000, 7], [8, 9], [3000, 1002], [1000, 1001]])
    with pytest.raises(RowReadError) as caught:
        table.weighted_sum(ids, torch.ones(5, 2))
    assert caught.value.rows == [1000, 1001, 1002]
    assert caught.value.tokens == [1, 3, 4]
    assert "EIO" in caught.value.reason
    healthy = [0, 2]
    table.weighted_sum(ids[healthy], torch.ones(2, 2))


class Interrupting(RamSource):
    """Delivers half of a batch, then is interrupted as by Ctrl-C."""

    armed = True

    def start(self, rows: np.ndarray, slots: np.ndarray, out: SlotMemory) -> Any:
        super().start(rows[: len(rows) // 2], slots[: len(rows) // 2], out)
        if self.armed:
            raise KeyboardInterrupt
        return super().start(rows, slots, out)


def test_an_interrupt_leaves_nothing_stale() -> None:
    content = np.random.default_rng(0).integers(0, 256, (50, 16), dtype=np.uint8)
    source = Interrupting(content)
    cache = RowCache(50, 16, 10 * 16, source)
    memory = cache.memory.arena.array().reshape(-1, 16)
    ids = np.arange(8)
    with pytest.raises(KeyboardInterrupt):
        cache.begin(ids)
    cache.check_integrity()
    assert not any(cache.index.contains(row) for row in range(50))
    source.armed = False
    batch = cache.begin(ids)
    for part in batch.parts():
        np.testing.assert_array_equal(
            memory[part.slots], content[ids[part.begin : part.begin + len(part.slots)]]
        )
    batch.close()
    cache.check_integrity()


def test_a_caller_that_stops_early_releases_the_batch() -> None:
    cache = RowCache(50, 16, 4 * 16, RamSource(np.zeros((50, 16), np.uint8)))
    batch = cache.begin(np.arange(50))
    next(batch.parts())
    batch.close()
    batch.close()
    cache.check_integrity()
    assert cache.index.open == 0
    list(cache.begin(np.arange(50)).parts())
    cache.check_integrity()


@pytest.mark.parametrize("slots", [0, 5, 60, 400])
@pytest.mark.parametrize("policy", cache_policies())
def test_lookups_under_way_at_once(
    make_table: Any, slots: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lookups open at a time, some given up, some failing: the same bits, and nothing stale."""
    monkeypatch.setattr("memlane.tables.cache._MOST_SCRATCH_ROWS", 16)
    layout, _ = make_table(rows=600, width=16, dtype=RowFormat.BFLOAT16)
    host = ValueTable.open(layout, "host")
    table = ValueTable.open(layout, "disk", slots * layout.stride, policy=policy)
    rng = np.random.default_rng(slots)
    under_way: list[tuple[Any, Tensor, Tensor]] = []
    failed = 0
    for (ids, weights, x), step in zip(batches(600, 16, 3, 200), range(200), strict=False):
        fault = int(rng.integers(0, 590))
        table.source.inject_fault(fault, fault + 5, errno.EIO, int(rng.random() < 0.1) * 20)
        under_way.append((table.begin(ids), ids, weights if step % 3 else x))
        if len(under_way) < 2:
            continue
        lookup, asked, given = under_way.pop(0)
        summing = given.shape == asked.shape
        error = None
        try:
            if step % 7 == 0:
                lookup.close()
            elif summing:
                assert torch.equal(lookup.weighted_sum(given), host.weighted_sum(asked, given))
            else:
                assert torch.equal(lookup.dot(given), host.dot(asked, given))
        except RowReadError as raised:
            error = raised
        if error is not None:
            failed += 1
            bad = set(error.rows)
            assert bad
            assert bad <= set(asked.flatten().tolist())
            assert error.tokens == [i for i, row in enumerate(asked.tolist()) if bad & set(row)]
        table.check_integrity()
    under_way[0][0].close()
    table.check_integrity()
    assert failed > 3
    assert table.cache is not None
    assert table.cache.index.open == 0
    assert table.stats().in_flight == 0


def test_a_lookup_ends_once_and_in_its_order(make_table: Any) -> None:
    layout, values = make_table(rows=100, width=4)
    table = ValueTable.open(layout, "disk", 2 * layout.stride)
    lookup = table.begin(torch.arange(40)[:, None])
    later = table.begin(torch.arange(60, 90)[:, None])
    assert torch.equal(lookup.gather(), values[:40])
    lookup.close()
    with pytest.raises(TableError, match="twice"):
        lookup.gather()
    assert torch.equal(later.gather(), values[60:90])
    first, second = table.begin(torch.arange(40)[:, None]), table.begin(torch.arange(60, 90)[:, None])
    with pytest.raises(TableError, match="order"):
        second.gather()
    first.close()
    table.check_integrity()


def test_rows_on_their_way_are_not_used_before_their_lookup_has_ended(make_table: Any) -> None:
    layout, values = make_table(rows=4000, width=64)
    table = ValueTable.open(layout, "disk", 500 * layout.stride)
    table.source.inject_fault(0, 3999, -1, -1)
    ids = torch.arange(0, 400, 10)[:, None]
    first, second = table.begin(ids), table.begin(ids)  # the second finds all its rows on their way
    with pytest.raises(TableError, match="order"):
        second.gather()
    table.source.inject_fault(0, 0, 0, 0)
    with pytest.raises(TableError, match="order"):
        table.gather(torch.tensor([7]))
    assert torch.equal(first.gather(), values[ids.flatten()])
    table.check_integrity()
    assert torch.equal(table.gather(torch.arange(500)), values[:500])


def test_an_interrupt_just_after_reads_began(make_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that nobody holds any more must not end in slots that other rows have taken."""
    layout, values = make_table(rows=3000, width=64)
    table = ValueTable.open(layout, "disk", 60 * layout.stride)
    start, rng = table.source.start, np.random.default_rng(0)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        start(*arguments, **named)
        raise KeyboardInterrupt

    for _ in range(100):
        with monkeypatch.context() as patched:
            patched.setattr(table.source, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                table.gather(torch.from_numpy(rng.integers(0, 3000, 40)))
        table.check_integrity()
        assert table.source.in_flight == 0
        ids = torch.from_numpy(rng.integers(0, 3000, 50))
        assert torch.equal(table.gather(ids), values[ids])


def test_a_recorder_that_fails_leaves_no_lookup_behind(make_table: Any) -> None:
    layout, values = make_table(rows=100, width=4)
    table = ValueTable.open(layout, "disk", 20 * layout.stride)

    def broken(_: Any) -> None:
        raise MemoryError

    table.recorder = broken
    with pytest.raises(MemoryError):
        table.gather(torch.arange(9))
    table.recorder = None
    table.check_integrity()
    assert torch.equal(table.gather(torch.arange(100)), values)


def test_a_forked_process_cannot_read(make_table: Any) -> None:
    layout, _ = make_table(rows=3000, width=64)
    code = """
import os, sys, torch
from memlane.tables import TableLayout, ValueTable
layout = TableLayout.from_safetensors(sys.argv[1], "values")
for uring in (True, False):
    table = ValueTable.open(layout, "disk", 1 << 16, allow_uring=uring)
    before = table.gather(torch.arange(50))
    child = os.fork()
    if child == 0:
        try:
            table.gather(torch.arange(1000, 1500))
        except RuntimeError as error:
            del table
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(table.gather(torch.arange(3000))[:50], before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(layout.path)], timeout=60, check=False)
    assert done.returncode == 0


def test_rows_are_summed_while_others_are_missing(make_table: Any) -> None:
    """What is there is added before what is missing has come, in an order that does not depend on it."""
    layout, _ = make_table(rows=4000, width=256)
    table = ValueTable.open(layout, "disk", 2000 * layout.stride, deadline=20)
    host = ValueTable.open(layout, "host")
    ids = torch.arange(0, 3000, 100)[None].repeat(3, 1) + torch.arange(3)[:, None]
    table.gather(ids[:, ::2].reshape(-1))
    weights = torch.randn(ids.shape)
    table.source.inject_fault(500, 540, -1, -1)
    lookup = table.begin(ids)
    result: list[Tensor] = []
    worker = threading.Thread(target=lambda: result.append(lookup.weighted_sum(weights)))
    worker.start()
    time.sleep(0.2)
    assert not result
    table.source.inject_fault(0, 0, 0, 0)
    worker.join(10)
    assert torch.equal(result[0], host.weighted_sum(ids, weights))
    stats = table.stats()
    assert stats.stall_seconds > 0.05
    assert stats.read_seconds >= stats.stall_seconds * 0.5


def test_a_hanging_disk_fails_its_requests_only(make_table: Any) -> None:
    layout, values = make_table(rows=4000, width=1024)
    table = ValueTable.open(layout, "disk", 100 * layout.stride, deadline=0.2)
    table.source.inject_fault(1000, 1001, -1, -1)
    ids = torch.tensor([[1, 2], [1000, 3], [4, 5]])
    with pytest.raises(RowReadError, match="ETIMEDOUT") as caught:
        table.weighted_sum(ids, torch.ones(3, 2))
    assert (caught.value.rows, caught.value.tokens) == ([1000], [1])
    assert torch.equal(table.gather(torch.tensor([1, 5, 7])), values[[1, 5, 7]])
    table.source.inject_fault(0, 0, 0, 0)
    assert torch.equal(table.gather(torch.tensor([1000])), values[[1000]])
    table.check_integrity()


def test_a_file_replaced_while_serving(make_table: Any) -> None:
    """The file that was opened stays the one that is read, whatever takes its name."""
    layout, values = make_table(rows=2000, width=64)
    table = ValueTable.open(layout, "disk", 100 * layout.stride)
    table.gather(torch.arange(50))
    other = layout.path.with_name("other")
    other.write_bytes(bytes(layout.path.stat().st_size))
    other.replace(layout.path)
    ids = torch.arange(0, 2000, 3)
    assert torch.equal(table.gather(ids), values[ids])


def test_two_processes_on_one_table(make_table: Any) -> None:
    layout, values = make_table(rows=3000, width=64)
    torch.save(values, layout.path.with_suffix(".values"))
    code = """
import sys, torch
from memlane.tables import TableLayout, ValueTable
path, values = sys.argv[1], torch.load(sys.argv[2])
table = ValueTable.open(TableLayout.from_safetensors(path, "values"), "disk", 1 << 16)
for seed in range(60):
    ids = torch.randint(0, 3000, (700,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(table.gather(ids), values[ids])
    table.check_integrity()
"""
    arguments = [sys.executable, "-c", code, str(layout.path), str(layout.path.with_suffix(".values"))]
    both = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]


def test_counts_what_it_does(make_table: Any) -> None:
    layout, _ = make_table(rows=100, width=16)
    table = ValueTable.open(layout, "disk", 50 * layout.stride)
    table.gather(torch.tensor([1, 2, 2, 3]))
    table.gather(torch.tensor([2, 3, 4]))
    stats = table.stats()
    assert (stats.calls, stats.requested_rows, stats.unique_rows) == (2, 7, 6)
    assert (stats.hits, stats.misses, stats.unique_misses, stats.evictions) == (2, 5, 4, 0)
    assert (stats.cache_slots, stats.used_slots, stats.row_bytes) == (50, 4, 64)
    assert stats.capacity_bytes == 3200
    assert stats.bytes_read >= 4 * 64
    assert stats.read_seconds > 0
    assert stats.hit_rate == pytest.approx(2 / 7)
    assert (stats.placement, stats.tier, stats.name) == ("disk", "disk", "values")

    host = ValueTable.open(layout, "host")
    host.gather(torch.tensor([1, 1]))
    stats = host.stats()
    assert (stats.hits, stats.misses, stats.placement, stats.backend) == (2, 0, "host", "ram")
    assert stats.resident_bytes == stats.capacity_bytes == layout.nbytes


def test_warming_keeps_the_hottest_rows(make_table: Any) -> None:
    layout, values = make_table(rows=100, width=16)
    table = ValueTable.open(layout, "disk", 10 * layout.stride)
    assert table.warm([7, 3, 7, *range(50, 90)]) == 10
    warmed = table.stats()
    assert (warmed.warmed_rows, warmed.warming_rows, warmed.bytes_read > 0) == (10, 0, True)
    assert (warmed.calls, warmed.requested_rows, warmed.misses, warmed.evictions) == (0, 0, 0, 0)
    assert (warmed.unique_rows, warmed.unique_misses, warmed.stall_seconds) == (0, 0, 0.0)
    assert table.ranking().tolist() == [7, 3, *range(50, 58)]
    before = table.stats().misses
    ids = torch.tensor([7, 3, *range(50, 58)])
    assert torch.equal(table.gather(ids), values[ids])
    assert table.stats().misses == before
    table.gather(torch.tensor([99]))  # evicts the row used longest ago: 7, asked for first just now
    table.gather(torch.tensor([3]))
    assert table.stats().misses == before + 1
    table.check_integrity()
    with pytest.raises(IndexError):
        table.warm([100])


def test_warming_gives_way_to_requests(make_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlane.tables.warm._CHUNK_BYTES", 8 * 64)
    layout, values = make_table(rows=500, width=16)
    table = ValueTable.open(layout, "disk", 100 * layout.stride)
    table.start_warming(np.arange(200)[::-1].copy(), pin=10)
    rng = np.random.default_rng(0)
    more, steps = True, 0
    while more:
        more = table.warm_some(0.0)
        ids = torch.from_numpy(rng.integers(150, 260, 5))
        lookup = table.begin(ids[:, None])
        table.warm_some(0.0)
        assert torch.equal(lookup.gather(), values[ids])
        table.check_integrity()
        steps += 1
    stats = table.stats()
    assert steps > 3
    assert stats.used_slots == 100
    assert stats.pinned_slots == 10
    assert 20 < stats.warmed_rows < 100  # requests took the others' places
    assert torch.equal(table.gather(torch.arange(500)), values)
    assert table.stats().pinned_slots == 10


def test_rows_that_cannot_be_warmed_are_left_out(make_table: Any) -> None:
    layout, values = make_table(rows=4000, width=1024)
    table = ValueTable.open(layout, "disk", 50 * layout.stride)
    table.source.inject_fault(20, 21, errno.EIO, -1)
    assert table.warm(np.arange(40)) == 38
    table.check_integrity()
    table.source.inject_fault(0, 0, 0, 0)
    assert torch.equal(table.gather(torch.arange(60)), values[:60])


def test_bad_arguments(make_table: Any, tmp_path: Path) -> None:
    layout, _ = make_table(rows=10, width=4)
    for placement in ("host", "disk"):
        table = ValueTable.open(layout, placement, 5 * layout.stride)
        ids, weights = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
        for bad in (10, -1):
            with pytest.raises(IndexError, match=str(bad)):
                table.weighted_sum(torch.full((2, 3), bad), weights)
        with pytest.raises(TypeError):
            table.weighted_sum(ids.float(), weights)
        with pytest.raises(TypeError):
            table.weighted_sum(ids, weights.double())
        with pytest.raises(ValueError, match="weights are"):
            table.weighted_sum(ids, weights[:1])
        with pytest.raises(ValueError, match="x is"):
            table.dot(ids, torch.ones(2, 5))
        with pytest.raises(ValueError, match="dimension"):
            table.gather(ids)
        with pytest.raises(RuntimeError, match="gradient"):
            table.weighted_sum(ids, weights.requires_grad_())
        table.check_integrity()
        assert table.weighted_sum(ids[:, :0], torch.ones(2, 0)).tolist() == [[0.0] * 4] * 2
        assert table.weighted_sum(ids.t(), torch.ones(3, 2)).shape == (3, 4)  # not contiguous
        table.close()
        table.close()
        with pytest.raises(TableError, match="closed"):
            table.gather(torch.tensor([1]))
        assert table.stats().calls == 2
    with pytest.raises(ValueError, match="placement"):
        ValueTable.open(layout, "vram")  # type: ignore[arg-type]
    missing = TableLayout("values", tmp_path / "no", 0, 1, 4, RowFormat.FLOAT32, 16)
    with pytest.raises(FileNotFoundError):
        ValueTable.open(missing)


def test_two_threads_at_once_are_refused(make_table: Any) -> None:
    layout, _ = make_table(rows=10, width=4)
    table = ValueTable.open(layout, "disk", 5 * layout.stride)
    inside, go_on = threading.Event(), threading.Event()

    class Slow(RamSource):
        def start(self, rows: np.ndarray, slots: np.ndarray, out: SlotMemory) -> Any:
            inside.set()
            go_on.wait(10)
            return super().start(rows, slots, out)

    assert table.cache is not None
    table.cache.source = Slow(np.zeros((10, layout.stride), np.uint8))
    worker = threading.Thread(target=table.gather, args=(torch.tensor([1]),))
    worker.start()
    assert inside.wait(10)
    with pytest.raises(TableError, match="two threads"):
        table.gather(torch.tensor([2]))
    assert table.stats().requested_rows <= 1  # readable meanwhile
    go_on.set()
    worker.join()


def test_direct_reads_can_be_insisted_on(make_table: Any) -> None:
    layout, _ = make_table(rows=10, width=4)
    try:
        source = FileSource(layout, io="direct")
    except TableError as error:
        pytest.skip(f"O_DIRECT is not available: {error}")
    assert source.backend.endswith("+direct")
    assert FileSource(layout, io="buffered").backend.endswith("+buffered")


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    rows, width = 40_000, 1024  # 160 MB
    chunk = torch.randn(1000, width)
    layout = write_table(
        tmp_path / "big.safetensors", "values", rows, width, "float32", (chunk for _ in range(40))
    )
    process = psutil.Process()
    generator = torch.Generator().manual_seed(0)

    def resident() -> int:
        gc.collect()
        return int(process.memory_info().rss)

    before = resident()
    table = ValueTable.open(layout, "disk", 8 << 20)
    for _ in range(30):
        table.gather(torch.randint(0, rows, (1500,), generator=generator))
    stats = table.stats()
    assert stats.used_slots == stats.cache_slots == (8 << 20) // layout.stride
    assert stats.bytes_read > 100 << 20
    grown = resident() - before
    assert grown < stats.resident_bytes + (24 << 20)  # the results and the allocator's slack
    assert stats.resident_bytes < 48 << 20


def test_the_published_bag_kernel(data: Path) -> None:
    """Rows, weights and results of sparse-memory-lm's own kernels: bag * silu(pre), in bf16."""
    golden = load_file(data / "smlm" / "bf16_kernels" / "expected.safetensors")
    ids, weights = golden["indices"].flatten(1), golden["weights"].flatten(1)
    gate = torch.nn.functional.silu(golden["pre"].float()).bfloat16().float()
    q4 = torch.cat([golden["packed_q4"], golden["scales_q4"][:, None].view(torch.uint8)], dim=1)
    for stored, row_format, name in [
        (q4, RowFormat.INT4, "bag_q4"),
        (golden["table_bf16"].contiguous().view(torch.uint8), RowFormat.BFLOAT16, "bag_bf16"),
    ]:
        table = ReferenceTable.from_tensor(decode_rows(stored, row_format, 32))
        with torch.no_grad():
            reference = table.weighted_sum(ids, weights)
        bag = golden[name].float()
        close = torch.isclose(reference * gate, bag, rtol=1e-2, atol=1e-3)
        assert close.all() or torch.isclose(reference, bag, rtol=1e-2, atol=1e-3).all()


def test_the_published_4_bit_table_is_read_in_place(data: Path, tmp_path: Path) -> None:
    golden = load_file(data / "smlm" / "bf16_kernels" / "expected.safetensors")
    stored = torch.cat([golden["packed_q4"], golden["scales_q4"][:, None].view(torch.uint8)], dim=1)
    layout = write_table(tmp_path / "q4.safetensors", "values", 1024, 32, "int4", [stored])
    ids, weights = golden["indices"].flatten(1), golden["weights"].flatten(1)
    reference = ReferenceTable.from_tensor(decode_rows(stored, RowFormat.INT4, 32))
    with torch.no_grad():
        expected = reference.weighted_sum(ids, weights)
    out = ValueTable.open(layout, "disk", 1000).weighted_sum(ids, weights)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
