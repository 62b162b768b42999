"""`memlane plan`: what a model needs on this machine, in words, and the command to serve it with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from memlane.config import parse_bytes
from memlane.planner import Plan, make_plan
from memlane.storage import Storage, locate


def plan(model: str, memory: str | None, trace: str | None, as_json: bool) -> int:
    """Prints the plan; returns 0, or 1 if the model cannot be served in this memory. Raises MemlaneError."""
    given = None if memory is None else parse_bytes(memory, option="--memory")
    made = make_plan(model, given, trace)
    storage = locate(made.tables_lie_in)
    print(json.dumps(_plain(made, storage), indent=1) if as_json else "\n".join(_lines(made, storage)))
    return 0 if made.command is not None else 1


def _lines(p: Plan, storage: Storage | None) -> Iterator[str]:
    yield f"{p.model}: {'a model directory' if p.form == 'memlane' else f'a checkpoint of the form {p.form}'}"
    yield ""
    yield f"dense weights   {_sum(p.weights):>11}   {_types(p.weights)}; stored as {_types(p.stored)}"
    yield f"KV cache        {_size(p.kv.nbytes):>11}   {p.kv.tokens:,} tokens by default, each 1,000 take {_size(p.kv.per_1000_tokens)} ({p.kv.dtype}); sequences up to {p.kv.max_model_len:,}"
    for t in p.tables:
        yield f"table           {_size(t.nbytes):>11}   {t.name}: {t.rows:,} rows of {t.row_bytes:,} bytes ({t.row_format})"
    yield from _tiers(p)
    yield from _place(p, storage)
    yield ""
    yield (
        f"memory          {_size(p.memory):>11}   to plan with: {_size(max(0, p.left))} for tables after weights, KV cache "
        f"and a reserve of {_size(p.reserve)}"
    )
    yield from _advice(p)


def _tiers(p: Plan) -> Iterator[str]:
    if not p.tables:
        return
    yield ""
    yield f"in RAM on host  {_size(p.table_bytes):>11}   all tables"
    if p.disk is None:
        yield "in RAM on disk            -   not even an empty cache fits"
        return
    d = p.disk
    yield (
        f"in RAM on disk  {_size(d.nbytes):>11}   {d.cached_rows:,} cached rows {_size(d.row_cache)}, index {_size(d.index)}, "
        f"buffers {_size(d.buffers)}, checksums {_size(d.checksums)}"
    )


def _place(p: Plan, storage: Storage | None) -> Iterator[str]:
    if not p.tables:
        return
    yield ""
    yield f"files           {p.tables_lie_in}" + ("" if storage is None else f": {storage}")
    if p.must_convert:
        takes = p.table_bytes + sum(p.stored.values())
        free = "" if storage is None else f", {_size(storage.free)} are free"
        yield f"                converted into there once by the first start: takes {_size(takes)}{free}"
        if storage is not None and storage.free < takes:
            yield "                that does not fit: set MEMLANE_CACHE to a larger place"
    if storage is not None and storage.in_memory:
        yield "                tables in memory gain nothing from being served from disk"


def _advice(p: Plan) -> Iterator[str]:
    yield ""
    if p.command is None:
        yield f"It cannot be served in this memory: about {_size(p.short_of)} are missing."
        return
    if not p.tables:
        yield "There are no tables to place."
    elif p.host_fits:
        yield f"placement host: the tables fit the {_size(p.left)} left for them, and rows in RAM are never waited for"
    elif p.disk is not None:
        share = p.disk.row_cache / p.table_bytes
        yield f"placement disk: the tables do not fit the {_size(p.left)} left for them"
        why = (
            "all that is left"
            if not p.expected
            else "the smallest within half a point of what all that is left hits"
        )
        yield f"row cache {_size(p.disk.row_cache)} ({share:.1%} of the tables): {why}"
    for e in p.expected:
        yield f"  by the trace, {e.table} hits {e.recommended:.1%} of reads from disk ({e.at_most:.1%} with all that is left)"
    if any(e.short for e in p.expected):
        yield "  the trace is short (many of its reads are first reads): a larger cache may be of use"
    yield ""
    yield p.command


def _plain(p: Plan, storage: Storage | None) -> dict[str, Any]:
    plain = asdict(p)
    plain["tables"] = [asdict(t) | {"nbytes": t.nbytes} for t in p.tables]
    plain["tables_lie_in"] = str(p.tables_lie_in)
    plain["storage"] = None if storage is None else asdict(storage)
    return plain


def _types(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {_size(count)}" for name, count in sorted(sizes.items()))


def _sum(sizes: dict[str, int]) -> str:
    return _size(sum(sizes.values()))


def _size(count: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
