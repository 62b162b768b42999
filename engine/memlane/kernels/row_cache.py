"""Launches the row cache's kernels. Their twin is `reference_cache`; what they work on is `cache_state`.

A lookup is one launch for few ids and two for many; a copy of its missing rows is one more. Beginning a lookup takes no
kernel of its own: the first one counts the clock on for the second, and that one for the next lookup.
Lookups of one cache must run in one order, that of one stream. Everything can be captured in a graph and replayed.
"""

from __future__ import annotations

from torch import Tensor

from memlane.kernels.aot import Compilation
from memlane.kernels.cache_state import CacheState, LookupBuffers
from memlane.kernels.jit import row_cache as jit
from memlane.kernels.row_copy import copy_rows

__all__ = ["AOT", "copy_rows", "lookup"]

# Up to so many ids one program has the whole lookup: with 16 warps, each thread has eight loads of 16 bytes in flight.
_ONE_PROGRAM = 256
_IDS_A_WARP_OF_ONE = 16
_TOUCH_BLOCK, _TOUCH_WARPS = 32, 4  # ids a program, where there are many
_CLAIM_BLOCK, _CLAIM_WARPS = 16, 2  # twice that makes ptxas spill on sm_90


def lookup(
    state: CacheState,
    ids: Tensor,
    buffers: LookupBuffers,
    open_lookups: int = 1,
    live: Tensor | None = None,
) -> None:
    """Finds or makes a slot for each id's row and lists the rows that must be brought there before they are used.

    ids: int32 or int64 [n], each a row of the table (not checked). Rows of the latest `open_lookups` lookups, this one
    included, are not evicted: 1, or 2 where the one before is still open. Where no way of a row's set is free the row
    gets a slot of scratch, which holds until the next lookup but one; where that is full, ~row.
    live: int64 [1], if ids[live:] are padding: copies of ids before, which get slots but are not counted.
    """
    n = len(ids)
    if n == 0:
        buffers.miss_count.zero_()
        return
    words, clock, counters, sets, probes = state
    slots, miss_rows, miss_slots, miss_count = buffers
    has_live, live = live is not None, miss_count if live is None else live
    if n <= _ONE_PROGRAM:
        block = max(_IDS_A_WARP_OF_ONE, 1 << (n - 1).bit_length())
        jit.lookup[(1,)](
            words, clock, counters, ids, live, slots, miss_rows, miss_slots, miss_count,
            n, sets, state.buckets, probes, open_lookups,
            HAS_LIVE=has_live, BLOCK=block, num_warps=block // _IDS_A_WARP_OF_ONE,
        )  # fmt: skip
        return
    jit.touch[(-(-n // _TOUCH_BLOCK),)](
        words, clock, counters, ids, live, slots, miss_count,
        n, sets, len(words),
        HAS_LIVE=has_live, BLOCK=_TOUCH_BLOCK, num_warps=_TOUCH_WARPS,
    )  # fmt: skip
    jit.claim[(-(-n // _CLAIM_BLOCK),)](
        words, clock, counters, ids, live, slots, miss_rows, miss_slots, miss_count,
        n, sets, state.buckets, probes, open_lookups,
        HAS_LIVE=has_live, BLOCK=_CLAIM_BLOCK, num_warps=_CLAIM_WARPS,
    )  # fmt: skip


def _compilations() -> list[Compilation]:
    pointers = dict.fromkeys(
        ("words", "clock", "counters", "ids", "live", "miss_rows", "miss_count", "rows", "count"), "*i64"
    )
    numbers = dict.fromkeys(("n", "sets", "windows", "buckets", "probes", "open_lookups"), "i32")
    types = {**pointers, "slots": "*i32", "miss_slots": "*i32", **numbers}
    programs = {
        "lookup of 1 id": (jit.lookup, _IDS_A_WARP_OF_ONE, 1),
        "lookup of 128 ids": (jit.lookup, 128, 128 // _IDS_A_WARP_OF_ONE),
        "lookup of 256 ids": (jit.lookup, _ONE_PROGRAM, _ONE_PROGRAM // _IDS_A_WARP_OF_ONE),
        "touch": (jit.touch, _TOUCH_BLOCK, _TOUCH_WARPS),
        "claim": (jit.claim, _CLAIM_BLOCK, _CLAIM_WARPS),
    }
    found = []
    for name, (kernel, block, warps) in programs.items():
        possible = {"BLOCK": block, "HAS_LIVE": True}
        constants = {one: value for one, value in possible.items() if one in kernel.arg_names}
        signature = {one: types[one] for one in kernel.arg_names if one not in constants}
        found.append(Compilation(f"row cache, {name}", kernel, signature, constants, warps))
    return found


AOT = _compilations()
