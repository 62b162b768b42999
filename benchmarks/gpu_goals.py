"""The figures that the GPU path is to reach, and those it did. Goals are stated for an NVIDIA H200."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Goal", "goals", "table"]

_RATE = 3.5e12  # bytes of rows a second
_COPY = 4.3e12  # what a copy within an H200 moves, read and written


class Goal(NamedTuple):
    """got: None where it was not measured; beside: what it was made of."""

    what: str
    least: bool  # whether the goal is a least value, or a greatest
    goal: float
    got: float | None
    beside: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.got is None else (self.got >= self.goal) == self.least or self.got == self.goal


def goals(kernels: Mapping[str, Any], decode: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """kernels: what gpu_kernels.py wrote, {} if nothing. decode: the entries of gpu_decode.py."""
    return [*_of_kernels(kernels), *_of_decode(decode)]


def table(found: Sequence[Goal]) -> list[str]:
    """Lines, the first of them headings."""
    width = max(len(goal.what) for goal in found)
    lines = [f"{'goal':{width}}  {'':2} {'wanted':>6} {'got':>7} {'met':>4}  beside"]
    for goal in found:
        got = "-" if goal.got is None else f"{goal.got:.3g}"
        met = {None: "?", True: "yes", False: "NO"}[goal.met]
        sign = ">=" if goal.least else "<="
        lines.append(
            f"{goal.what:{width}}  {sign} {goal.goal:>6.3g} {got:>7} {met:>4}  {goal.beside}".rstrip()
        )
    return lines


def _of_kernels(found: Mapping[str, Any]) -> Iterator[Goal]:
    gather = _find(found.get("gather_and_sum", ()), row_format="bfloat16", most="tokens")
    rate = share = None
    beside = of_copy = ""
    if gather:
        rate, share = gather["bytes_per_s"] / 1e12, gather["of_device_copy"]
        beside = f"{gather['tokens']} tokens, {_bytes(gather['row_bytes_read'])}; embedding_bag "
        beside += f"{gather['row_bytes_read'] / gather['embedding_bag_seconds'] / 1e12:.2f}"
        of_copy = f"copy {found['ceilings']['device_bytes_per_s'] / 1e12:.2f} TB/s, read and written"
    yield Goal("gather and sum, bf16: TB/s", True, _RATE / 1e12, rate, beside)
    yield Goal("  of this card's copy", True, round(_RATE / _COPY, 2), share, of_copy)
    chosen = _find(found.get("selection", ()), most="tokens")
    times = None
    if chosen and "ours_seconds" in chosen:
        times = chosen["plain_seconds"] / chosen["ours_seconds"]
        beside = f"{chosen['tokens']} tokens x {chosen['heads']} heads x {chosen['keys']} keys, top {chosen['k']}: "
        beside += f"{1e6 * chosen['ours_seconds']:.0f} us"
    yield Goal("selection: times torch.topk", True, 10, times, beside if times else "")
    for row_format in ("bfloat16", "int4"):
        missed = _find(found.get("host_misses", ()), row_format=row_format)
        beside = f"{missed['bytes'] / missed['seconds'] / 1e9:.1f} GB/s" if missed else ""
        got = missed["of_copy"] if missed else None
        yield Goal(f"misses from the host, {row_format}: of pinned copy", True, 0.8, got, beside)


def _of_decode(found: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    for row_format in ("bfloat16", "int4"):
        single = {
            p: _find(found, row_format=row_format, batch=1, placement=p) for p in ("device", "host", "disk")
        }
        bound = single["device"]["of_bandwidth_bound"] if single["device"] else None
        yield Goal(f"decode 1, {row_format}: of bandwidth bound", True, 0.6, bound, _step(single["device"]))
        for placement, least in (("host", 0.97), ("disk", 0.85)):
            one = single[placement]
            got = one["of_device"] if one else None
            yield Goal(f"decode 1, {row_format}, {placement}: of device", True, least, got, _step(one))
        on_device = _find(found, row_format=row_format, batch=64, placement="device")
        for placement in ("host", "disk"):
            one = _find(found, row_format=row_format, batch=64, placement=placement)
            got = one["over_limit"] if one else None
            beside = (
                f"{_step(one)}; device {1e3 * on_device['step_seconds']:.3f}" if one and on_device else ""
            )
            yield Goal(f"decode 64, {row_format}, {placement}: of device or link", False, 1.15, got, beside)


def _step(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    text = f"{1e3 * one['step_seconds']:.3f} ms, bound {1e3 * one['bandwidth_bound_seconds']:.3f}"
    if one["hit_rate"] is None:
        return text
    missing, link = one["missing_bytes_per_step"] / 1e6, 1e3 * one["link_bound_seconds"]
    return f"{text}, link {link:.3f}; {100 * one['hit_rate']:.0f} % hits, {missing:.2f} MB missing"


def _find(entries: Sequence[Mapping[str, Any]], most: str = "", **wanted: Any) -> Mapping[str, Any] | None:
    """The entry with these values; of several the one with the most of `most`."""
    fitting = [entry for entry in entries if all(entry.get(name) == value for name, value in wanted.items())]
    return max(fitting, key=lambda entry: entry[most] if most else 0, default=None)


def _bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB"
