"""The row cache's kernels and their twin against a plain one; on a GPU against all that holds in any order."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from interleaving import interleaved
from numpy.typing import NDArray
from plain_row_cache import PlainCache, Snapshot, check_lookup, fmix32, poisoned

from memlane.kernels import RowMemory, reference_cache, row_cache
from memlane.kernels.cache_state import COUNTERS, OLDEST, STAMP_BITS, WAYS, CacheState, LookupBuffers

IMPLEMENTATIONS = {"kernels": row_cache, "twin": reference_cache}


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return IMPLEMENTATIONS[request.param]


def skewed(rng: np.random.Generator, n: int, rows: int) -> NDArray[np.int64]:
    """Ids with the duplicates and favourites of real ones."""
    return (rows * rng.random(n) ** 3).astype(np.int64)


def run(
    kernels: ModuleType,
    state: CacheState,
    ids: NDArray[np.int64],
    open_lookups: int = 1,
    live: int | None = None,
) -> LookupBuffers:
    """One lookup into poisoned buffers, checked for what always holds."""
    device = str(state.words.device)
    before, buffers = Snapshot.of(state), poisoned(len(ids), device)
    alive = None if live is None else torch.tensor([live], device=device)
    kernels.lookup(state, torch.tensor(ids, device=device), buffers, open_lookups, alive)
    check_lookup(before, state, ids, buffers, open_lookups, live)
    return buffers


def test_the_hash_is_murmurs() -> None:
    assert fmix32(1) == 0x514E28B7  # of the empty string under seed 1
    rows = torch.tensor([0, 1, 2, 1000, (1 << 31) - 2])
    assert reference_cache.set_of(rows, 1 << 32).tolist() == [fmix32(int(row)) for row in rows]


def test_lookups_are_those_of_a_plain_cache(kernels: ModuleType, device: str) -> None:
    clock = (1 << STAMP_BITS) - 4  # stamps wrap on the way
    rng = np.random.default_rng(7)
    in_order = device == "cpu" or kernels is reference_cache
    for sets, scratch, rows in ((1, 64, 60), (3, 0, 150), (4, 288, 300)):
        state, plain = CacheState.empty(sets, scratch, device), PlainCache(sets, scratch, clock)
        state.clock.fill_(clock)
        for n, open_lookups in ((1, 1), (40, 1), (100, 2), (7, 2), (260, 2)):
            ids = skewed(rng, n, rows)
            live = None if n % 2 else int(rng.integers(1, n + 1))
            if live is not None:
                ids[live:] = ids[rng.integers(0, live, n - live)]
            before = state.counters.tolist()
            buffers = run(kernels, state, ids, open_lookups, live)
            expected = plain.lookup(ids.tolist(), open_lookups, live)
            if not in_order:
                continue
            slots = [
                slot if 0 <= slot < sets * WAYS else "scratch" if slot >= 0 else "in place"
                for slot in buffers.slots.tolist()
            ]
            assert slots == expected.slots
            assert set(buffers.miss_rows[: int(buffers.miss_count)].tolist()) == expected.missing
            counted = [
                after - earlier for after, earlier in zip(state.counters.tolist(), before, strict=True)
            ]
            assert dict(zip(COUNTERS, counted, strict=True)) == expected.counts


def test_an_empty_lookup_does_nothing(kernels: ModuleType, device: str) -> None:
    state, buffers = CacheState.empty(1, 0, device), poisoned(0, device)
    kernels.lookup(state, torch.zeros(0, dtype=torch.int64, device=device), buffers)
    assert buffers.miss_count.tolist() == [0]
    assert state.counters.tolist() == [0] * len(COUNTERS)


def test_ids_may_be_int32(kernels: ModuleType, device: str) -> None:
    state, buffers = CacheState.empty(2, 0, device), LookupBuffers.of(3, device)
    kernels.lookup(state, torch.tensor([5, 9, 5], dtype=torch.int32, device=device), buffers)
    assert sorted(buffers.miss_rows[: int(buffers.miss_count)].tolist()) == [5, 9]


def test_many_ids_at_once(device: str, scale: int) -> None:
    """Far more programs than run at once, on few sets: on a GPU this is where races are."""
    n, lookups = (131 * scale, 8) if device == "cuda" else (272, 1)
    rng = np.random.default_rng()
    for sets, rows in ((8, 300), (n // 128, n // 2), (n // 64, n // 2)):
        state = CacheState.empty(sets, n // 8, device, most_probes=4)
        for _ in range(lookups):
            run(row_cache, state, skewed(rng, n, rows), open_lookups=2)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_programs_will_do(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":  # it has orders enough of its own: the test above
        return
    monkeypatch.setattr(row_cache, "_ONE_PROGRAM", 0)
    monkeypatch.setattr(row_cache, "_TOUCH_BLOCK", 8)
    monkeypatch.setattr(row_cache, "_CLAIM_BLOCK", 4)
    rng = np.random.default_rng(seed)
    state = CacheState.empty(2, 32, device)
    run(row_cache, state, np.arange(20 + 30 * (seed % 2)))
    run(row_cache, state, np.arange(30, 68))
    with interleaved(seed):
        run(row_cache, state, rng.integers(50, 74, 24), open_lookups=2)
        run(row_cache, state, rng.integers(0, 200, 24), open_lookups=2)


def test_padding_changes_nothing_but_slots(kernels: ModuleType, device: str) -> None:
    rng = np.random.default_rng(3)
    exact, padded = CacheState.empty(2, 0, device), CacheState.empty(2, 0, device)
    for n in (5, 60, 33):
        ids = skewed(rng, n, 100)
        run(kernels, exact, ids)
        run(kernels, padded, np.concatenate([ids, np.repeat(ids[:1], 64 - n)]), live=n)
    assert exact.counters[:5].tolist() == padded.counters[:5].tolist()
    assert exact.clock.tolist() == padded.clock.tolist()


def test_rows_unused_for_ages_stay_the_oldest(kernels: ModuleType, device: str) -> None:
    """Stamps say no more than an age modulo 2^31; what is older must not come to look young, in scratch neither."""
    state = CacheState.empty(2, 32, device)
    old = [row for row in range(400) if fmix32(row) % 2 == 0]
    run(kernels, state, np.array(old[:40]), open_lookups=1)  # 32 rows of set 0, and 8 in scratch
    held = old[:32]
    used, new = old[4], old[50]
    for _ in range(5):  # together more than 2^31 lookups, while set 1 alone is asked for
        state.clock.add_(OLDEST // 2)
        windows = len(state.words)
        for _ in range(windows):
            run(kernels, state, np.array([used]))
        assert (
            Snapshot.of(state).ages(int(state.clock[0]))[state.words.cpu().numpy() != 0].max()
            <= OLDEST + windows
        )
    buffers = run(kernels, state, np.array([new]))
    assert buffers.slots.tolist() == [0]  # the lowest of those unused: not `used`, way 4
    buffers = run(kernels, state, np.array(held[1:]))
    assert int(buffers.miss_count) == 0


@pytest.mark.parametrize(
    ("source_stride", "dest_stride"),
    [(16, 16), (48, 64), (2048, 2048), (2064, 2064), (6000, 6000), (1026, 1040), (514, 528), (67, 80), (80, 67), (5, 16)],
)  # fmt: skip
def test_copies_rows_and_nothing_else(
    kernels: ModuleType, device: str, source_stride: int, dest_stride: int
) -> None:
    rng = np.random.default_rng()
    rows, slots, most = (5000, 9000, 4000) if device == "cuda" else (70, 60, 40)
    source = torch.from_numpy(rng.integers(0, 256, (rows, source_stride), dtype=np.uint8))
    at = torch.from_numpy(rng.integers(0, rows, most))
    to = torch.from_numpy(rng.permutation(slots)[:most].astype(np.int32))
    at[0] = rows - 1  # up to the last byte
    length = min(source_stride, dest_stride)
    for count in (0, 1, most // 2 + 1, most):
        dest = torch.full((slots, dest_stride), 0xFF, dtype=torch.uint8, device=device)
        expected = dest.cpu().clone()
        for row, slot in zip(at[:count].tolist(), to[:count].tolist(), strict=True):
            expected[slot, :length] = source[row, :length]
        kernels.copy_rows(
            RowMemory(source.pin_memory() if device == "cuda" else source, "int8", source_stride),
            at.to(device),
            RowMemory(dest, "int8", dest_stride),
            to.to(device),
            torch.tensor([count], device=device),
        )
        assert torch.equal(dest.cpu(), expected)


def test_memory_that_starts_anywhere_is_refused(device: str) -> None:
    data = torch.zeros(33, 16, dtype=torch.uint8, device=device).view(-1)[8:-8].view(32, 16)
    memory = RowMemory(data, "int8", 14)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="16 bytes"):
        row_cache.copy_rows(memory, number, memory, number.int(), number)
