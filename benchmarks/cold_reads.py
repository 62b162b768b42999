"""Reading rows that are in no cache of this machine's, beside fio and beside the ways people try first.

    python benchmarks/cold_reads.py [--quick] [--dir DIR] [--file-gib 16] [--out FILE]

A file of 2 KiB rows is written, its pages are given back, and every row is read at most once. All ways take turns, so that
a noisy disk hits all of them; ratios are medians over turns. The ceiling is fio: random reads of 4 KiB (what a 2 KiB row
costs), O_DIRECT, io_uring, at the depth of the batch. "Cold" means cold to this machine: under a virtual disk the host
may still cache, which is why every figure stands beside fio's of the same turn.

The second part asks for ever denser batches and compares reading every row on its own, one pass over the whole file, and
what our reader chooses by itself from the calibration of the device.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import finish, fio, header, rotated

from memlane.native import Arena, RowReader, SlotStates, crc32c_blocks
from memlane.tables.device import measure

ROW = 2048
PAGE = 4096
POOL = 32  # threads of the pread pool


def write_file(path: Path, size: int) -> np.ndarray:
    """Random bytes, a block of them again and again; returns the CRC32C of every page. Its pages are given back."""
    block = np.random.default_rng(0).integers(0, 256, 64 << 20, dtype=np.uint8)
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block.data)
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return np.tile(crc32c_blocks(block, PAGE), size // len(block))


class Rows:
    """Row ids in an order drawn once, each handed out once."""

    def __init__(self, rows: int) -> None:
        self._order = np.random.default_rng(1).permutation(rows)
        self._used = 0

    def take(self, count: int) -> np.ndarray:
        if self._used + count > len(self._order):
            raise RuntimeError("the file is too small for so many turns")
        self._used += count
        return np.sort(self._order[self._used - count : self._used])


class Ways:
    """Ways to read a batch of rows; each returns when all bytes are in memory."""

    def __init__(self, path: Path, rows: int, checksums: np.ndarray) -> None:
        self.arena, self.states = Arena(4096 * ROW), SlotStates(4096)
        self.path = path
        options: dict[str, Any] = {"merge_gap": 0}
        name = os.fspath(path)
        self.ours = RowReader(name, 0, ROW, rows, **options)
        self.checked = RowReader(name, 0, ROW, rows, checksums, **options)
        self.loose = RowReader(name, 0, ROW, rows, fixed_buffers=False, **options)
        self.buffered = RowReader(name, 0, ROW, rows, allow_direct=False, **options)
        self.threads = RowReader(name, 0, ROW, rows, allow_uring=False, **options)
        self.plain = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self.plain, 0, 0, os.POSIX_FADV_RANDOM)
        self.pool = ThreadPoolExecutor(POOL)
        self.as_written = np.memmap(path, np.uint8, "r", shape=(rows, ROW))
        self.random_map = mmap.mmap(self.plain, rows * ROW, prot=mmap.PROT_READ)
        self.random_map.madvise(mmap.MADV_RANDOM)
        self.random = np.frombuffer(self.random_map, np.uint8).reshape(rows, ROW)

    def read(self, reader: RowReader, rows: np.ndarray) -> None:
        slots = np.arange(len(rows), dtype=np.int32)
        failed, _ = reader.finish(reader.start(rows, slots, self.arena, self.states))
        assert not len(failed)

    def by_pool(self, rows: np.ndarray) -> None:
        def some(part: np.ndarray) -> None:
            for row in part.tolist():
                os.pread(self.plain, ROW, row * ROW)

        list(self.pool.map(some, np.array_split(rows, POOL)))

    def all(self) -> dict[str, tuple[Callable[[np.ndarray], Any], float]]:
        """Name -> (way, share of the batch it is given: the slow ones get less)."""
        return {
            f"memlane {self.ours.backend}": (lambda rows: self.read(self.ours, rows), 1),
            "memlane, pages checked": (lambda rows: self.read(self.checked, rows), 1),
            "memlane, buffers not registered": (lambda rows: self.read(self.loose, rows), 1),
            f"memlane {self.buffered.backend}": (lambda rows: self.read(self.buffered, rows), 1),
            f"memlane {self.threads.backend}": (lambda rows: self.read(self.threads, rows), 1),
            f"pread, {POOL} threads": (self.by_pool, 0.5),
            "memory map, MADV_RANDOM": (lambda rows: self.random[rows], 0.125),
            "memory map, as numpy opens it": (lambda rows: self.as_written[rows], 1 / 256),
        }


def scattered(path: Path, ways: Ways, fresh: Rows, count: int, turns: int, bursts: int) -> dict[str, Any]:
    """Batches of `count` rows by every way, beside fio at the same depth."""
    share: dict[str, list[float]] = {}
    speed: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    ceilings = []
    depth = min(count, 256)
    for turn in range(turns):
        first = fio(path, depth=depth, seconds=1)
        found: dict[str, float] = {}
        every = ways.all()
        for name in rotated(list(every), turn):
            way, part = every[name]
            size = max(4, int(count * part))
            repeat = max(1, int(bursts * part))
            batches = [fresh.take(size) for _ in range(repeat)]
            used = resource.getrusage(resource.RUSAGE_SELF)
            started = time.perf_counter()
            for rows in batches:
                way(rows)
            seconds = time.perf_counter() - started
            now = resource.getrusage(resource.RUSAGE_SELF)
            found[name] = size * repeat / seconds
            spent = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            cpu.setdefault(name, []).append(1e6 * spent / (size * repeat))
        last = fio(path, depth=depth, seconds=1)
        ceiling = (first.reads_per_s + last.reads_per_s) / 2 if first and last else None
        ceilings.append(ceiling or 0.0)
        for name, rate in found.items():
            speed.setdefault(name, []).append(rate)
            share.setdefault(name, []).append(rate / ceiling if ceiling else 0.0)
    result: dict[str, Any] = {
        "rows": count,
        "depth": depth,
        "turns": turns,
        "fio_reads_per_s": round(statistics.median(ceilings)),
    }
    print(f"\n{count} scattered rows of 2 KiB; fio at depth {depth}: {result['fio_reads_per_s']} reads/s")
    for name in speed:
        result[name] = {
            "rows_per_s": round(statistics.median(speed[name])),
            "of_fio": round(statistics.median(share[name]), 3),
            "cpu_us_per_row": round(statistics.median(cpu[name]), 1),
        }
        r = result[name]
        print(
            f"  {name:32s} {r['rows_per_s']:8d} rows/s  {r['of_fio']:6.3f} of fio  {r['cpu_us_per_row']:6.1f} us CPU/row"
        )
    return result


def dense(path: Path, rows: int, turns: int) -> list[dict[str, Any]]:
    """A stretch of the file, ever more of its rows wanted: every row apart, all of it, and what the reader chooses."""
    gap = measure(path).merge_gap
    stretch = min(rows, (1 << 30) // ROW) // 2
    arena, states = Arena(stretch * ROW), SlotStates(stretch)
    readers = {
        "apart": RowReader(os.fspath(path), 0, ROW, rows, merge_gap=0),
        "whole": RowReader(os.fspath(path), 0, ROW, rows, merge_gap=1 << 30),
        "chosen": RowReader(os.fspath(path), 0, ROW, rows, merge_gap=gap),
    }
    found = []
    print(
        f"\na stretch of {stretch} rows, some of them wanted; gaps up to {gap // 1024} KiB are read through"
    )
    rng = np.random.default_rng(2)
    for part in (0.002, 0.01, 0.03, 0.1, 0.3):
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(turns):
            begin = int(rng.integers(0, rows - stretch))
            wanted = begin + np.sort(rng.choice(stretch, int(stretch * part), replace=False))
            slots = np.arange(len(wanted), dtype=np.int32)
            for name in rotated(list(readers), turn):
                started = time.perf_counter()
                readers[name].finish(readers[name].start(wanted, slots, arena, states))
                seconds[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        best = min(median["apart"], median["whole"])
        found.append(
            {
                "wanted": part,
                "merge_gap": gap,
                **{f"{name}_rows_per_s": round(stretch * part / value) for name, value in median.items()},
                "chosen_of_the_better": round(best / median["chosen"], 2),
            }
        )
        f = found[-1]
        print(
            f"  {part:6.1%} wanted   apart {f['apart_rows_per_s']:8d}   whole {f['whole_rows_per_s']:8d}"
            f"   chosen {f['chosen_rows_per_s']:8d} rows/s = {f['chosen_of_the_better']:.2f} of the better"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small file and few turns: a smoke test")
    parser.add_argument("--file-gib", type=int, default=16)
    parser.add_argument("--dir", type=Path, help="where to put the file (default: a temporary directory)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = (1 if options.quick else options.file_gib) << 30
    turns = 2 if options.quick else 9
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        path = Path(directory) / "rows"
        started = time.perf_counter()
        checksums = write_file(path, size)
        print(
            f"wrote {size >> 30} GiB at {size / 1e9 / (time.perf_counter() - started):.2f} GB/s", flush=True
        )
        ways, fresh = Ways(path, size // ROW, checksums), Rows(size // ROW)
        result = {
            **header("cold_reads"),
            "file_gib": size >> 30,
            "targets_of_fio": {"2048": 0.85, "128": 0.6},
            "scattered": [
                scattered(path, ways, fresh, 2048, turns, bursts=8),
                scattered(path, ways, fresh, 128, turns, bursts=48),
            ],
            "device": measure(path)._asdict(),
            "dense": dense(path, size // ROW, turns),
        }
    finish(result, options.out)


if __name__ == "__main__":
    main()
