"""A table of 64 M rows of 512 bytes on disk (32 GB), served with a cache of 1 GB, beside the same model with 1 M rows.

    python benchmarks/scale.py [--quick] [--out benchmarks/results/DATE-scale.json] [--dir WHERE]

What must hold: the process stays under dense weights + cache + 300 MB for its whole life; opening takes under 1 s; tokens
a second are within 5 % of a 1 M-row table's at the same hit rate. Three models are served, each by a process that does
nothing else, whose memory is watched from outside every 50 ms:

    large    8,192 product keys a half, 64 M rows, 1 GB of cache
    small    1,024 product keys a half, 1 M rows
    spread   small's weights and choices, its row i read as row i * FACTOR mod 64 M of large's table, which holds the same
             numbers: the table alone differs, and both give the same answers

The same hit rate: prompts are drawn from a pool, all of which was asked before, but for a few that are new. A rehearsal of
a few rounds measures large's hit rate and records small's row ids; small's cache then gets as many slots as reach that
rate on the LRU curve of its record, corrected until its own rehearsal hits within half a point of it. spread has the same slots and is asked for the same rows. Rates are
measured again in the timed rounds, which all three take in turns with the same prompts.

Scoring 8,192 keys costs eight times the products of 1,024, which is not the table's doing: large is compared whole and
outside key search, spread whole.

The files were just written, so a host below a virtual machine may hold them, the smaller one more likely: fio reads each at
random before and after the rounds. In use, rows are read past the page cache; `open` times begin with nothing of the file
in it.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

import numpy as np
from measuring import (
    MemoryWatch,
    Result,
    finish,
    fio,
    foreign_load,
    header,
    leave_page_cache,
    memory_of,
    rotated,
)
from random_model import BLOCK_BYTES, random_prompt, write_random_model
from torch import Tensor

import memlane.models.memory
from memlane import LLM, EngineConfig, SamplingParams
from memlane.engine import Engine
from memlane.models import MemoryConfig, ModelConfig, Transformer
from memlane.models.loading import LoadedModel, TableOptions, load_model
from memlane.native import StackDistances
from memlane.tables import Lookup, TableLayout, ValueTable
from memlane.tables.cache import Ids
from memlane.tables.simulate import LruCurve

ALLOWANCE = 300_000_000  # bytes beyond dense weights and cache
# Odd, so that no two rows fall together modulo a power of two; one more than a multiple of the rows in a block, so that
# a row finds its own numbers again far away.
FACTOR = 1 + 1237 * (BLOCK_BYTES // 512)
SAME_RATE = 0.005  # hit rates this near count as the same
SETTLING = 2  # rehearsed rounds that do not count
VOCAB = 8192
SERVING = {"max_num_seqs": 8, "kv_cache": "32MiB", "warm_start": "off", "prefix_caching": False}
COUNTED = ("requested_rows", "hits", "unique_misses", "bytes_read", "reads", "stall_seconds")


@dataclass(frozen=True)
class Size:
    """How much is done. pool: prompts that come again; a round asks `repeated` of them and `new` others."""

    large_keys: int = 8192
    small_keys: int = 1024
    cache_bytes: int = 1_000_000_000
    prompt: int = 64
    answer: int = 64
    pool: int = 24
    repeated: int = 14
    new: int = 2
    rehearsals: int = 6
    rounds: int = 7


QUICK = Size(1024, 512, 64_000_000, prompt=16, answer=16, pool=6, repeated=7, new=1, rehearsals=6, rounds=7)


def model(num_keys: int) -> ModelConfig:
    memory = MemoryConfig(
        layers=(1, 4), num_keys=num_keys, num_heads=4, knn=32, key_dim=256, value_dim=256, row_format="bfloat16"
    )  # fmt: skip
    return ModelConfig(
        vocab_size=VOCAB, hidden_size=512, num_layers=6, num_heads=8, intermediate_size=1024,
        max_position_embeddings=128, memory=memory,
    )  # fmt: skip


class Prompts:
    """The prompts of each round: the same for whoever asks."""

    def __init__(self, size: Size) -> None:
        self._size = size
        rng = np.random.default_rng(0)
        self._pool = [random_prompt(rng, size.prompt, VOCAB) for _ in range(size.pool)]

    def first(self) -> list[list[int]]:
        return self._pool

    def round(self, number: int) -> list[list[int]]:
        rng = np.random.default_rng([7, number])
        prompts = [self._pool[i] for i in rng.integers(0, len(self._pool), self._size.repeated)]
        prompts += [random_prompt(rng, self._size.prompt, VOCAB) for _ in range(self._size.new)]
        return [prompts[i] for i in rng.permutation(len(prompts))]


class SpreadTable:
    """A small table whose rows lie far apart in a large one: row i is the large one's row i * FACTOR mod its rows."""

    def __init__(self, large: ValueTable, rows: int) -> None:
        self._large, self.rows = large, rows
        self.name, self.width = large.name, large.width

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        return self._large.begin(ids * FACTOR % self._large.rows)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self._large.weighted_sum(ids * FACTOR % self._large.rows, weights)

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        return self._large.dot(ids * FACTOR % self._large.rows, x)

    def gather(self, ids: Tensor) -> Tensor:
        return self._large.gather(ids * FACTOR % self._large.rows)


def serve(
    pipe: Connection, directory: Path, cache_bytes: int, size: Size, spread_over: TableLayout | None
) -> None:
    """A process of its own: loads a model and answers rounds until it is told None. What it says is in the pipe."""
    imported = memory_of()["VmRSS"]
    started = time.perf_counter()
    if spread_over is None:
        llm = LLM(directory, placement="disk", row_cache=str(cache_bytes), **SERVING)
    else:
        llm = _spread_model(directory, spread_over, cache_bytes)
    table = llm.engine.model.tables["values"]
    dense = sum(w.nbytes for w in llm.engine.model.transformer.parameters())
    assert table.cache is not None
    pipe.send(
        {
            "load_s": round(time.perf_counter() - started, 3),
            "imported_rss": imported,
            "dense_bytes": dense,
            "cache_slots": table.cache.slots,
            "index": table.cache.index.map,
            "index_bytes": table.cache.index.nbytes,
            "backend": table.stats().backend,
        }
    )
    searching = _time_key_search()
    prompts = Prompts(size)
    params = SamplingParams(temperature=0, max_tokens=size.answer, ignore_eos=True)
    curve: StackDistances | None = None
    while (order := pipe.recv()) is not None:
        kind, number = order
        if kind == "record":
            curve = StackDistances(table.rows)
        if curve is not None:
            table.recorder = functools.partial(_add, curve, kind == "round" and number >= SETTLING)
        asked = prompts.round(number) if kind == "round" else prompts.first()
        before, searched = llm.stats().tables[0].counters, searching()
        started = time.perf_counter()
        answers = llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        after = llm.stats().tables[0].counters
        said = [a.outputs[0].token_ids for a in answers]
        assert all(len(tokens) == size.answer for tokens in said)
        answer: Result = {name: after[name] - before[name] for name in COUNTED}
        answer |= {
            "seconds": seconds,
            "search_s": searching() - searched,
            "said": zlib.crc32(str(said).encode()),
        }
        answer["tokens"] = sum(len(prompt) + size.answer for prompt in asked)
        pipe.send(answer)
    pipe.send(None if curve is None else (curve.histogram(), curve.counted))
    llm.close()


def _add(curve: StackDistances, counted: bool, ids: Ids) -> None:
    curve.add(ids.astype(np.uint32), counted)


def _time_key_search() -> Callable[[], float]:
    """From now on key search is timed: the seconds spent in it so far."""
    search, spent = memlane.models.memory.search, 0.0

    def timed(*args: Any) -> Any:
        nonlocal spent
        started = time.perf_counter()
        found = search(*args)
        spent += time.perf_counter() - started
        return found

    memlane.models.memory.search = timed
    return lambda: spent


def _spread_model(directory: Path, layout: TableLayout, cache_bytes: int) -> LLM:
    """The small model over the large table."""
    small = load_model(directory, tables=TableOptions("disk"))
    memory = small.config.memory
    assert memory is not None
    table = ValueTable.open(layout, "disk", cache_bytes)
    transformer = Transformer(small.config, {"values": SpreadTable(table, memory.rows)})
    transformer.load_state_dict(small.transformer.state_dict(), assign=True)
    small.close()
    loaded = LoadedModel(small.config, transformer.requires_grad_(False).eval(), {"values": table}, directory)
    llm = LLM.__new__(LLM)  # an LLM around an engine that is there already
    llm.engine = Engine(EngineConfig(model=str(directory), **SERVING), loaded)  # type: ignore[arg-type]
    llm.tokenizer, llm._requests = None, 0
    return llm


def time_opening(pipe: Connection, directory: Path, layout: TableLayout, cache_bytes: int) -> None:
    """A process of its own: seconds of opening the table, and of LLM(), twice: the first measures the device, too."""
    leave_page_cache(layout.path)
    started = time.perf_counter()
    table = ValueTable.open(layout, "disk", cache_bytes)
    opening = time.perf_counter() - started
    table.close()
    loading = []
    for _ in range(2):
        leave_page_cache(layout.path)
        started = time.perf_counter()
        with LLM(directory, placement="disk", row_cache=str(cache_bytes), **SERVING):
            loading.append(time.perf_counter() - started)
    pipe.send(
        {
            "table_s": round(opening, 3),
            "llm_first_s": round(loading[0], 3),
            "llm_later_s": round(loading[1], 3),
        }
    )


class Child:
    """A process that serves one model, and the watch over its memory."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.watch = MemoryWatch(self.process.pid)
        self.started = self.pipe.recv()  # EOFError if it died

    def ask(self, kind: str, number: int = 0) -> Result:
        self.pipe.send((kind, number))
        answer: Result = self.pipe.recv()
        return answer

    def end(self) -> Any:
        """What it says last. Fills in `memory`."""
        assert self.process.pid is not None
        self.memory = {**memory_of(self.process.pid), "largest_sample": max(self.watch.samples)}
        self.pipe.send(None)
        last = self.pipe.recv()
        self.watch.stop()
        self.process.join()
        return last


def hit_rate(rounds: list[Result]) -> float:
    return sum(r["hits"] for r in rounds) / sum(r["requested_rows"] for r in rounds)


def rehearse(child: Child, size: Size) -> float:
    """The pool, then some rounds: the hit rate of these, but for the first, in which the pool fills the cache."""
    child.ask("first")
    return hit_rate([child.ask("round", number) for number in range(size.rehearsals)][SETTLING:])


def proposed_slots(directory: Path, wanted: float, size: Size, rows: int, stride: int) -> int:
    """Slots with which the small model's cache hits at the wanted rate in the rehearsed rounds, by its LRU curve."""
    child = Child(serve, directory, rows * stride, size, None)
    child.ask("record")
    for number in range(size.rehearsals):
        child.ask("round", number)
    histogram, counted = child.end()
    found = LruCurve(np.cumsum(histogram), counted).slots_for(wanted)
    return rows if found is None else found


def open_small(directory: Path, wanted: float, size: Size, layout: TableLayout) -> Child:
    """The small model with a cache that hits at the wanted rate, rehearsed. What the curve proposes is tried, and
    corrected by bisection: the curve knows nothing of rows that a large batch locks."""
    too_few, too_many = 0, layout.rows
    slots = proposed_slots(directory, wanted, size, layout.rows, layout.stride)
    while True:
        child = Child(serve, directory, slots * layout.stride, size, None)
        rate = rehearse(child, size)
        print(f"small hits {rate:.2%} with {slots} slots; wanted are {wanted:.2%}", flush=True)
        if abs(rate - wanted) < SAME_RATE or too_many - too_few < layout.rows // 64:
            return child
        child.end()
        if rate < wanted:
            too_few = slots
        else:
            too_many = slots
        # Near the curve's proposal at first: a correction by half is much, the whole table far too much.
        slots = (
            min(2 * slots, (too_few + too_many) // 2)
            if too_many == layout.rows
            else (too_few + too_many) // 2
        )


def summary(child: Child, rounds: list[Result], cache_bytes: int) -> Result:
    """What one model did in the timed rounds, and what memory it took in its whole life."""
    m = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    rates = [r["tokens"] / r["seconds"] for r in rounds]
    limit = child.started["dense_bytes"] + cache_bytes + ALLOWANCE
    most = max(child.memory["VmHWM"], child.memory["largest_sample"])
    return {
        **child.started,
        "cache_bytes": cache_bytes,
        "tokens_per_s": round(statistics.median(rates), 1),
        "outside_search_tokens_per_s": round(
            statistics.median(r["tokens"] / (r["seconds"] - r["search_s"]) for r in rounds), 1
        ),
        "search_share": round(m["search_s"] / m["seconds"], 3),
        "stall_share": round(m["stall_seconds"] / m["seconds"], 3),
        "hit_rate": round(hit_rate(rounds), 4),
        "rows_read_a_token": round(m["unique_misses"] / m["tokens"], 1),
        "reads_a_token": round(m["reads"] / m["tokens"], 1),
        "bytes_a_read": round(m["bytes_read"] / max(1, m["reads"])),
        **child.memory,
        "memory_limit": limit,
        "beyond_dense_and_cache": most - child.started["dense_bytes"] - cache_bytes,
        "within_limit": most <= limit,
    }


def check_answers(rounds: dict[str, list[Result]]) -> None:
    """The table in which a row lies must not change an answer."""
    for a, b in zip(rounds["small"], rounds["spread"], strict=True):
        if a["said"] != b["said"]:
            raise AssertionError("small and spread gave different answers to the same prompts")


def ratio(ours: list[Result], beside: list[Result], *, outside_search: bool = False) -> float:
    """Tokens a second of one model over another's, round by round; the median."""

    def pace(r: Result) -> float:
        return float(r["tokens"] / (r["seconds"] - (r["search_s"] if outside_search else 0)))

    return round(statistics.median(pace(a) / pace(b) for a, b in zip(ours, beside, strict=True)), 3)


def measure(root: Path, size: Size, fio_seconds: float) -> Result:
    result: Result = {}
    layouts = {}
    for name, keys in (("large", size.large_keys), ("small", size.small_keys)):
        started = time.perf_counter()
        layouts[name] = layout = write_random_model(root / name, model(keys))
        print(f"{name}: {layout.rows} rows of {layout.stride} bytes, {layout.nbytes / 1e9:.2f} GB, "
              f"written in {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    large, small = layouts["large"], layouts["small"]

    opening = Child(time_opening, root / "large", large, size.cache_bytes)
    opening.process.join()
    result["open"] = {**opening.started, "target_s": 1.0}
    print(f"open: the table {opening.started['table_s']} s; LLM() {opening.started['llm_first_s']} s, measuring the "
          f"device, and {opening.started['llm_later_s']} s later", flush=True)  # fmt: skip

    children = {"large": Child(serve, root / "large", size.cache_bytes, size, None)}
    wanted = rehearse(children["large"], size)
    children["small"] = open_small(root / "small", wanted, size, small)
    slots = children["small"].started["cache_slots"]
    cache_bytes = {"large": size.cache_bytes} | dict.fromkeys(("small", "spread"), slots * small.stride)
    children["spread"] = Child(serve, root / "small", cache_bytes["spread"], size, large)
    rehearse(children["spread"], size)

    def disks() -> Result:
        found = {name: fio(layout.path, seconds=fio_seconds) for name, layout in layouts.items()}
        return {name: speed and round(speed.reads_per_s) for name, speed in found.items()}

    result["fio_reads_per_s_before"] = disks()
    rounds: dict[str, list[Result]] = {name: [] for name in children}
    for number in range(size.rounds):
        for name in rotated(list(children), number):
            rounds[name].append(children[name].ask("round", size.rehearsals + number))
    result["fio_reads_per_s_after"] = disks()
    for child in children.values():
        child.end()
    check_answers(rounds)
    result["rehearsed_hit_rate"] = round(wanted, 4)
    result["models"] = {
        name: summary(child, rounds[name], cache_bytes[name]) for name, child in children.items()
    }
    result["ratios"] = {
        "large_to_small": ratio(rounds["large"], rounds["small"]),
        "large_to_small_outside_search": ratio(rounds["large"], rounds["small"], outside_search=True),
        "spread_to_small": ratio(rounds["spread"], rounds["small"]),
        "target": 0.95,
    }
    rates = [hit_rate(rounds[name]) for name in ("large", "small")]
    result["hit_rates_apart"] = round(abs(rates[0] - rates[1]), 4)
    return result


def show(result: Result) -> None:
    print(f"\n{'model':<8}{'tok/s':>8}{'no search':>11}{'hits':>8}{'stalls':>8}{'search':>8}{'rows/tok':>9}"
          f"{'index':>15}{'beyond dense + cache':>22}")  # fmt: skip
    for name, m in result["models"].items():
        print(
            f"{name:<8}{m['tokens_per_s']:>8}{m['outside_search_tokens_per_s']:>11}{m['hit_rate']:>8.2%}"
            f"{m['stall_share']:>8.1%}{m['search_share']:>8.1%}{m['rows_read_a_token']:>9}"
            f"{m['index']:>7} {m['index_bytes'] / 1e6:>4.0f} MB{m['beyond_dense_and_cache'] / 1e6:>14.0f} of "
            f"{ALLOWANCE / 1e6:.0f} MB{'' if m['within_limit'] else ' TOO MUCH'}"
        )
        print(
            f"{'':8}dense {m['dense_bytes'] / 1e6:.0f} MB, cache {m['cache_bytes'] / 1e6:.0f} MB, most resident "
            f"{m['VmHWM'] / 1e6:.0f} MB; {m['imported_rss'] / 1e6:.0f} MB after imports alone; at the end "
            f"{m['RssAnon'] / 1e6:.0f} MB its own, {m['RssFile'] / 1e6:.0f} MB of libraries and other files"
        )
    if result["hit_rates_apart"] > 2 * SAME_RATE:
        print(f"large and small hit at rates {result['hit_rates_apart']:.2%} apart: their ratio says little")
    print("ratios " + ", ".join(f"{name} {value}" for name, value in result["ratios"].items()))
    print(
        f"fio, 4 KiB at random: {result['fio_reads_per_s_before']} before, {result['fio_reads_per_s_after']} after"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="1 M rows beside 262,144, 64 MB of cache: a smoke test"
    )
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--dir", type=Path, help="where to put the models (default: a temporary directory)")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()

    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        needed = sum(keys**2 * 516 for keys in (size.large_keys, size.small_keys)) + (1 << 30)
        free = shutil.disk_usage(directory).free
        if free < needed:
            sys.exit(f"{directory}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")
        os.environ["MEMLANE_CACHE"] = (
            f"{directory}/cache"  # what is remembered of the disk ends with this run
        )
        result = {**header("scale"), **measure(Path(directory), size, 1 if options.quick else 5)}
    show(result)
    result["foreign_load_cpus_after"] = foreign_load()
    finish(result, options.out)


if __name__ == "__main__":
    main()
