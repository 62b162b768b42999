"""One program per query: from both halves' scores to its k best rows.

    half 0 [N] ─┐  threshold, then the k that reach it, then sort  ─┐  sums of rank pairs ─ the same again ─ k rows
    half 1 [N] ─┘  (both at once)                                  ─┘

A tile of numbers lies so that a thread holds whole words of bits, and everything but the last reduction stays in it:

    tile [R, H, L, 4]: row r of group l, four neighbours at once (one vector load); H halves; L = 32 lanes a warp
    position = r * 4L + l * 4 + c                    bit of word [H, L] = r * 4 + c

Finding the k largest by bisection over the bits of a threshold, with counts, takes two instructions a number and step;
sorting only what is left is cheap. What ties at the threshold is cut by a second bisection, over labels.

Instructions of a query, N = 1,024, k = 32, nine steps of either bisection (sm_90, counted in the machine code):

    one warp     3.3 k, no barrier, no shared memory: 166 a step for both halves    <- taken
    two warps    5.0 k, half of them each
    four warps   8.8 k, a quarter of them each
"""

import triton
import triton.language as tl

_INF_ORDER = tl.constexpr(0x7F800000)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _order(x):
    """fp32 -> int32 in the same order; -0.0 as 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _clamped(x):
    """_order without NaN: a threshold is a number."""
    return tl.minimum(tl.maximum(_order(x), -_INF_ORDER - 1), _INF_ORDER)


@triton.jit
def _count(mask):
    """[R, H, L, 4] -> int32 [H]"""
    ones = tl.where(mask, 1.0, 0.0)  # exact; sums of int32 would become selects and moves, 1.5 times as many
    return tl.sum(tl.sum(tl.sum(ones, 3), 0).to(tl.int32), 1)


@triton.jit
def _words(mask):
    """[R, H, L, 4] -> int32 [H, L], bit r * 4 + c"""
    R: tl.constexpr = mask.shape[0]
    bit = tl.arange(0, R)[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    return tl.sum(tl.sum(tl.where(mask, 1 << bit, 0), 3), 0)


@triton.jit
def _half(low, high):
    """Half the way, rounded down; high - low does not fit 31 bits."""
    return ((high - low).to(tl.uint32, bitcast=True) >> 1).to(tl.int32)


@triton.jit
def _reaching(x, labels, valid, K: tl.constexpr, VALID: tl.constexpr):
    """Words of the k largest x of each half, ties by smaller label. VALID: how many of each half's x are numbers.

    A NaN counts as reaching every threshold. At least k bits are set: exactly k where no x is NaN.
    """
    L: tl.constexpr = x.shape[2]
    # The k-th largest is at least the smallest of k group maxima: fewer bits to bisect.
    least = tl.where(valid, x, float("inf")) if x.shape[0] * L * 4 > VALID else x
    if K <= L and VALID >= L * 4:
        maxima = tl.max(tl.max(x, 3), 0)
        high = _clamped(tl.max(maxima, 1))
        low = _clamped(tl.min(maxima, 1))
    elif K <= L * 4 and VALID >= L * 4:
        maxima = tl.max(x, 0)
        high = _clamped(tl.max(tl.max(maxima, 2), 1))
        low = _clamped(tl.min(tl.min(maxima, 2), 1))
    else:
        high = _clamped(tl.max(tl.max(tl.max(x, 3), 0), 1))
        low = _clamped(tl.min(tl.min(tl.min(least, 3), 0), 1))
    count = tl.full(low.shape, K + 1, tl.int32)  # of those that reach low: not known yet
    while tl.max((low < high).to(tl.int32), 0) != 0:
        middle = high - _half(low, high)
        found = _count(~(x < _value(middle)[None, :, None, None]))
        low = tl.where(found >= K, middle, low)
        count = tl.where(found >= K, found, count)
        high = tl.where(found == K, middle, tl.where(found > K, high, middle - 1))
    threshold = _value(low)[None, :, None, None]
    words = _words(~(x < threshold))
    if tl.max(count, 0) > K:
        above = ~(x <= threshold)
        ties = ~(above | (x < threshold)) & valid
        wanted = K - _count(above)
        first = tl.full(low.shape, -(2**31), tl.int32)
        last = tl.full(low.shape, 2**31 - 1, tl.int32)
        while tl.max((first < last).to(tl.int32), 0) != 0:
            middle = first + _half(first, last)
            enough = _count(ties & (labels <= middle[None, :, None, None])) >= wanted
            last = tl.where(enough, middle, last)
            first = tl.where(enough, first, middle + 1)
        words = _words(above | (ties & (labels <= last[None, :, None, None])))
    return words


@triton.jit
def _keep(x, kept):
    """Puts x [A, B] where every warp of the program can read it."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    tl.debug_barrier()  # what was there has been read
    tl.store(kept + tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :], x)
    tl.debug_barrier()


@triton.jit
def _take(x, kept, index, ALONE: tl.constexpr):
    """x[a, index[a, b]]. One warp asks its lanes; Triton 3.6 fails to compile gathers by several, which read what was
    kept."""
    if ALONE:
        return tl.gather(x, index, 1)
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    return tl.load(kept + tl.arange(0, A)[:, None] * B + index)


@triton.jit
def _positions(words, kept, SLOTS: tl.constexpr, BITS: tl.constexpr, ALONE: tl.constexpr):
    """Where the first SLOTS set bits of words [H, L] are: positions int32 [H, SLOTS], those past the last bit anywhere."""
    H: tl.constexpr = words.shape[0]
    L: tl.constexpr = words.shape[1]
    bits = words.to(tl.uint32, bitcast=True)
    pairs = bits - ((bits >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes = (fours + (fours >> 4)) & 0x0F0F0F0F
    counts = ((bytes * 0x01010101) >> 24).to(tl.int32)
    ends = tl.cumsum(counts, 1)
    if not ALONE:
        _keep(ends, kept)
        _keep(words, kept + H * L)
    rank = tl.zeros([H, SLOTS], tl.int32) + tl.arange(0, SLOTS)[None, :]
    lane = tl.zeros([H, SLOTS], tl.int32)
    for i in tl.static_range(1, 17):  # the first word that ends behind this rank
        if (L >> i) > 0:
            lane += tl.where(_take(ends, kept, lane + ((L >> i) - 1), ALONE) <= rank, L >> i, 0)
    end = _take(ends, kept, lane, ALONE)
    word = _take(words, kept + H * L, lane, ALONE).to(tl.uint32, bitcast=True)
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes = (fours + (fours >> 4)) & 0x0F0F0F0F
    rank -= end - ((bytes * 0x01010101) >> 24).to(tl.int32)
    bit = tl.zeros([H, SLOTS], tl.int32)
    if BITS > 16:
        below = ((bytes + (bytes >> 8)) & 0x1F).to(tl.int32)
        bit += tl.where(rank >= below, 16, 0)
        rank -= tl.where(rank >= below, below, 0)
    if BITS > 8:
        below = ((bytes >> bit.to(tl.uint32)) & 0x0F).to(tl.int32)
        bit += tl.where(rank >= below, 8, 0)
        rank -= tl.where(rank >= below, below, 0)
    if BITS > 4:
        below = ((fours >> bit.to(tl.uint32)) & 0x0F).to(tl.int32)
        bit += tl.where(rank >= below, 4, 0)
        rank -= tl.where(rank >= below, below, 0)
    below = ((pairs >> bit.to(tl.uint32)) & 0x03).to(tl.int32)
    bit += tl.where(rank >= below, 2, 0)
    rank -= tl.where(rank >= below, below, 0)
    bit += tl.where(rank >= ((word >> bit.to(tl.uint32)) & 1).to(tl.int32), 1, 0)
    return (bit >> 2) * (L * 4) + lane * 4 + (bit & 3)


@triton.jit
def _exchanged(x, DISTANCE: tl.constexpr, UP: tl.constexpr):
    """Compare and exchange x[i] with x[i + DISTANCE]: the smaller first where i & UP, else the larger."""
    REST: tl.constexpr = x.shape[0] // (2 * DISTANCE)
    both = tl.reshape(x, [REST, 2, DISTANCE])
    other = tl.sum(both, 1, keep_dims=True) - both  # exact: int64 wraps
    second = tl.arange(0, 2)[None, :, None] == 1
    up = ((tl.arange(0, REST) * (2 * DISTANCE)) & UP)[:, None, None] != 0
    return tl.reshape(tl.where((other > both) != (second != up), other, both), x.shape)


@triton.jit
def _sorted(x):
    """int64 [H, SLOTS], each row descending (bitonic: Batcher 1968)."""
    H: tl.constexpr = x.shape[0]
    SLOTS: tl.constexpr = x.shape[1]
    flat = tl.reshape(x, [H * SLOTS])
    for size in tl.static_range(1, 17):
        if (1 << size) <= SLOTS:
            for step in tl.static_range(1, 17):
                if step <= size:
                    flat = _exchanged(flat, 1 << (size - step), 0 if (1 << size) == SLOTS else 1 << size)
    return tl.reshape(flat, [H, SLOTS])


@triton.jit
def _packed(score, label, used):
    """| order of the score (32, signed) | 2**32 - 1 - label (32) |: distinct numbers in the order that is wanted."""
    packed = (_order(score).to(tl.int64) << 32) + (_LOW - label.to(tl.int64))
    return tl.where(used, packed, -(2**63))


@triton.jit
def _pair_sums(best, kept, ranks, N: tl.constexpr, ALONE: tl.constexpr):
    """best int64 [2, SLOTS] packed, ranks [P]: rank0 | rank1 << 16 -> sums fp32 [P], rows int64 [P]"""
    SLOTS: tl.constexpr = best.shape[1]
    if ALONE:
        best0, best1 = tl.split(tl.permute(best, (1, 0)))
        first = tl.gather(best0, ranks & 0xFFFF, 0)
        second = tl.gather(best1, ranks >> 16, 0)
    else:
        first = tl.load(kept + (ranks & 0xFFFF))
        second = tl.load(kept + SLOTS + (ranks >> 16))
    sums = _value((first >> 32).to(tl.int32)) + _value((second >> 32).to(tl.int32))
    return sums, ((first & _LOW) ^ _LOW) * N + ((second & _LOW) ^ _LOW)


@triton.jit
def choose(
    scores,  # fp32: query (token, head), half and key at these strides
    pairs,  # int32 [PAIRS]: rank0 | rank1 << 16
    log_scale,  # fp32 [heads], with SCALED
    ids,  # int64 [tokens * heads, K]
    out,  # fp32 [tokens * heads, K]: weights, or scores without SOFTMAX
    kept,  # int64 [tokens * heads, KEPT], to write in; nothing where ALONE
    heads,
    stride_token,
    stride_head,
    stride_half,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two
    TILE: tl.constexpr,  # N rounded up
    LANES: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    PAIR_LANES: tl.constexpr,
    KEPT: tl.constexpr,
    ALONE: tl.constexpr,  # one warp
    SOFTMAX: tl.constexpr,
    SCALED: tl.constexpr,
):
    query = tl.program_id(0)
    head = query % heads
    kept += query.to(tl.int64) * KEPT
    kept_words = kept.to(tl.pointer_type(tl.int32))
    scores += (query // heads).to(tl.int64) * stride_token + head.to(tl.int64) * stride_head
    ROWS: tl.constexpr = TILE // (LANES * 4)
    # Loaded as a matrix whose rows are neighbours: that lays whole vectors, then lanes, along a row.
    line = tl.arange(0, ROWS * 2)[:, None]
    column = tl.arange(0, LANES * 4)[None, :]
    position = (line >> 1) * (LANES * 4) + column
    at = scores + (line & 1).to(tl.int64) * stride_half + position
    x = tl.load(at) if N == TILE else tl.load(at, mask=position < N, other=float("-inf"))
    tile: tl.constexpr = (ROWS, 2, LANES, 4)
    x = tl.reshape(x, tile)
    position = tl.reshape(tl.broadcast_to(position, (ROWS * 2, LANES * 4)), tile)
    words = _reaching(x, position, position < N, K, N)
    keys = _positions(words, kept_words, SLOTS, ROWS * 4, ALONE)
    rank = tl.arange(0, SLOTS)
    used = rank < K
    keys = tl.where(used[None, :], keys, 0)
    half_scores = tl.load(scores + tl.arange(0, 2).to(tl.int64)[:, None] * stride_half + keys)
    best = _sorted(_packed(half_scores, keys, used[None, :]))
    if not ALONE:
        _keep(best, kept)

    pair = tl.arange(0, PAIR_TILE)
    sums, rows = _pair_sums(best, kept, tl.load(pairs + pair, mask=pair < PAIRS, other=0), N, ALONE)
    sums = tl.where(pair < PAIRS, sums, float("-inf"))
    PAIR_ROWS: tl.constexpr = PAIR_TILE // (PAIR_LANES * 4)
    shape: tl.constexpr = (PAIR_ROWS, 1, PAIR_LANES, 4)
    valid = tl.reshape(pair < PAIRS, shape)
    labels = tl.reshape((rows - 2**31).to(tl.int32), shape)
    words = _reaching(tl.reshape(sums, shape), labels, valid, K, PAIRS)
    winner = tl.reshape(_positions(words, kept_words + 4 * SLOTS, SLOTS, PAIR_ROWS * 4, ALONE), [SLOTS])
    ranks = tl.load(pairs + tl.where(used, winner, 0))
    sums, rows = _pair_sums(best, kept, ranks, N, ALONE)
    chosen = tl.reshape(_packed(sums, rows, used), [1, SLOTS])
    chosen = _LOW - (tl.reshape(_sorted(chosen), [SLOTS]) & _LOW)
    chosen = tl.where(used, chosen, 0)

    key0 = chosen.to(tl.uint32) // N
    key1 = chosen.to(tl.uint32) - key0 * N
    result = tl.load(scores + key0) + tl.load(scores + stride_half + key1)
    if SOFTMAX:
        if SCALED:
            result *= tl.exp(tl.load(log_scale + head))
        result = tl.where(used, result, float("-inf"))
        result = tl.exp(result - tl.max(result, 0))
        result = result / tl.sum(result, 0)
    base = query.to(tl.int64) * K + rank
    tl.store(ids + base, chosen, mask=used)
    tl.store(out + base, result, mask=used)
