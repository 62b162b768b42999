"""Row cache: which slot holds each id's row, who gives way where none does. Words and windows: `kernels.cache_state`.

A program looks up a block of ids, each with its whole window: [ids, WAYS] words at once.

    touch   finds the rows that are cached and stamps them, before any row is evicted
    claim   gives a way to each row that touch did not find, and lists it as missing
    lookup  both in one program, for few ids: one launch

Why two programs never give one row two slots, nor two rows one slot, whatever their order:
  1. Between touch and the end of claim each word changes at most once, from a stamp below the lock to this lookup's
     number, and only by compare-and-swap of the whole word. So a word that is read with this number is final, and of
     several programs that want a way one gets it.
  2. Claims of a window are made in one order, w1, w2, ...: of the ways that were not locked at the start the oldest
     first, then the lowest. Nobody tries wj without having read w1 ... w(j-1) as taken, from the same reading in which
     it found its row nowhere.
  3. Suppose row X got both wi and wj, i < j. Whoever got wj for X had read wi as taken, that is (1) as holding X for
     good, and would have used it. So X has one way.
  4. A row goes to scratch only when all ways of its set are locked, and then they stay so: nobody else gets one for it.
     The same holds from bucket to bucket of the scratch region, which is probed in one order and is its own lookup's
     alone: there every word with an older stamp is free.
  5. A failed swap means that a word changed, and there are WAYS in a window: nobody tries a window more than WAYS + 1
     times.
Words may be read in any state of others' progress, and a word read too old only makes a swap fail. So no order between
different words is needed, and all atomics are relaxed. But a failed swap must not be followed by the same old word out
of L1: words are read volatile.
"""

import triton
import triton.language as tl

from memlane.kernels import cache_state

WAYS = tl.constexpr(cache_state.WAYS)
STAMP_MASK = tl.constexpr((1 << cache_state.STAMP_BITS) - 1)
EMPTY_AGE = tl.constexpr(cache_state.EMPTY_AGE)
OLDEST = tl.constexpr(cache_state.OLDEST)

COUNTERS = tl.constexpr(16)  # the next power of two
CALLS = tl.constexpr(cache_state.COUNTERS.index("num_calls"))
REQUESTED = tl.constexpr(cache_state.COUNTERS.index("num_requested_indices"))
UNIQUE = tl.constexpr(cache_state.COUNTERS.index("num_unique_indices"))
UNIQUE_MISSES = tl.constexpr(cache_state.COUNTERS.index("num_unique_misses"))
CONFLICT_UNIQUE = tl.constexpr(cache_state.COUNTERS.index("num_conflict_unique_misses"))
CONFLICTS = tl.constexpr(cache_state.COUNTERS.index("num_conflict_misses"))
HITS = tl.constexpr(cache_state.COUNTERS.index("num_hits"))
EVICTIONS = tl.constexpr(cache_state.COUNTERS.index("num_evictions"))
IN_PLACE = tl.constexpr(cache_state.COUNTERS.index("num_in_place_misses"))


@triton.jit
def _mix(x):
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _set_of(rows, sets):
    return (_mix(rows.to(tl.uint32)) % sets.to(tl.uint32)).to(tl.int32)


@triton.jit
def _read(words, windows, wanted, now):
    """-> words [ids, WAYS] of each id's window, and their age. Not wanted: as if all were empty."""
    ways = tl.arange(0, WAYS)
    at = words + windows.to(tl.int64)[:, None] * WAYS + ways[None, :]
    word = tl.load(at, mask=wanted[:, None], other=0, volatile=True)
    stamp = (word >> 32).to(tl.int32)
    age = ((now & STAMP_MASK).to(tl.int32) - stamp) & STAMP_MASK
    return word, tl.where(word == 0, EMPTY_AGE, age)


@triton.jit
def _holds(word, rows):
    """-> which of the words [ids, WAYS] hold their id's row."""
    return word.to(tl.int32) == (rows + 1).to(tl.int32)[:, None]


@triton.jit
def _word_of(rows, now):
    return ((now & STAMP_MASK) << 32) | (rows + 1)


@triton.jit
def _touch(words, rows, inside, now, sets):
    """-> each id's slot, ~row where its row is not cached; and which ids are the first of their row to be found."""
    windows = _set_of(rows, sets)
    word, age = _read(words, windows, inside, now)
    way_and_stale = tl.arange(0, WAYS)[None, :] * 2 + (age != 0).to(tl.int32)
    found = tl.max(tl.where(_holds(word, rows), way_and_stale, -1), axis=1)
    hit = found >= 0
    slot = windows * WAYS + (found >> 1)
    # The row cannot leave its way before claim, so the word can be replaced whatever its stamp has become.
    stale = hit & ((found & 1) != 0)
    before = tl.atomic_xchg(words + slot, _word_of(rows, now), mask=stale, sem="relaxed")
    first = stale & ((before >> 32) != (now & STAMP_MASK))
    return tl.where(hit, slot, (-1 - rows).to(tl.int32)), first


@triton.jit
def _rejuvenate(words, windows, now):
    """Looks after one window of the whole cache: no word's age may reach 2^31. A row touched meanwhile stays as it is."""
    window = (now % windows).to(tl.int32) + tl.zeros([1], tl.int32)
    word, age = _read(words, window, window >= 0, now)
    aged = (age > OLDEST) & (word != 0)
    if tl.max(tl.max(aged.to(tl.int32), axis=1), axis=0) > 0:
        young = (((now - OLDEST) & STAMP_MASK) << 32) | (word & 0xFFFFFFFF)
        at = words + window.to(tl.int64)[:, None] * WAYS + tl.arange(0, WAYS)[None, :]
        tl.atomic_cas(at, word, tl.where(aged, young, word), sem="relaxed")


@triton.jit
def _take(words, windows, rows, wanted, locked_age, now):
    """One try at a way of each wanted id's window, for its row. Ways younger than locked_age are locked.

    -> way: the row's, -1 if the try failed or the window is full; won: the row is new in it; full: all ways are locked;
    before: the word that gave way.
    """
    ways = tl.arange(0, WAYS)
    word, age = _read(words, windows, wanted, now)
    # Words of this lookup alone: an older one with the row would have been a hit, or is another lookup's scratch.
    way = tl.max(tl.where(_holds(word, rows) & (age == 0), ways[None, :], -1), axis=1)
    found = wanted & (way >= 0)
    oldest = tl.max(age, axis=1)
    victim = tl.min(tl.where(age == oldest[:, None], ways[None, :], WAYS - 1), axis=1)
    full = wanted & ~found & (oldest < locked_age)
    trying = wanted & ~found & ~full
    # The victim's word, from what is known of it: shuffling 32 bits costs half of 64.
    low = tl.sum(tl.where(ways[None, :] == victim[:, None], word.to(tl.int32), 0), axis=1)
    before = (((now - oldest) & STAMP_MASK) << 32) | low
    before = tl.where(low == 0, 0, before)
    # There is no masked swap: who is not trying compares with -1, which no word is.
    got = tl.atomic_cas(
        words + windows.to(tl.int64) * WAYS + victim,
        tl.where(trying, before, -1),
        tl.where(trying, _word_of(rows, now), -1),
        sem="relaxed",
    )
    won = trying & (got == before)
    return tl.where(won, victim, tl.where(found, way, -1)), won, full, before


@triton.jit
def _claim(words, rows, slot, now, sets, buckets, probes, open_lookups):
    """Slots for the ids that touch left open (slot < 0).

    -> slot, still ~row where there is no way and no scratch; won: the id is the one to list its row as missing;
    conflict: all ways of its set were locked; evicted: another row gave way.
    """
    open_ids = slot < 0
    won = slot != slot  # of nobody yet
    conflict = won
    evicted = won
    windows = _set_of(rows, sets)
    while tl.max(open_ids.to(tl.int32), axis=0) > 0:
        way, took, full, before = _take(words, windows, rows, open_ids, open_lookups, now)
        slot = tl.where(way >= 0, windows * WAYS + way, slot)
        won = won | took
        evicted = evicted | (took & (before != 0))
        conflict = conflict | full
        open_ids = open_ids & (way < 0) & ~full

    # Scratch: buckets probed in one order from the row's own on, so many and no more: where a whole prompt finds scratch
    # full, each of its rows would look through all of it. Even and odd lookups have their own.
    tried = tl.zeros_like(slot)
    open_ids = conflict & (tried < probes)
    first = sets + (now & 1).to(tl.int32) * buckets
    bucket = (_mix(_mix(rows.to(tl.uint32))) % tl.maximum(buckets, 1).to(tl.uint32)).to(tl.int32)
    while tl.max(open_ids.to(tl.int32), axis=0) > 0:
        way, took, full, _ = _take(words, first + bucket, rows, open_ids, 1, now)
        slot = tl.where(way >= 0, (first + bucket) * WAYS + way, slot)
        won = won | took
        tried += full.to(tl.int32)
        open_ids = open_ids & (way < 0) & (tried < probes)
        bucket = tl.where(full, bucket + 1, bucket)
        bucket = tl.where(bucket == buckets, 0, bucket)
    return slot, won, conflict, evicted


@triton.jit
def _list_misses(miss_rows, miss_slots, miss_count, rows, slot, won):
    number = tl.sum(won.to(tl.int32), axis=0)
    if number > 0:
        begin = tl.atomic_add(miss_count, number.to(tl.int64), sem="relaxed")
        at = begin + tl.cumsum(won.to(tl.int32), axis=0) - 1
        tl.store(miss_rows + at, rows, mask=won)
        tl.store(miss_slots + at, slot, mask=won)


@triton.jit
def _sum(chosen):
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _count_touch(counters, asked, slot, first, n, live_ids, is_first_program):
    k = tl.arange(0, COUNTERS)
    calls = is_first_program.to(tl.int64)
    amount = tl.where(k == CALLS, calls, 0) + tl.where(k == REQUESTED, calls * tl.minimum(live_ids, n), 0)
    amount += tl.where(k == UNIQUE, _sum(first), 0) + tl.where(k == HITS, _sum(asked & (slot >= 0)), 0)
    tl.atomic_add(counters + k, amount, mask=amount != 0, sem="relaxed")


@triton.jit
def _count_claim(counters, asked, slot, won, conflict, evicted):
    k = tl.arange(0, COUNTERS)
    misses = _sum(won)
    amount = tl.where((k == UNIQUE) | (k == UNIQUE_MISSES), misses, 0)
    amount += tl.where(k == CONFLICT_UNIQUE, _sum(won & conflict), 0)
    amount += tl.where(k == CONFLICTS, _sum(asked & conflict), 0)
    amount += tl.where(k == EVICTIONS, _sum(evicted), 0)
    amount += tl.where(k == IN_PLACE, _sum(asked & (slot < 0)), 0)
    tl.atomic_add(counters + k, amount.to(tl.int64), mask=amount != 0, sem="relaxed")


@triton.jit
def _live(live, n, HAS_LIVE: tl.constexpr):
    if HAS_LIVE:
        return tl.load(live)
    else:
        return n.to(tl.int64)


@triton.jit(do_not_specialize=["n", "sets", "windows"])
def touch(
    words,
    clock,
    counters,
    ids,
    live,
    slots,
    miss_count,
    n,
    sets,
    windows,
    HAS_LIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    rows = tl.load(ids + at, mask=inside, other=0).to(tl.int64)
    now = tl.load(clock) + 1
    live_ids = _live(live, n, HAS_LIVE)
    slot, first = _touch(words, rows, inside, now, sets)
    tl.store(slots + at, slot, mask=inside)
    _count_touch(counters, inside & (at < live_ids), slot, first, n, live_ids, program == 0)
    if program == 0:
        tl.store(clock + 1, now)
        tl.store(miss_count, tl.zeros([], tl.int64))
        _rejuvenate(words, windows, now)


@triton.jit(do_not_specialize=["n", "sets", "buckets", "probes", "open_lookups"])
def claim(
    words, clock, counters, ids, live, slots, miss_rows, miss_slots, miss_count, n, sets, buckets, probes, open_lookups,
    HAS_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slot = tl.load(slots + at, mask=inside, other=0)
    now = tl.load(clock + 1)
    if tl.min(slot, axis=0) < 0:
        rows = tl.load(ids + at, mask=inside, other=0).to(tl.int64)
        live_ids = _live(live, n, HAS_LIVE)
        slot, won, conflict, evicted = _claim(words, rows, slot, now, sets, buckets, probes, open_lookups)
        tl.store(slots + at, slot, mask=inside)
        _list_misses(miss_rows, miss_slots, miss_count, rows, slot, won)
        _count_claim(counters, inside & (at < live_ids), slot, won, conflict, evicted)
    if program == 0:
        tl.store(clock, now)


@triton.jit(do_not_specialize=["n", "sets", "buckets", "probes", "open_lookups"])
def lookup(
    words, clock, counters, ids, live, slots, miss_rows, miss_slots, miss_count, n, sets, buckets, probes, open_lookups,
    HAS_LIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """touch and claim of all ids in one program."""
    at = tl.arange(0, BLOCK)
    inside = at < n
    rows = tl.load(ids + at, mask=inside, other=0).to(tl.int64)
    now = tl.load(clock) + 1
    live_ids = _live(live, n, HAS_LIVE)
    asked = inside & (at < live_ids)
    slot, first = _touch(words, rows, inside, now, sets)
    _count_touch(counters, asked, slot, first, n, live_ids, tl.program_id(0) == 0)
    _rejuvenate(words, sets + 2 * buckets, now)
    tl.store(miss_count, tl.zeros([], tl.int64))
    tl.debug_barrier()  # every hit is stamped, and the count is 0, before the first claim; also, all have read the clock
    tl.store(clock, now)
    tl.store(clock + 1, now)
    slot = tl.where(inside, slot, 0)
    if tl.min(slot, axis=0) < 0:
        slot, won, conflict, evicted = _claim(words, rows, slot, now, sets, buckets, probes, open_lookups)
        _list_misses(miss_rows, miss_slots, miss_count, rows, slot, won)
        _count_claim(counters, asked, slot, won, conflict, evicted)
    tl.store(slots + at, slot, mask=inside)
