"""Tables on a GPU: the same results wherever rows lie and whatever is cached, errors that name rows, counters that add up.

On a CPU the same code runs over the twins of the kernels.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memlane.tables import RowFormat, RowReadError, TableError, TableLayout, ValueTable, gpu_open, write_table
from memlane.tables.gpu_open import GpuTableOptions, least_cache_bytes, open_gpu_table
from memlane.tables.gpu_table import GpuTable
from memlane.tables.table import Placement

ROWS, WIDTH = 700, 24
PLACEMENTS: tuple[Placement, ...] = ("device", "host", "disk")

Open = Callable[..., GpuTable]


@pytest.fixture
def layouts(tmp_path: Path) -> Callable[[RowFormat], TableLayout]:
    def make(row_format: RowFormat) -> TableLayout:
        values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
        path = tmp_path / f"{row_format}.safetensors"
        return write_table(path, "values", ROWS, WIDTH, row_format, values.split(333))

    return make


@pytest.fixture
def opened(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """opened(layout, placement, slots, scratch=...) -> a table with about that many slots in each cache, closed at the end."""
    tables: list[GpuTable] = []

    def open_table(
        layout: TableLayout, placement: Placement, slots: int = 100, scratch: int = 256
    ) -> GpuTable:
        monkeypatch.setattr("memlane.tables.gpu_open._SCRATCH_ROWS", scratch)
        cache_bytes = least_cache_bytes(ROWS, layout.stride, 0) + slots * 64
        options = GpuTableOptions(torch.device(device), placement, cache_bytes, reads_per_token=8)
        table = open_gpu_table(layout, options, ram_cache_bytes=slots * layout.stride)
        tables.append(table)
        return table

    yield open_table
    for table in tables:
        table.close()


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_what_is_said_to_be_enough_is(
    layouts: Callable[[RowFormat], TableLayout], placement: Placement
) -> None:
    """Whatever the table and the batch: a cache opens, takes no more than it was given, and a batch fits in one part."""
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(200):
        row_format = rng.choice([RowFormat.INT4, RowFormat.INT8, RowFormat.BFLOAT16, RowFormat.FLOAT32])
        width = 2 * rng.randint(1, 20)
        layout = dataclasses.replace(
            layouts(RowFormat.INT8), rows=rng.choice([1, 31, 33, 700, 99_999]), width=width, dtype=row_format
        )
        ids = rng.choice([0, 1, 32, 1_000, 20_000])
        given = least_cache_bytes(layout.rows, layout.stride, ids) + rng.choice([0, 1, 5_000])
        cache = gpu_open._cache(
            layout, GpuTableOptions(torch.device("cpu"), placement, given, decode_ids=ids)
        )
        assert cache.nbytes <= given, f"seed {seed}"
        assert cache.slots > 0
        assert cache.scratch >= ids


def batches(device: str, count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Random ids [tokens, k], weights, x: from none to several times a small cache."""
    g = torch.Generator().manual_seed(seed)
    shapes = itertools.cycle([(1, 1), (1, 32), (5, 8), (17, 24), (0, 4), (3, 100), (2, 0)])
    for step, (tokens, k) in zip(range(count), shapes, strict=False):
        spread = ROWS if step % 2 else ROWS // 10
        kind = torch.int64 if step % 3 else torch.int32
        ids = torch.randint(0, spread, (tokens, k), generator=g, dtype=kind)
        weights, x = torch.randn(tokens, k, generator=g), torch.randn(tokens, WIDTH, generator=g)
        yield ids.to(device), weights.to(device), x.to(device)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_results_do_not_depend_on_where_rows_lie(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str, row_format: RowFormat
) -> None:
    layout = layouts(row_format)
    cpu = ValueTable.open(layout, "host")
    tables = [opened(layout, "device"), opened(layout, "host", 40), opened(layout, "host", ROWS)]
    tables += [opened(layout, "disk", 40, scratch=64), opened(layout, "disk", ROWS)]
    for ids, weights, x in batches(device, 21):
        expected = cpu.weighted_sum(ids.cpu(), weights.cpu())
        sums = [table.weighted_sum(ids, weights) for table in tables]
        dots = [table.dot(ids, x) for table in tables]
        rows = [table.gather(ids.flatten()) for table in tables]
        for other in range(1, len(tables)):
            assert torch.equal(sums[0], sums[other])
            assert torch.equal(dots[0], dots[other])
            assert torch.equal(rows[0], rows[other])
        torch.testing.assert_close(sums[0].cpu(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dots[0].cpu(), cpu.dot(ids.cpu(), x.cpu()), rtol=1e-4, atol=1e-5)
        assert torch.equal(rows[0].cpu(), cpu.gather(ids.cpu().flatten()))
    for table in tables:
        table.check_integrity()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_lookups_at_a_time_keep_each_others_rows(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str, placement: Placement
) -> None:
    """As the halves of a step are run: each is begun before the other has ended."""
    layout = layouts(RowFormat.BFLOAT16)
    cpu, table = ValueTable.open(layout, "host"), opened(layout, placement, 8, scratch=256)
    before = None
    for ids, weights, _ in batches(device, 28, seed=3):
        lookup = table.begin(ids)
        if before is not None:
            sums = before[0].weighted_sum(before[2])
            expected = cpu.weighted_sum(before[1].cpu(), before[2].cpu())
            torch.testing.assert_close(sums.cpu(), expected, rtol=1e-6, atol=1e-6)
            before[0].close()
        before = lookup, ids, weights
    assert before is not None
    before[0].close()
    table.check_integrity()


def test_a_table_on_disk_fetches_apart_from_what_a_graph_would_replay(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str
) -> None:
    layout = layouts(RowFormat.INT4)
    cpu, table = ValueTable.open(layout, "host"), opened(layout, "disk")
    for ids, weights, _ in batches(device, 14):
        lookup = table.begin(ids)
        lookup.fetch()
        reads = table.tiers()[1].unique_misses
        sums = lookup.weighted_sum(weights)
        assert lookup.in_parts or table.tiers()[1].unique_misses == reads, "nothing was left to be read"
        expected = cpu.weighted_sum(ids.cpu(), weights.cpu())
        torch.testing.assert_close(sums.cpu(), expected, rtol=1e-6, atol=1e-6)
        lookup.close()


def test_rows_that_cannot_be_read_fail_the_tokens_that_need_them_and_nothing_stale_is_left(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str
) -> None:
    layout = layouts(RowFormat.FLOAT32)
    cpu, table = ValueTable.open(layout, "host"), opened(layout, "disk", 100, scratch=8)
    assert table.on_disk is not None
    table.on_disk.source.inject_fault(50, 51, errno.EIO, 1000)
    ids = torch.tensor([[1, 2, 3, 4], [5, 50, 6, 7], [8, 9, 10, 11], [51, 51, 50, 1]], device=device)
    weights = torch.ones(4, 4, device=device)
    for _ in range(2):
        with pytest.raises(RowReadError) as error:
            table.weighted_sum(ids, weights)
        assert set(error.value.rows) <= {50, 51}
        assert error.value.tokens in ([1], [1, 3])
        assert "Input/output error" in str(error.value)
    good = ids[[0, 2]]
    assert torch.equal(
        table.weighted_sum(good, weights[:2]).cpu(), cpu.weighted_sum(good.cpu(), weights[:2].cpu())
    )
    table.on_disk.source.inject_fault(0, -1, 0, 0)
    assert torch.equal(table.weighted_sum(ids, weights).cpu(), cpu.weighted_sum(ids.cpu(), weights.cpu()))
    table.check_integrity()


def test_a_lookup_given_up_leaves_nothing_that_others_would_take_for_rows(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str
) -> None:
    layout = layouts(RowFormat.FLOAT16)
    cpu = ValueTable.open(layout, "host")
    for placement in PLACEMENTS:
        table = opened(layout, placement)
        for ids, weights, _ in batches(device, 14, seed=7):
            table.begin(ids).close()
            sums = table.weighted_sum(ids, weights)
            expected = cpu.weighted_sum(ids.cpu(), weights.cpu())
            torch.testing.assert_close(sums.cpu(), expected, rtol=1e-6, atol=1e-6)
            table.abandon()
        table.check_integrity()


def test_counters_of_each_tier_add_up(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str
) -> None:
    layout = layouts(RowFormat.BFLOAT16)
    asked, unique = 0, 0
    table = opened(layout, "disk", 64, scratch=64)
    for ids, weights, _ in batches(device, 14):
        table.weighted_sum(ids, weights)
        asked += ids.numel()
    gpu, ram = table.tiers()
    assert (gpu.tier, ram.tier) == ("host", "disk")
    assert gpu.requested_rows == asked == gpu.hits + gpu.misses
    assert ram.requested_rows == gpu.unique_misses == ram.hits + ram.misses
    assert 0 < gpu.hits < asked
    assert gpu.unique_misses <= gpu.unique_rows <= asked
    assert 0 < gpu.used_slots <= gpu.cache_slots
    table.abandon()
    assert table.stats().used_slots == unique == 0
    host = opened(layout, "host")
    ids = torch.arange(32, device=device)[None]
    for _ in range(2):
        host.weighted_sum(ids, torch.ones(1, 32, device=device))
    (stats,) = host.tiers()
    assert (stats.requested_rows, stats.hits, stats.unique_misses) == (64, 32, 32)
    assert stats.bytes_read == 32 * layout.stride
    host.start_counting()
    host.weighted_sum(ids, torch.ones(1, 32, device=device))
    assert (host.stats().requested_rows, host.stats().hits, host.stats().used_slots) == (32, 32, 32)
    on_device = opened(layout, "device")
    on_device.note_tokens(3)
    assert (on_device.stats().requested_rows, on_device.stats().hits) == (24, 24)


def test_a_cache_too_small_for_a_lookup_is_refused_with_what_it_needs(
    layouts: Callable[[RowFormat], TableLayout], device: str
) -> None:
    layout = layouts(RowFormat.BFLOAT16)
    with pytest.raises(TableError, match="too small; it needs"):
        open_gpu_table(layout, GpuTableOptions(torch.device(device), "host", 1000))
    needs = least_cache_bytes(ROWS, layout.stride, 512)
    open_gpu_table(layout, GpuTableOptions(torch.device(device), "disk", needs, decode_ids=512)).close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_wrong_arguments_and_wrong_times_are_refused(
    layouts: Callable[[RowFormat], TableLayout], opened: Open, device: str, placement: Placement
) -> None:
    table = opened(layouts(RowFormat.BFLOAT16), placement)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="ids"):
        table.begin(ids.float())
    with pytest.raises(ValueError, match="2 dimensions"):
        table.begin(ids[0])
    with pytest.raises(ValueError, match="weights"):
        table.weighted_sum(ids, torch.ones(2, 4, device=device))
    with pytest.raises(TypeError, match="x must be fp32"):
        table.dot(ids, torch.ones(2, WIDTH, device=device, dtype=torch.float64))
    lookup = table.begin(ids)
    lookup.weighted_sum(torch.ones(2, 3, device=device))
    with pytest.raises(TableError, match="twice"):
        lookup.weighted_sum(torch.ones(2, 3, device=device))
    lookup.close()
    seen: list[list[int]] = []
    table.recorder = lambda flat: seen.append(flat.tolist())
    table.gather(torch.tensor([3, 1], device=device))
    assert seen == [[3, 1]]
    table.close()
    table.close()
    with pytest.raises(TableError, match="closed"):
        table.begin(ids)
