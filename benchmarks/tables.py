"""Measures the tables beside the alternatives in one run: row lookups, weighted sums, key search
and whole key searches.

    python benchmarks/tables.py [--quick] [--out benchmarks/results/DATE-tables.json]

Every figure is a median over repetitions in which ours and the alternative take turns, so that a busy machine slows
both; the busy share of the CPUs before the start is part of the result. Ceilings are measured in the same turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: spinning threads would disturb every figure

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Result, finish, header, in_turns

from memlane.native import (
    Arena,
    RowIndex,
    RowView,
    get_threads,
    kernel_variant,
    search_product_keys,
    select_product_keys,
)
from memlane.tables import RowFormat, encode_rows

ROW_BYTES = 2048


LOOKUP_TARGETS = {(1 << 20, 128): 10, (1 << 20, 32_768): 800, (1 << 26, 128): 20, (1 << 26, 32_768): 2500}


def lookups(ids_per_batch: int, batches: int, rows: int = 1 << 20, slots: int = 1 << 18) -> Result:
    """Exact-LRU lookups with 95 % hits: ours, and for small tables an OrderedDict that holds the same rows."""
    rng = np.random.default_rng(ids_per_batch)
    index = RowIndex(rows, slots, 4096)
    places = np.empty(1 << 16, np.int32)
    twin: OrderedDict[int, int] | None = OrderedDict() if slots <= 1 << 18 else None

    def ours(ids: np.ndarray) -> None:
        batch = index.begin()
        index.lookup(batch, ids, places)
        index.misses()
        index.end(batch)

    def ordered_dict(ids: list[int]) -> None:
        assert twin is not None
        for row in ids:
            slot = twin.get(row)
            if slot is None:
                _, slot = twin.popitem(last=False)
                twin[row] = slot
            else:
                twin.move_to_end(row)

    filling = np.unique(rng.integers(0, rows, 2 * slots))
    filling = rng.permutation(filling)[:slots]
    for begin in range(0, slots, 1 << 15):
        ours(filling[begin : begin + (1 << 15)])
    if twin is not None:
        twin.update((int(row), slot) for slot, row in enumerate(filling.tolist()))

    hot = int(ids_per_batch * 0.95)
    ours_seconds, twin_seconds = [], []
    asked: list[np.ndarray] = []
    before = index.counters()
    together = max(
        1, min(batches, slots // 4 // (ids_per_batch - hot))
    )  # few enough to evict no row that is hot
    for _ in range(0, batches, together):
        recent = index.ranking()
        cold = rng.permutation(
            np.setdiff1d(rng.integers(0, rows, 4 * together * (ids_per_batch - hot)), recent)
        )
        cold = cold[: together * (ids_per_batch - hot)].reshape(together, -1)
        prepared = [
            rng.permutation(np.concatenate([rng.choice(recent[: slots // 2], hot), row])) for row in cold
        ]
        for ids in prepared:
            started = time.perf_counter()
            ours(ids)
            ours_seconds.append(time.perf_counter() - started)
        asked += prepared
    # Afterwards, not in turns: it would sweep the index out of the processor's caches between two batches.
    for as_list in [ids.tolist() for ids in asked] if twin is not None else []:
        started = time.perf_counter()
        ordered_dict(as_list)
        twin_seconds.append(time.perf_counter() - started)
    after = index.counters()
    requested = after["requested_rows"] - before["requested_rows"]
    return {
        "ids": ids_per_batch,
        "rows": rows,
        "slots": slots,
        "map": index.map,
        "index_mib": round(index.nbytes / 2**20, 1),
        "hit_rate": round((after["hits"] - before["hits"]) / requested, 3),
        "ours_us": round(1e6 * statistics.median(ours_seconds), 1),
        "ordered_dict_us": round(1e6 * statistics.median(twin_seconds), 1) if twin_seconds else None,
        "target_us": LOOKUP_TARGETS.get((rows, ids_per_batch)),
    }


class RandomRows(NamedTuple):
    """A table of random rows in memory: its bytes, the view of its rows, and how many there are."""

    memory: np.ndarray
    view: RowView
    count: int


def random_rows(row_format: RowFormat, width: int, table_mib: int) -> RandomRows:
    stride = row_format.stride(width)
    count = (table_mib << 20) // stride
    arena = Arena(count * stride)
    memory = arena.array()
    some = encode_rows(torch.randn(4096, width), row_format).numpy().reshape(-1)
    for begin in range(0, len(memory), len(some)):
        memory[begin : begin + len(some)] = some[: len(memory) - begin]
    return RandomRows(memory, RowView(arena, 0, count, row_format.code, width), count)


def short_rows(width: int, tokens: int, repetitions: int, table_mib: int) -> Result:
    """Rows a second of int4, fp8 and int8 tables relative to a bfloat16 table of the same bytes, all in the same turns."""
    formats = [RowFormat.BFLOAT16, RowFormat.INT8, RowFormat.FP8, RowFormat.INT4]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((tokens, 128)).astype(np.float32)
    out = np.empty((tokens, width), np.float32)

    def sums_of(row_format: RowFormat) -> Callable[[], object]:
        _, view, count = random_rows(row_format, width, table_mib)
        batches = cycle([rng.integers(0, count, tokens * 128) for _ in range(repetitions + 1)])
        return lambda: view.weighted_sum(next(batches), weights, out)

    seconds = in_turns(repetitions, **{f.value: sums_of(f) for f in formats})
    bf16 = seconds["bfloat16"]
    return {
        "rows": f"{tokens} x 128 of width {width}",
        "bfloat16_us": round(1e6 * bf16, 1),
        **{f"{f.value}_rows_vs_bf16": round(bf16 / seconds[f.value], 2) for f in formats[1:]},
    }


def weighted_sums(row_format: RowFormat, width: int, tokens: int, repetitions: int, table_mib: int) -> Result:
    """tokens x 128 random rows: our sum, torch's embedding_bag, and only reading the same rows (the ceiling)."""
    stride = row_format.stride(width)
    memory, view, count = random_rows(row_format, width, table_mib)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((tokens, 128)).astype(np.float32)
    out = np.empty((tokens, width), np.float32)
    # Fresh rows for every call (no row is still in the processor's cache), drawn before the clock starts.
    batches = cycle([rng.integers(0, count, tokens * 128) for _ in range(3 * repetitions + 3)])
    seconds = in_turns(
        repetitions,
        ours=lambda: view.weighted_sum(next(batches), weights, out),
        read_only=lambda: view.touch(next(batches)),
    )
    bag = 0.0
    if row_format is RowFormat.BFLOAT16:  # in turns of its own: torch's threads linger and would slow ours
        matrix = torch.from_numpy(memory).view(torch.bfloat16).view(count, width)
        half = torch.from_numpy(weights).bfloat16()
        beside = in_turns(
            repetitions // 2 + 1,
            embedding_bag=lambda: F.embedding_bag(
                torch.from_numpy(next(batches)).view(tokens, 128), matrix, per_sample_weights=half, mode="sum"
            ),
            read_only=lambda: view.touch(next(batches)),
        )
        bag = min(beside["read_only"], seconds["read_only"]) / beside["embedding_bag"]
    read = tokens * 128 * stride
    result: Result = {
        "rows": f"{tokens} x 128 of {stride} B ({row_format.value})",
        "ceiling_gb_s": round(read / seconds["read_only"] / 1e9, 2),
        "ours_gb_s": round(read / seconds["ours"] / 1e9, 2),
        "ours_us": round(1e6 * seconds["ours"], 1),
        "ours_of_ceiling": round(seconds["read_only"] / seconds["ours"], 3),
        "rows_per_s": round(tokens * 128 / seconds["ours"]),
    }
    if bag:
        result["embedding_bag_of_ceiling"] = round(bag, 3)
    return result


def selections(tokens: int, repetitions: int) -> Result:
    """Top 32 of 1,024 sub-keys and of their sums, 4 heads: ours beside torch.topk of the halves alone."""
    scores = torch.randn(tokens * 4, 2, 1024)
    seconds = in_turns(
        repetitions, ours=lambda: select_product_keys(scores, 32), topk=lambda: scores.topk(32, dim=-1)
    )
    return {
        "tokens": tokens,
        "ours_us": round(1e6 * seconds["ours"], 1),
        "torch_topk_us": round(1e6 * seconds["topk"], 1),
        "times_faster": round(seconds["topk"] / seconds["ours"], 1),
    }


def searches(tokens: int, repetitions: int) -> Result:
    """Projected queries to rows, 4 heads x 1,024 sub-keys of 2 x 256, top 32: ours beside the two stages in plain torch."""
    query, keys = torch.randn(tokens, 4, 2, 256), torch.randn(4, 2, 1024, 256)

    def two_stages() -> tuple[torch.Tensor, torch.Tensor]:
        halves = torch.einsum("thcw,hcnw->thcn", query, keys).topk(32, dim=-1)
        sums = halves.values[:, :, 0, :, None] + halves.values[:, :, 1, None, :]
        best = sums.flatten(2).topk(32, dim=-1)
        first = halves.indices[:, :, 0].gather(2, best.indices // 32)
        return first * 1024 + halves.indices[:, :, 1].gather(2, best.indices % 32), best.values

    # Products alone are the floor of any search that makes its scores with torch.
    planes, columns = query.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).transpose(1, 2)
    seconds = in_turns(
        repetitions,
        ours=lambda: search_product_keys(query, keys, 32),
        torch=two_stages,
        products=lambda: torch.bmm(planes, columns),
    )
    return {
        "tokens": tokens,
        "ours_us": round(1e6 * seconds["ours"], 1),
        "torch_us": round(1e6 * seconds["torch"], 1),
        "torch_products_us": round(1e6 * seconds["products"], 1),
        "times_faster": round(seconds["torch"] / seconds["ours"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions and smaller tables: a smoke test"
    )
    parser.add_argument("--out", type=Path, help="write the result here too")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(get_threads())

    print(f"kernels {kernel_variant()}, {get_threads()} thread(s)")
    result: Result = {**header("tables"), "kernels": kernel_variant(), "threads": get_threads()}

    print("\nrow lookups, 95 % hits, warm")
    shapes_of_tables = [(1 << 20, 1 << 18)] + ([] if quick else [(1 << 26, 1 << 21), (1 << 26, 1 << 22)])
    result["lookups"] = [
        lookups(n, 20 if quick else 200 if n < 10_000 else 60, rows, slots)
        for rows, slots in shapes_of_tables
        for n in (128, 2048, 32_768)
    ]
    for r in result["lookups"]:
        target = f"   target {r['target_us']} us" if r["target_us"] else ""
        beside = f"   OrderedDict {r['ordered_dict_us']:9.1f} us" if r["ordered_dict_us"] else ""
        print(
            f"  {r['rows'] >> 20:3d} M rows, {r['slots'] >> 10:5d} k slots ({r['map']}), {r['ids']:6d} ids"
            f"   ours {r['ours_us']:8.1f} us{beside}{target}"
        )

    mib = 128 if quick else 2048
    print(f"\nweighted sums over a table of {mib} MiB in RAM, random rows")
    shapes = [(RowFormat.BFLOAT16, 1024, n) for n in (1, 16, 256)]
    shapes += [(RowFormat.FLOAT32, 512, 16), (RowFormat.INT8, 1024, 16), (RowFormat.FP8, 1024, 16)]
    shapes += [(RowFormat.INT4, 1024, 16)]
    result["weighted_sums"] = []
    for row_format, width, tokens in shapes:
        r = weighted_sums(row_format, width, tokens, 5 if quick else 200 if tokens < 100 else 40, mib)
        result["weighted_sums"].append(r)
        bag = (
            f"   embedding_bag {r['embedding_bag_of_ceiling']:.2f}" if "embedding_bag_of_ceiling" in r else ""
        )
        print(
            f"  {r['rows']:32s} ours {r['ours_gb_s']:6.2f} GB/s of {r['ceiling_gb_s']:6.2f} = {r['ours_of_ceiling']:.2f}{bag}"
            f"   {r['rows_per_s'] / 1e6:.2f} M rows/s"
        )

    result["short_rows"] = r = short_rows(1024, 16, 5 if quick else 200, mib // 2)
    print(
        f"  rows/s beside bf16 in the same turns: int4 x {r['int4_rows_vs_bf16']}, fp8 x {r['fp8_rows_vs_bf16']}, int8 x {r['int8_rows_vs_bf16']}"
    )

    print("\nproduct-key selection, 4 heads, top 32 of 1,024 (torch: the two halves only)")
    result["selections"] = [selections(n, 5 if quick else 40) for n in (1, 16, 256)]
    for r in result["selections"]:
        print(
            f"  {r['tokens']:4d} tokens   ours {r['ours_us']:9.1f} us   topk {r['torch_topk_us']:9.1f} us   x {r['times_faster']}"
        )

    print("\nproduct-key search, 4 heads, top 32 of 1,024 keys of 2 x 256 (torch: the two stages)")
    result["search"] = [searches(n, 5 if quick else 40) for n in (1, 16, 256)]
    for r in result["search"]:
        print(
            f"  {r['tokens']:4d} tokens   ours {r['ours_us']:9.1f} us   torch {r['torch_us']:9.1f} us"
            f"   its products alone {r['torch_products_us']:9.1f} us   x {r['times_faster']}"
        )

    finish(result, options.out)


if __name__ == "__main__":
    main()
