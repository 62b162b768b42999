"""`memlane cache-sim`: what caches of other sizes and policies would have done with the rows that were recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlane.config import parse_bytes
from memlane.errors import ConfigError, MemlaneError
from memlane.tables.simulate import (
    TOP_SHARES,
    Point,
    Recommendation,
    Simulation,
    Summary,
    policies,
    recommend,
    simulate,
    summarise,
)
from memlane.tables.trace import Trace, TracedTable, TraceFormatError, read_trace

SIZES = "1%,2%,5%,10%,15%,20%,25%,50%,75%"
_DEFAULT_BUDGET = 0.25  # of the table, where the trace was recorded without a cache
_REACHED = (0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Report:
    """All that is said about one table. budget: slots that the recommendation is for."""

    table: TracedTable
    summary: Summary
    simulation: Simulation
    budget: int
    recommendation: Recommendation


def cache_sim(
    file: str,
    table: str | None,
    sizes: str,
    names: str | None,
    budget: str | None,
    warm_up: str,
    plot: str | None,
    json_file: str | None,
) -> int:
    """Prints the report and returns the exit status. Raises MemlaneError (of the file) and ConfigError (of options)."""
    chosen = _policies(names)
    share = _share(warm_up)
    draw = _drawing() if plot is not None else None
    try:
        trace = read_trace(file)
        numbers = _tables(trace, table)
        summaries = summarise(trace)
        print(f"{file}: rows that {trace.model or 'a model'} was asked for")
        if trace.torn is not None:
            print(f"  it ends early: {trace.torn}")
        reports = []
        for number in numbers:
            report = _report(trace, number, summaries[number], sizes, chosen, budget, share)
            reports.append(report)
            print("\n" + "\n".join(_lines(report, share)))
    except TraceFormatError as error:
        raise MemlaneError(str(error)) from error
    except OSError as error:
        raise MemlaneError(f"{file}: {error.strerror}") from error
    if json_file is not None:
        _write(
            json_file, json.dumps({"model": trace.model, "tables": [_plain(r) for r in reports]}, indent=1)
        )
    if draw is not None and plot is not None:
        try:
            draw(plot, reports)
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: a file name whose format matplotlib does not know
            raise ConfigError(f"--plot: {plot}: {error}") from error
    return 0


def _policies(names: str | None) -> list[str]:
    known = policies()
    wanted = known if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--policies: no policy {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(wanted))


def _share(warm_up: str) -> float:
    share = parse_bytes(warm_up, whole=1_000_000, option="--warm-up") / 1_000_000
    if not warm_up.strip().endswith("%") or share >= 1:
        raise ConfigError(f"--warm-up: {warm_up!r} is not a part of the record below 100%; write 20%")
    return share


def _drawing() -> Any:
    try:
        from memlane_server.cache_plot import draw
    except ImportError as error:
        raise ConfigError("--plot: needs matplotlib; install it with: pip install 'memlane[plot]'") from error
    return draw


def _tables(trace: Trace, name: str | None) -> list[int]:
    names = [table.name for table in trace.tables]
    if name is None:
        return list(range(len(names)))
    if name not in names:
        raise ConfigError(f"--table: no table {name!r} was recorded; there are {', '.join(names)}")
    return [names.index(name)]


def _report(
    trace: Trace,
    number: int,
    summary: Summary,
    sizes: str,
    names: Sequence[str],
    budget: str | None,
    warm_up: float,
) -> Report:
    table = trace.tables[number]
    wanted = _budget(trace, table, budget)
    slots = {
        _slots(table, parse_bytes(size, whole=table.nbytes, option="--sizes")) for size in sizes.split(",")
    }
    slots |= {wanted // 2, wanted, min(2 * wanted, table.rows)}
    simulation = simulate(trace, number, summary, sorted(slots), names, warm_up)
    return Report(table, summary, simulation, wanted, recommend(simulation, wanted))


def _budget(trace: Trace, table: TracedTable, budget: str | None) -> int:
    """Slots of this table: tables share what --row-cache gives in equal parts."""
    if budget is not None:
        whole = sum(each.nbytes for each in trace.tables)
        return _slots(table, parse_bytes(budget, whole=whole, option="--budget") // len(trace.tables))
    if table.cache_bytes is not None:
        return _slots(table, table.cache_bytes)
    return _slots(table, int(table.nbytes * _DEFAULT_BUDGET))


def _slots(table: TracedTable, size: int) -> int:
    return min(table.rows, size // table.row_bytes)


def _lines(report: Report, warm_up: float) -> list[str]:
    table, summary, simulation = report.table, report.summary, report.simulation
    served = "in RAM" if table.cache_bytes is None else f"with a cache of {size(table.cache_bytes)}"
    lines = [
        f"table {table.name}: {table.rows:,} rows of {table.row_bytes:,} bytes, {size(table.nbytes)}, served {served}",
        f"  {summary.lookups:,} lookups of {summary.ids:,} ids, {summary.different_rows:,} different rows "
        f"({summary.different_rows / max(1, table.rows):.1%} of the table)",
    ]
    if not simulation.curve.ids:
        return [*lines, "  nothing to replay"]
    top = ", ".join(f"{share:.0%} of rows {summary.top[share]:.1%}" for share in TOP_SHARES)
    lines.append(f"  share of reads that go to the most read rows: {top}")
    names = list(dict.fromkeys(point.policy for point in simulation.points))
    wide = max(8, *(len(name) + 2 for name in names))
    lines += [
        "",
        f"  hit rates ({warm_up:.0%} of the ids warm the caches and are not counted)",
        f"  {'size':>11} {'of table':>8} "
        + "".join(f"{name:>{wide}}" for name in names)
        + f"{'LRU curve':>11}",
    ]
    for slots in sorted({point.slots for point in simulation.points}):
        here = simulation.at(slots)
        lines.append(
            f"  {size(slots * table.row_bytes):>11} {_part(table, slots):>8} "
            + "".join(f"{here[name].hit_rate:>{wide}.1%}" for name in names)
            + f"{simulation.curve.hit_rate(slots):>11.1%}"
            + ("  <- budget" if slots == report.budget else "")
        )
    lines += ["", "  " + _reached(report), "  " + advice(report)]
    if simulation.curve.is_short:
        lines.append(
            f"  The record is short: {simulation.curve.first_reads:.1%} of what counts are first reads of a row, which "
            "only hot rows (hot_rows.npy) could have warmed. Over a longer time more hits, and a larger cache is of use."
        )
    if report.budget < summary.largest_batch:
        lines.append(
            f"  The largest batch has {summary.largest_batch:,} different rows, more than the budget's {report.budget:,}: "
            "they do not fit at once, and the LRU curve says less than it hits."
        )
    return lines


def _reached(report: Report) -> str:
    """The LRU curve from its other side: the size that a hit rate takes."""
    curve, table = report.simulation.curve, report.table
    parts = []
    for rate in _REACHED:
        slots = curve.slots_for(rate)
        if slots is None:
            parts.append(
                f"{rate:.0%} with none ({1 - curve.first_reads:.1%} at most: the rest are first reads)"
            )
            break
        parts.append(f"{rate:.0%} with {size(slots * table.row_bytes)} ({_part(table, slots)})")
    return "LRU hits, of all reads, " + ", ".join(parts) + "."


def advice(report: Report) -> str:
    """The recommendation as a sentence, and a second one where a smaller cache is as good."""
    table, r = report.table, report.recommendation
    text = (
        f"Recommended for {size(report.budget * table.row_bytes)}: {r.best.policy}, which hits {r.best.hit_rate:.1%} "
        f"of reads; half the size would hit {r.half.hit_rate:.1%}, "
    )
    whole = r.double.slots < 2 * report.budget
    text += f"{'the whole table' if whole else 'twice'} {r.double.hit_rate:.1%}."
    if r.smaller is not None:
        text += (
            f" {size(r.smaller.slots * table.row_bytes)} ({_part(table, r.smaller.slots)}) are as good: "
            f"{r.smaller.hit_rate:.1%}."
        )
    return text


def _part(table: TracedTable, slots: int) -> str:
    return f"{slots / max(1, table.rows):.1%}"


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _plain(report: Report) -> dict[str, Any]:
    """A report as JSON. The curve is given at 200 sizes, evenly spread in their logarithm."""
    table, s, r = report.table, report.summary, report.recommendation
    curve = report.simulation.curve
    steps = sorted({round(table.rows ** (i / 199)) for i in range(200)}) if table.rows else []

    def point(p: Point) -> dict[str, Any]:
        return {
            "policy": p.policy,
            "slots": p.slots,
            "bytes": p.slots * table.row_bytes,
            "hit_rate": p.hit_rate,
        }

    return {
        "name": table.name,
        "rows": table.rows,
        "row_bytes": table.row_bytes,
        "lookups": s.lookups,
        "ids": s.ids,
        "different_rows": s.different_rows,
        "largest_batch": s.largest_batch,
        "top": {str(share): reads for share, reads in s.top.items()},
        "counted_ids": curve.ids,
        "points": [point(p) for p in report.simulation.points],
        "lru_curve": [{"slots": slots, "hit_rate": curve.hit_rate(slots)} for slots in steps],
        "recommendation": {
            "budget_bytes": report.budget * table.row_bytes,
            "best": point(r.best),
            "half": point(r.half),
            "double": point(r.double),
            "smaller": None if r.smaller is None else point(r.smaller),
        },
    }


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MemlaneError(f"{path}: {error.strerror}") from error
