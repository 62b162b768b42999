"""The cache of one table on a device: every id's row is where its slot says, whatever was asked before."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.cache_state import WAYS, LookupBuffers
from memlane.tables.device_cache import CacheCounters, DeviceRowCache, plan

STRIDE, WIDTH = 34, 32  # int8 rows, unpadded


def table(rows: int, device: str) -> RowMemory:
    """Random rows where a kernel reads them in place: pinned, if there is a GPU."""
    data = torch.from_numpy(np.random.default_rng().integers(0, 256, (rows, STRIDE), dtype=np.uint8))
    return RowMemory(data.pin_memory() if device == "cuda" else data, "int8", WIDTH)


def cache_of(
    rows: int, sets: int, device: str, *, scratch: int = 0, in_place: bool = True, interpreted: bool = False
) -> DeviceRowCache:
    cache = DeviceRowCache(
        rows,
        STRIDE,
        "int8",
        WIDTH,
        sets=sets,
        scratch=scratch,
        in_place=in_place,
        device=device,
        interpreted=interpreted,
    )
    cache.memory.data.fill_(0xFF)
    return cache


def rows_at(cache: DeviceRowCache, source: RowMemory, slots: Tensor) -> Tensor:
    """The rows a sum kernel would read."""
    near, far = cache.memory.data.cpu()[:, :STRIDE], source.data
    at = slots.cpu().long()
    return torch.where((at >= 0)[:, None], near[at.clamp(min=0)], far[(~at).clamp(min=0)])


def ids_of(rng: np.random.Generator, n: int, rows: int) -> NDArray[np.int64]:
    return (rows * rng.random(n) ** 3).astype(np.int64)


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("scratch", [0, 40])
def test_every_id_gets_its_row(device: str, scale: int, interpreted: bool, scratch: int) -> None:
    rng = np.random.default_rng()
    rows, n = 250 * scale, 70 * scale
    source = table(rows, device)
    cache = cache_of(rows, 2 * scale, device, scratch=scratch * scale, interpreted=interpreted)
    buffers = [cache.buffers(n), cache.buffers(n)]
    asked: list[Tensor] = []
    for turn in range(6):  # two open at a time: the one before is read after this one has taken its slots
        ids = torch.from_numpy(ids_of(rng, n, rows))
        cache.lookup(ids.to(device), buffers[turn % 2], open_lookups=2)
        cache.fill(source, buffers[turn % 2])
        asked.append(ids)
        for earlier in range(max(0, turn - 1), turn + 1):
            found = rows_at(cache, source, buffers[earlier % 2].slots)
            assert torch.equal(found, source.data[asked[earlier]])
    cache.check_integrity()
    count = CacheCounters.of(cache.counters)
    assert count.num_calls == 6
    assert count.num_requested_indices == 6 * n
    unique = sum(len(torch.unique(ids)) for ids in asked)
    assert unique - count.num_in_place_misses <= count.num_unique_indices <= unique
    assert len(cache.cached()) == (
        count.num_unique_misses - count.num_conflict_unique_misses - count.num_evictions
    )


def test_rows_come_from_elsewhere_too(device: str) -> None:
    """Rows that were read into a buffer of their own, in the order of the miss list; nothing may be left in place."""
    rows, n = 3000, 400
    source = table(rows, device)
    cache = cache_of(rows, 2, device, scratch=n, in_place=False)
    buffers = cache.buffers(n)
    ids = torch.from_numpy(np.random.default_rng().integers(0, rows, n))
    cache.lookup(ids.to(device), buffers)
    assert int(buffers.slots.min()) >= 0
    count = int(buffers.miss_count)
    staging = torch.zeros(n, STRIDE, dtype=torch.uint8)
    staging[:count] = source.data[buffers.miss_rows[:count].cpu()]
    where = torch.arange(n, device=device)
    cache.fill(RowMemory(staging.to(device), "int8", WIDTH), buffers, where)
    assert torch.equal(rows_at(cache, source, buffers.slots), source.data[ids])


def test_a_cleared_cache_misses_everything_again(device: str) -> None:
    source, cache = table(100, device), cache_of(100, 4, device)
    buffers = cache.buffers(10)
    ids = torch.arange(10, device=device)
    cache.lookup(ids, buffers)
    cache.clear()
    cache.check_integrity()
    assert len(cache.cached()) == 0
    cache.lookup(ids, buffers)
    assert int(buffers.miss_count) == 10
    cache.fill(source, buffers)
    assert torch.equal(rows_at(cache, source, buffers.slots), source.data[:10])


def test_cached_rows_are_listed_last_used_first(device: str) -> None:
    cache = cache_of(100, 4, device)
    for ids in ([1, 2, 3], [4, 5], [2]):
        cache.lookup(torch.tensor(ids, device=device), cache.buffers(len(ids)))
    listed = cache.cached().tolist()
    assert listed[0] == 2
    assert set(listed[1:3]) == {4, 5}
    assert set(listed[3:]) == {1, 3}


def test_integrity_is_really_checked(device: str) -> None:
    def broken(harm: str) -> DeviceRowCache:
        cache = cache_of(100, 4, device, scratch=32)
        cache.lookup(torch.arange(60, device=device), cache.buffers(60))
        cache.check_integrity()
        words = cache.state.words
        held = (words.view(-1) != 0).nonzero().view(-1)
        if harm == "own":
            first = int(held[0])
            words.view(-1)[(first + WAYS) % cache.slots] = words.view(-1)[first]
            words.view(-1)[first] = 0
        elif harm == "two slots":
            free = (words[int(held[0]) // WAYS] == 0).nonzero().view(-1)
            words[int(held[0]) // WAYS, free[0]] = words.view(-1)[held[0]]
        elif harm == "none":
            words.view(-1)[held[0]] |= 1 << 30
        elif harm == "clock":
            cache.state.clock.fill_(0)
        return cache

    for harm in ("own", "two slots", "none", "clock"):
        with pytest.raises(AssertionError, match=harm):
            broken(harm).check_integrity()


def test_buffers_are_for_one_number_of_ids(device: str) -> None:
    cache = cache_of(100, 1, device)
    with pytest.raises(ValueError, match="7 ids with buffers for 8"):
        cache.lookup(torch.zeros(7, dtype=torch.int64, device=device), cache.buffers(8))
    with pytest.raises(ValueError, match="3 lookups"):
        cache.lookup(torch.zeros(8, dtype=torch.int64, device=device), cache.buffers(8), open_lookups=3)


def test_plans_within_the_budget() -> None:
    for budget in (0, 1000, 100_000, 10 << 20):
        sets = plan(1_000_000, 1026, budget)
        assert sets * WAYS * (1040 + 8) <= budget < (sets + 1) * WAYS * (1040 + 8)
    assert plan(1000, 16, 1 << 30) == 64
    with pytest.raises(ValueError, match="at least one set"):
        cache_of(100, 0, "cpu")
    with pytest.raises(ValueError, match="31 bits"):
        cache_of(100, 1 << 26, "meta")


def test_the_twin_is_quick_enough_to_serve() -> None:
    """On the CPU everything above runs on it."""
    cache = cache_of(200_000, 1000, "cpu", scratch=1024)
    rng, buffers = np.random.default_rng(0), cache.buffers(10_000)
    began = time.process_time()
    for _ in range(3):
        cache.lookup(torch.from_numpy(ids_of(rng, 10_000, 200_000)), buffers)
    assert time.process_time() - began < 3
    cache.check_integrity()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_looks_up_anew_at_each_replay() -> None:
    rows, rng = 20_000, np.random.default_rng()
    source, cache = table(rows, "cuda"), cache_of(rows, 40, "cuda", scratch=1024)
    for n in (128, 4096):
        ids, buffers = torch.zeros(n, dtype=torch.int64, device="cuda"), cache.buffers(n)

        def step(ids: Tensor = ids, buffers: LookupBuffers = buffers) -> None:
            cache.lookup(ids, buffers, open_lookups=2)
            cache.fill(source, buffers)

        step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(20):
            clock, asked = int(cache.state.clock[0]), torch.from_numpy(ids_of(rng, n, rows))
            ids.copy_(asked)
            graph.replay()
            assert cache.state.clock.tolist() == [clock + 1, clock + 1]
            assert torch.equal(rows_at(cache, source, buffers.slots), source.data[asked])
        cache.check_integrity()
