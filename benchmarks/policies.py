"""Measures the eviction policies of the row cache in one run: hit rates beside the ceiling, and the time of a lookup.

    python benchmarks/policies.py [--quick] [--out benchmarks/results/DATE-policies.json]

The reads are drawn from a skew as measured on product-key models: the top 1, 10, 20 and 50 % of the rows take 11, 40, 56
and 83 % of them. All policies serve the same batches, 16 of 2,048 ids (16 tokens) for one of 32,768 (a prompt), from an
empty cache; the last quarter counts. The ceiling is the share of the rows that are in fact the most read, known
beforehand and never changed (under drift: known at every moment, which no policy can reach). Lookup times are medians
over repetitions in which all policies take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from measuring import Result, finish, header

from memlane.native import RowIndex, cache_policies

# Share of the rows, the most read first, and share of the reads they take; powers of the rank in between.
ROW_SHARES = np.array([0.01, 0.1, 0.2, 0.5, 1.0])
READ_SHARES = np.array([0.11, 0.40, 0.56, 0.83, 1.0])
SLOPE = np.log(READ_SHARES[1] / READ_SHARES[0]) / np.log(ROW_SHARES[1] / ROW_SHARES[0])  # also below 1 %
LOG_ROWS = np.log(np.concatenate([[1e-9], ROW_SHARES]))
LOG_READS = np.concatenate([[np.log(0.11) + SLOPE * np.log(1e-9 / 0.01)], np.log(READ_SHARES)])

DECODE, PROMPT, SCAN = 2048, 32_768, 16_384
CYCLE = 17  # batches: 16 of decoding and a prompt
SCRATCH = 8192
SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5]  # slots / rows


def reads_of_top(share: float) -> float:
    """Share of the reads that the given share of the rows takes under the skew."""
    return float(np.exp(np.interp(np.log(share), LOG_ROWS, LOG_READS)))


def ranks(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Ranks drawn from the skew, int64 [count], 0 = the most read row."""
    u = np.log1p(-rng.random(count))  # log of a number in (0, 1]
    return np.minimum(np.exp(np.interp(u, LOG_READS, LOG_ROWS)) * rows, rows - 1).astype(np.int64)


def batches(kind: str, rows: int, reads: int) -> list[np.ndarray]:
    """The trace: `stable` skew; `drift`, each row's rank redrawn on average once in 10 reads a row; `scan`, a third of
    the reads being the rows of the table from the first to the last, as a walk over it would; `uniform`.
    """
    rng = np.random.default_rng(7)
    row_of = rng.permutation(rows).astype(np.int32)
    trace: list[np.ndarray] = []
    done, scanned = 0, 0
    while done < reads:
        count = PROMPT if len(trace) % CYCLE == CYCLE - 1 else DECODE
        if kind == "uniform":
            ids = rng.integers(0, rows, count, dtype=np.int32)
        else:
            ids = row_of[ranks(rng, rows, count)]
        if kind == "drift":
            moved = rng.choice(rows, min(count // 10, rows) // 2 * 2, replace=False)
            row_of[moved] = row_of[np.roll(moved, len(moved) // 2)]
        if kind == "scan" and len(trace) % CYCLE in (4, 12):
            ids = ((scanned + np.arange(SCAN)) % rows).astype(np.int32)
            scanned += SCAN
        trace.append(ids)
        done += len(ids)
    return trace


def ceiling(kind: str, share: float, trace: list[np.ndarray]) -> float:
    """Hit rate of the best set that never changes."""
    if kind == "uniform":
        return share
    scans = sum(len(ids) for ids in trace if len(ids) == SCAN) / sum(map(len, trace))
    return scans * share + (1 - scans) * reads_of_top(share)


def serve(index: RowIndex, ids: np.ndarray, places: np.ndarray) -> None:
    batch = index.begin()
    while True:
        served = index.lookup(batch, ids, places)
        ids = ids[served:]
        if len(ids) == 0:
            break
        index.release_scratch(batch)
    index.end(batch)


def hit_rate(policy: str, rows: int, share: float, trace: list[np.ndarray]) -> float:
    index = RowIndex(rows, int(rows * share), SCRATCH, policy)
    places = np.empty(PROMPT, np.int32)
    warm = len(trace) * 3 // 4
    for ids in trace[:warm]:
        serve(index, ids, places)
    before = index.counters()
    for ids in trace[warm:]:
        serve(index, ids, places)
    after = index.counters()
    return (after["hits"] - before["hits"]) / (after["requested_rows"] - before["requested_rows"])


def lookups(ids_per_batch: int, repetitions: int, rows: int = 1 << 20, slots: int = 1 << 18) -> list[Result]:
    """Microseconds of a lookup with about 95 % hits, each policy on an index of its own, the same ids for all."""
    rng = np.random.default_rng(ids_per_batch)
    order = rng.permutation(rows)
    hot, cold = order[: slots // 2], np.resize(order[slots:], repetitions * ids_per_batch)
    indices = {policy: RowIndex(rows, slots, 4096, policy) for policy in cache_policies()}
    places = np.empty(1 << 16, np.int32)
    for index in indices.values():
        for ids in [hot, order[slots // 2 : slots], hot, hot]:  # the hot rows last: recent for LRU, too
            for begin in range(0, len(ids), 1 << 14):
                serve(index, ids[begin : begin + (1 << 14)], places)
    before = {policy: index.counters() for policy, index in indices.items()}
    seconds: dict[str, list[float]] = {policy: [] for policy in indices}
    missing = ids_per_batch - int(ids_per_batch * 0.95)
    names = list(indices)
    for turn in range(repetitions):
        new = cold[turn * missing : (turn + 1) * missing]
        ids = rng.permutation(np.concatenate([rng.choice(hot, ids_per_batch - missing), new]))
        for policy in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            serve(indices[policy], ids, places)
            seconds[policy].append(time.perf_counter() - started)
    results = []
    for policy, index in indices.items():
        after = index.counters()
        requested = after["requested_rows"] - before[policy]["requested_rows"]
        results.append(
            {
                "policy": policy,
                "ids": ids_per_batch,
                "hit_rate": round((after["hits"] - before[policy]["hits"]) / requested, 3),
                "us": round(1e6 * statistics.median(seconds[policy]), 1),
                "us_of_lru": round(statistics.median(seconds[policy]) / statistics.median(seconds["lru"]), 2),
                "index_bytes_per_slot": round(index.nbytes / slots, 1),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller table and fewer reads: a smoke test")
    parser.add_argument("--out", type=Path, help="write the result here too")
    options = parser.parse_args()
    quick = options.quick
    rows, reads = (200_000, 3_000_000) if quick else (1_000_000, 16_000_000)
    shares = [0.05, 0.2] if quick else SHARES
    policies = cache_policies()

    result: Result = {
        **header("policies"),
        "rows": rows,
        "reads": reads,
        "hit_rates": [],
        "lookups": [],
    }
    for kind in ("stable", "drift", "scan", "uniform"):
        trace = batches(kind, rows, reads)
        print(f"\nhit rate in %, {kind}, {rows} rows, {reads / 1e6:.0f} M reads")
        print("  cache    " + "".join(f"{policy:>10s}" for policy in policies) + "   ceiling")
        for share in shares:
            rates = {policy: round(hit_rate(policy, rows, share, trace), 4) for policy in policies}
            most = round(ceiling(kind, share, trace), 4)
            result["hit_rates"].append({"reads": kind, "cache": share, **rates, "ceiling": most})
            columns = "".join(f"{100 * rate:10.2f}" for rate in rates.values())
            print(f"  {100 * share:4.0f} %   {columns}{100 * most:10.2f}", flush=True)

    print("\nlookup at about 95 % hits, 1 M rows, 256 k slots, warm")
    for ids in (128, PROMPT):
        for r in lookups(ids, (50 if quick else 2000) if ids == 128 else (10 if quick else 100)):
            result["lookups"].append(r)
            print(
                f"  {ids:6d} ids   {r['policy']:8s} {r['us']:8.1f} us   x {r['us_of_lru']:.2f} of LRU"
                f"   {r['hit_rate']:.3f} hits   index {r['index_bytes_per_slot']:.1f} B/slot"
            )

    finish(result, options.out)


if __name__ == "__main__":
    main()
