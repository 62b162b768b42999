"""Kernels of the GPU path against the card's own ceilings and torch's ways of doing the same, in one run.

    python benchmarks/gpu_kernels.py [--json FILE] [--small] [--parts gather selection misses] [--formats bfloat16 int4]

Ceilings: a device-to-device copy (bytes read and written), a pinned host-to-device copy. Every figure states its bytes and
the floor that they set; inputs are fresh random numbers, several sets in rotation, so that no cache holds them. On a
machine without a GPU it refuses, unless --small asks for a run of the program itself, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measuring import Result, finish, header, rotated, write
from torch import Tensor

from memlane.kernels import RowMemory, device_stride
from memlane.kernels.choice import cache_kernels, row_kernels
from memlane.models.product_keys import select_reference
from memlane.tables import RowFormat, encode_rows


class Sizes(NamedTuple):
    """How much is measured."""

    rows: int
    width: int
    tokens: tuple[int, ...]
    k: int
    copy_bytes: int
    repetitions: int
    missing_rows: int


FULL = Sizes(1 << 20, 1024, (4096, 1, 16, 64, 256), 128, 1 << 30, 30, 1 << 16)
SMALL = Sizes(1 << 10, 64, (4, 1), 8, 1 << 20, 2, 64)
PARTS = ("gather", "selection", "misses")

_BLOCK = 1 << 14  # rows of which tables are made, over and over


class Clock:
    """Median seconds of bodies run in turns: by events of the device, or by the processor's clock on a CPU."""

    def __init__(self, device: torch.device, repetitions: int) -> None:
        self.device, self.repetitions = device, repetitions

    def in_turns(self, **bodies: Callable[[], object]) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in bodies}
        for repetition in range(self.repetitions + 2):
            for name in rotated(list(bodies), repetition):
                took = self._once(bodies[name])
                if repetition >= 2:
                    seconds[name].append(took)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def _once(self, body: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            body()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(
            200_000
        )  # launches queue up behind it, so that the processor's pace is not measured
        begin.record()
        body()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def ceilings(device: torch.device, sizes: Sizes, clock: Clock) -> Result:
    """Bytes a second of a copy within the device (read and written), and from pinned host memory to it."""
    n = sizes.copy_bytes
    source, there = (torch.empty(n, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(n, dtype=torch.uint8, pin_memory=device.type == "cuda")
    took = clock.in_turns(
        device=lambda: there.copy_(source), host=lambda: there.copy_(host, non_blocking=True)
    )
    found = {"device_bytes_per_s": 2 * n / took["device"], "host_to_device_bytes_per_s": n / took["host"]}
    print(
        f"ceilings: device copy {found['device_bytes_per_s'] / 1e12:.2f} TB/s (read + written), "
        f"pinned host to device {found['host_to_device_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    return found


def gather_and_sum(
    device: torch.device, sizes: Sizes, clock: Clock, ceiling: Result, formats: list[RowFormat]
) -> list[Result]:
    """weighted_sum over uniform ids, for row formats and numbers of tokens, embedding_bag beside bf16."""
    results = []
    print(
        f"{'rows':>9} {'tokens':>7} {'bytes':>10} {'us':>9} {'TB/s':>7} {'of copy':>8} {'embedding_bag':>14}"
    )
    kernels = row_kernels(device)
    for row_format in formats:
        memory = random_rows(device, sizes.rows, sizes.width, row_format)
        plain = memory.data.view(torch.bfloat16) if row_format is RowFormat.BFLOAT16 else None
        for tokens in (
            sizes.tokens if row_format in (RowFormat.BFLOAT16, RowFormat.INT4) else sizes.tokens[:1]
        ):
            sets = cycle([_ids_and_weights(device, tokens, sizes) for _ in range(4)])
            bodies: dict[str, Callable[[], object]] = {
                "ours": lambda m=memory, s=sets: kernels.weighted_sum(m, *next(s))  # type: ignore[misc]
            }
            if plain is not None:
                bodies["embedding_bag"] = lambda p=plain, s=sets: _bag(p, *next(s))  # type: ignore[misc]
            took = clock.in_turns(**bodies)
            nbytes = tokens * sizes.k * row_format.stride(sizes.width)
            rate = nbytes / took["ours"]
            bag = took.get("embedding_bag")
            share = rate / (ceiling["device_bytes_per_s"])
            results.append(
                {
                    "row_format": row_format.value,
                    "tokens": tokens,
                    "row_bytes_read": nbytes,
                    "seconds": took["ours"],
                    "bytes_per_s": rate,
                    "of_device_copy": share,
                    "embedding_bag_seconds": bag,
                }
            )
            beside = "" if bag is None else f"{nbytes / bag / 1e12:.2f} TB/s"
            print(
                f"{row_format.value:>9} {tokens:>7} {nbytes:>10} {1e6 * took['ours']:>9.1f} {rate / 1e12:>7.2f} "
                f"{share:>8.2f} {beside:>14}"
            )
    return results


def selection(device: torch.device, sizes: Sizes, clock: Clock) -> list[Result]:
    """Row ids and softmax weights out of half scores, against the two-stage torch code."""
    if sizes is SMALL:
        return [_selection(device, clock, 2, 2, 16, 4)]
    return [_selection(device, clock, tokens, 4, 1024, 32) for tokens in (256, 1, 16, 64)]


def _selection(device: torch.device, clock: Clock, tokens: int, heads: int, n: int, k: int) -> Result:
    sets = cycle([torch.randn(tokens, heads, 2, n, device=device) for _ in range(4)])
    bodies: dict[str, Callable[[], object]] = {
        "plain": lambda: _two_stage(next(sets), k),
        "exact": lambda: select_reference(next(sets).flatten(0, 1), k),
    }
    if device.type == "cuda":  # a CPU has no kernel of this kind; its own way is measured by tables.py
        from memlane.kernels import selection as kernel

        bodies["ours"] = lambda: kernel.choose(next(sets), k, None)
    took = clock.in_turns(**bodies)
    ours = took.get("ours", float("nan"))
    print(
        f"selection, {tokens} tokens x {heads} heads x 2 x {n}, top {k}: {1e6 * ours:.1f} us; two-stage "
        f"torch.topk {1e6 * took['plain']:.1f} us ({took['plain'] / ours:.1f} x), "
        f"torch with exact ties {1e6 * took['exact']:.1f} us ({took['exact'] / ours:.1f} x)"
    )
    seconds = {f"{name}_seconds": value for name, value in took.items()}
    return {"tokens": tokens, "heads": heads, "keys": n, "k": k} | seconds


def host_misses(device: torch.device, sizes: Sizes, clock: Clock, ceiling: Result) -> list[Result]:
    """Rows that the GPU fetches itself from pinned memory into slots, in random order."""
    return [_misses(device, sizes, clock, ceiling, f) for f in (RowFormat.BFLOAT16, RowFormat.INT4)]


def _misses(
    device: torch.device, sizes: Sizes, clock: Clock, ceiling: Result, row_format: RowFormat
) -> Result:
    stride, n = device_stride(row_format.stride(sizes.width)), sizes.missing_rows
    host = torch.empty(sizes.rows, stride, dtype=torch.uint8, pin_memory=device.type == "cuda")
    _repeat(torch.randint(0, 256, (min(sizes.rows, _BLOCK), stride), dtype=torch.uint8), host)
    far = RowMemory(host, row_format.value, sizes.width)
    near = far._replace(data=torch.empty(n, stride, dtype=torch.uint8, device=device))
    sets = cycle([torch.randperm(sizes.rows, device=device)[:n] for _ in range(4)])
    slots = torch.randperm(n, device=device).int()
    count = torch.tensor([n], device=device)
    copy = cache_kernels(device).copy_rows
    took = clock.in_turns(ours=lambda: copy(far, next(sets), near, slots, count))["ours"]
    rate = n * stride / took
    share = rate / ceiling["host_to_device_bytes_per_s"]
    print(
        f"misses from pinned memory, {n} {row_format.value} rows of {stride} B: {rate / 1e9:.1f} GB/s, "
        f"{share:.2f} of the copy"
    )
    return {
        "row_format": row_format.value,
        "rows": n,
        "bytes": n * stride,
        "seconds": took,
        "of_copy": share,
    }


def random_rows(device: torch.device, rows: int, width: int, row_format: RowFormat) -> RowMemory:
    """Rows of normal numbers in a format, as they lie in a GPU's memory."""
    stride = row_format.stride(width)
    data = torch.zeros(rows, device_stride(stride), dtype=torch.uint8, device=device)
    encoded = encode_rows(torch.randn(min(rows, _BLOCK), width), row_format)
    _repeat(encoded.contiguous().view(torch.uint8).view(-1, stride).to(device), data[:, :stride])
    return RowMemory(data, row_format.value, width)


def _repeat(block: Tensor, out: Tensor) -> None:
    """Other numbers would be no slower to read, but minutes in the making."""
    for begin in range(0, len(out), len(block)):
        part = out[begin : begin + len(block)]
        part.copy_(block[: len(part)])


def _ids_and_weights(device: torch.device, tokens: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, sizes.rows, (tokens, sizes.k), device=device)
    return ids, torch.rand(tokens, sizes.k, device=device)


def _bag(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(ids, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def _two_stage(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As published code does it: the best k of each half, then of all k * k sums. Ties fall as they may."""
    values, keys = scores.topk(k, dim=-1)
    sums = (values[:, :, 0, :, None] + values[:, :, 1, None, :]).flatten(2)
    best, at = sums.topk(k, dim=-1)
    ids = keys[:, :, 0].gather(2, at // k) * scores.shape[-1] + keys[:, :, 1].gather(2, at % k)
    return ids, torch.softmax(best, dim=-1)


def device_of(small: bool) -> torch.device:
    """The GPU; the CPU for a small run where there is none. Ends the program where there is nothing to measure."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not small:
        sys.exit("no CUDA device: nothing to measure (--small runs the program itself)")
    return torch.device("cpu")


def gpu_header(benchmark: str, device: torch.device) -> Result:
    """As `measuring.header`, with the card."""
    result = header(benchmark)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["machine"] |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
        result["machine"]["cuda"] = torch.version.cuda
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, on any machine: to test the program"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--formats", nargs="+", type=RowFormat, default=list(RowFormat))
    options = parser.parse_args(arguments)
    device = device_of(options.small)
    sizes = SMALL if options.small else FULL
    result = gpu_header("gpu_kernels", device)
    clock = Clock(device, sizes.repetitions)
    result["ceilings"] = found = ceilings(device, sizes, clock)
    parts: dict[str, tuple[str, Callable[[], list[Result]]]] = {
        "gather": ("gather_and_sum", lambda: gather_and_sum(device, sizes, clock, found, options.formats)),
        "selection": ("selection", lambda: selection(device, sizes, clock)),
        "misses": ("host_misses", lambda: host_misses(device, sizes, clock, found)),
    }
    for part in options.parts:
        started = time.perf_counter()
        name, body = parts[part]
        result[name] = body()
        print(f"{part} took {time.perf_counter() - started:.1f} s", flush=True)
        write(result, options.json)
    finish(result, options.json)


if __name__ == "__main__":
    main()
