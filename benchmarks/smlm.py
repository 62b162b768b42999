"""The shape of sparse-memory-lm's published B-16M (71 M dense weights, 16.8 M rows of 4 bits) with random weights, as its
author measured it: one prompt at a time, its table in RAM and on disk.

    python benchmarks/smlm.py [--quick] [--out benchmarks/results/DATE-smlm.json] [--dir WHERE]

Works: `decode` is a prompt of 128 random tokens and 256 greedy ones, 256 / seconds of both; `prefill` a prompt of 1,024
random tokens up to its first token. Greedily, random weights soon say one token over and over, whose rows are cached after
the first time; `fresh decode` penalises tokens that were said, so that none comes twice and every step wants rows of its
own: the harder work, and the one that cold figures are judged by.

States: `cold` is an empty row cache and nothing of the file in the system's page cache, with a prompt that nobody asked
before; `warm` the same cache after other prompts. The file was just written, so a host below a virtual machine may hold
it: each turn therefore begins and ends with fio on the same file, 4 KiB at random, 256 in flight, and the better of the
two is the ceiling. Reading at random what was read, or streaming the whole table once, whichever is quicker, plus the same
work with the table in RAM, is the ceiling of a figure from disk. (Streaming once flatters the disk: each of the three
memory layers would have to. Reads that hide behind computing can beat the sum.)

Sources: https://github.com/re133/sparse-memory-lm. Its own prefill also makes the logits of every position; ours of
the last alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

import numpy as np
import torch
from measuring import DiskSpeed, Result, finish, fio, foreign_load, header, leave_page_cache, rotated
from random_model import random_prompt, write_random_model

import memlane.engine
import memlane.models.layers
import memlane.models.memory
import memlane.models.transformer
from memlane import LLM, SamplingParams
from memlane.models import MemoryConfig, ModelConfig
from memlane.runner.paged import PagedAttention
from memlane.tables import TableLayout, ValueTable
from memlane.tables.lookup import TableLookup

PROMPT, ANSWER, LONG_PROMPT = 128, 256, 1024
THEIRS = {("decode", "host"): 27, ("decode", "disk"): 10, ("prefill", "host"): 217, ("prefill", "disk"): 47}
GOALS = {("decode", "host"): 2, ("decode", "disk"): 3, ("prefill", "disk"): 5}  # times theirs, on two cores
SHARES = ("10%", "30%")
COUNTED = ("requested_rows", "hits", "unique_misses", "bytes_read", "reads", "stall_seconds")


class Work(NamedTuple):
    """What is asked: a prompt of so many tokens; `tokens` are those that a figure counts."""

    name: str
    prompt: int
    tokens: int
    params: SamplingParams


def _greedy(tokens: int, penalty: float = 0.0) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        presence_penalty=penalty,
        frequency_penalty=penalty,
    )


DECODE = Work("decode", PROMPT, ANSWER, _greedy(ANSWER))
FRESH = Work("fresh decode", PROMPT, ANSWER, _greedy(ANSWER, penalty=2.0))
PREFILL = Work("prefill", LONG_PROMPT, LONG_PROMPT, _greedy(1))
WORKS = (DECODE, FRESH, PREFILL)


def b_16m(num_keys: int) -> ModelConfig:
    memory = MemoryConfig(
        layers=(2, 6, 10), num_keys=num_keys, num_heads=4, knn=32, key_dim=256, value_dim=384, row_format="int4"
    )  # fmt: skip
    return ModelConfig(
        vocab_size=50304, hidden_size=384, num_layers=12, num_heads=6, intermediate_size=1024,
        max_position_embeddings=LONG_PROMPT + 1, tie_word_embeddings=True, memory=memory,
    )  # fmt: skip


class Bench:
    """The model's directory and the prompts, of which none comes twice."""

    def __init__(self, directory: Path, layout: TableLayout) -> None:
        self.directory, self.layout = directory, layout
        self._rng = np.random.default_rng(1)

    def open(self, placement: str, share: str = "0%") -> LLM:
        """The model, its row cache empty and the table out of the page cache."""
        leave_page_cache(self.layout.path)
        return LLM(
            self.directory,
            placement=placement,
            row_cache=share,
            warm_start="off",
            max_model_len=LONG_PROMPT + 1,
            max_num_seqs=1,
            prefix_caching=False,
        )

    def run(self, llm: LLM, work: Work) -> Result:
        """Does a work once, with a prompt of its own: seconds, and what the table counted meanwhile."""
        prompt = random_prompt(self._rng, work.prompt, llm.engine.model.config.vocab_size)
        before = llm.stats().tables[0].counters
        started = time.perf_counter()
        (answer,) = llm.generate(prompt, work.params, use_tqdm=False)
        seconds = time.perf_counter() - started
        after = llm.stats().tables[0].counters
        said = answer.outputs[0].token_ids
        assert len(said) == work.params.max_tokens, answer.outputs[0]
        counted = {name: after[name] - before[name] for name in COUNTED}
        return {"seconds": seconds, "different_tokens": len(set(said)), **counted}


def one_turn(bench: Bench, host: LLM, turn: int, warming: int) -> dict[tuple[str, str, str], Result]:
    """Every work once at every placement and state: (work, cache share or "RAM", state) -> what it took."""
    taken: dict[tuple[str, str, str], Result] = {}
    for place in rotated(["RAM", *SHARES], turn):
        if place == "RAM":
            for work in WORKS:
                taken[work.name, place, "warm"] = bench.run(host, work)
            continue
        for work in WORKS:
            with bench.open("disk", place) as llm:
                taken[work.name, place, "cold"] = bench.run(llm, work)
                for _ in range(warming):
                    bench.run(llm, work)
                taken[work.name, place, "warm"] = bench.run(llm, work)
    return taken


class Ceiling(NamedTuple):
    """Seconds that the disk needs at least for what a run read: one way, and the other."""

    at_random: float
    streaming: float


def ceiling(run: Result, layout: TableLayout, random: DiskSpeed, stream: DiskSpeed) -> Ceiling:
    return Ceiling(run["unique_misses"] / random.reads_per_s, layout.nbytes / stream.bytes_per_s)


def best(speeds: Sequence[DiskSpeed | None]) -> DiskSpeed | None:
    return max((s for s in speeds if s is not None), key=lambda s: s.bytes_per_s, default=None)


def measure(bench: Bench, turns: int, warming: int, fio_seconds: float) -> tuple[list[Result], list[Result]]:
    """Medians over turns of every figure, and what fio gave in each turn."""
    runs: dict[tuple[str, str, str], list[Result]] = {}
    disk: list[Result] = []
    with bench.open("host") as host:
        for work in WORKS:
            bench.run(host, work)  # first calls prepare much; they count nowhere
        for turn in range(turns):
            path = bench.layout.path
            gates = [(fio(path, seconds=fio_seconds), _stream(path, fio_seconds))]
            taken = one_turn(bench, host, turn, warming)
            gates.append((fio(path, seconds=fio_seconds), _stream(path, fio_seconds)))
            random, stream = (best([gate[i] for gate in gates]) for i in (0, 1))
            disk.append({"random_4k": [g[0] and g[0]._asdict() for g in gates],
                         "sequential": [g[1] and g[1]._asdict() for g in gates]})  # fmt: skip
            for (work, place, state), run in taken.items():
                if place != "RAM" and random and stream:
                    floor = ceiling(run, bench.layout, random, stream)
                    in_ram = taken[work, "RAM", "warm"]["seconds"]
                    run |= {f"{name}_s": value for name, value in floor._asdict().items()}
                    run["ceiling_seconds"] = min(floor) + in_ram
                runs.setdefault((work, place, state), []).append(run)
    tokens = {work.name: work.tokens for work in WORKS}
    rows = [_figure(*key, tokens[key[0]], taken) for key, taken in runs.items()]
    order = {name: at for at, name in enumerate(("RAM", *SHARES))}
    return sorted(rows, key=lambda r: (list(tokens).index(r["work"]), order[r["cache"]], r["state"])), disk


def _stream(path: Path, seconds: float) -> DiskSpeed | None:
    return fio(path, sequential=True, block=1 << 20, depth=16, seconds=seconds)


def _figure(work: str, cache: str, state: str, tokens: int, runs: list[Result]) -> Result:
    """One line of the result: medians of a work's runs."""
    m = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    figure: Result = {
        "work": work,
        "placement": "host" if cache == "RAM" else "disk",
        "cache": cache,
        "state": state,
        "tokens_per_s": round(tokens / m["seconds"], 1),
        "different_tokens_said": m["different_tokens"],
        "rows_read": m["unique_misses"],
        "rows_read_per_token": round(m["unique_misses"] / tokens, 1),
        "bytes_read": m["bytes_read"],
        "reads": m["reads"],
        "hit_rate": round(m["hits"] / m["requested_rows"], 4),
        "stall_s": round(m["stall_seconds"], 3),
    }
    if "ceiling_seconds" in m:
        figure |= {
            "disk_at_random_s": round(m["at_random_s"], 3),
            "disk_streaming_once_s": round(m["streaming_s"], 3),
            "ceiling_tokens_per_s": round(tokens / m["ceiling_seconds"], 1),
            "of_ceiling": round(m["ceiling_seconds"] / m["seconds"], 3),
        }
    theirs = THEIRS[work.removeprefix("fresh "), figure["placement"]]
    if cache == "RAM" or state == "cold":
        figure["times_theirs"] = round(tokens / m["seconds"] / theirs, 2)
    return figure


def verdicts(figures: Sequence[Result]) -> list[Result]:
    """The goals, each held against its hardest figure: tokens a second, `wanted` and what came of it."""
    found = []
    for (work, placement), times in GOALS.items():
        state = "warm" if placement == "host" else "cold"
        for figure in figures:
            if (figure["work"].removeprefix("fresh "), figure["placement"], figure["state"]) != (
                work,
                placement,
                state,
            ):
                continue  # fmt: skip
            wanted = times * THEIRS[work, placement]
            if work == "prefill":
                wanted = min(wanted, figure.get("ceiling_tokens_per_s", wanted))
            found.append({"goal": f"{figure['work']}, {figure['cache']}, {state}: {times} x theirs",
                          "wanted": round(wanted, 1), "got": figure["tokens_per_s"],
                          "reached": figure["tokens_per_s"] >= wanted})  # fmt: skip
    return found


# What a step of decoding calls, by what it does. No one of them is called by another.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "dense products": [(torch.nn.functional, "linear"), (memlane.models.layers, "matvec")],
    "key search": [(memlane.models.memory, "search")],
    "row sums": [(ValueTable, "begin"), (TableLookup, "weighted_sum")],
    "attention": [(PagedAttention, "__call__")],
    "norms": [(torch.nn.functional, "rms_norm")],
    "rotary embedding": [(memlane.models.transformer, "rotate")],
    "sampling": [(memlane.engine, "sample")],
}


@contextmanager
def stopwatches() -> Iterator[dict[str, float]]:
    """Seconds spent in each part while the context is open."""
    spent = dict.fromkeys(PARTS, 0.0)

    def watch(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                spent[part] += time.perf_counter() - started

        return timed

    with ExitStack() as undo:
        for part, places in PARTS.items():
            for owner, name in places:
                function = getattr(owner, name)
                undo.callback(setattr, owner, name, function)
                setattr(owner, name, watch(part, function))
        yield spent


def where_a_step_goes(bench: Bench, steps: int) -> Result:
    """Milliseconds of a decode step in RAM by what they are spent on, beside reading the weights once (the bound)."""
    numbers = torch.randn(64 << 20)
    bandwidth = numbers.nbytes / min(_seconds(numbers.sum) for _ in range(10))
    with bench.open("host") as llm:
        weights = dict(llm.engine.model.transformer.named_parameters())
        keys = sum(w.nbytes for name, w in weights.items() if name.endswith("memory.keys"))
        dense = sum(w.nbytes for w in weights.values()) - keys
        bench.run(llm, DECODE)
        prompt = Work("one", PROMPT, 1, _greedy(1))
        steps_seconds, before = [], bench.run(llm, prompt)["seconds"]
        answer = Work("steps", PROMPT, steps, _greedy(steps, penalty=2.0))
        with stopwatches() as spent:
            bench.run(llm, prompt)
            prefill = dict(spent)
            seconds = bench.run(llm, answer)["seconds"]
        steps_seconds.append(seconds - before)
    a_step = {part: 1e3 * (spent[part] - 2 * prefill[part]) / (steps - 1) for part in PARTS}
    whole = 1e3 * sum(steps_seconds) / (steps - 1)
    a_step["the rest"] = whole - sum(a_step.values())
    return {
        "context": f"{PROMPT} to {PROMPT + steps} tokens",
        "step_ms": round(whole, 2),
        "parts_ms": {part: round(ms, 2) for part, ms in a_step.items()},
        "read_gb_s": round(bandwidth / 1e9, 1),
        "dense_mb": round(dense / 1e6, 1),
        "dense_bound_ms": round(1e3 * dense / bandwidth, 2),
        "keys_mb": round(keys / 1e6, 1),
        "key_search_bound_ms": round(1e3 * keys / bandwidth, 2),
    }


def _seconds(body: Callable[[], object]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def show(figures: Sequence[Result]) -> None:
    print(f"\n{'work':<13}{'table':>6} {'state':<5}{'tok/s':>8}{'ceiling':>9}{'of it':>7}{'x theirs':>9}"
          f"{'rows/tok':>9}{'MB read':>9}{'reads':>8}{'hits':>8}{'stall s':>9}")  # fmt: skip
    for f in figures:
        print(
            f"{f['work']:<13}{f['cache']:>6} {f['state']:<5}{f['tokens_per_s']:>8}{f.get('ceiling_tokens_per_s', ''):>9}"
            f"{f.get('of_ceiling', ''):>7}{f.get('times_theirs', ''):>9}{f['rows_read_per_token']:>9}"
            f"{f['bytes_read'] / 1e6:>9.1f}{f['reads']:>8.0f}{f['hit_rate']:>8.1%}{f['stall_s']:>9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 M rows and one turn: a smoke test")
    parser.add_argument("--turns", type=int, default=3, help="how often all states take their turn")
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--dir", type=Path, help="where to put the model (default: a temporary directory)")
    options = parser.parse_args()
    quick = options.quick

    result = header("smlm")
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        os.environ["MEMLANE_CACHE"] = (
            f"{directory}/cache"  # what is remembered of the disk ends with this run
        )
        config = b_16m(1024 if quick else 4096)
        started = time.perf_counter()
        layout = write_random_model(Path(directory) / "model", config)
        print(f"{layout.rows} rows of {layout.stride} bytes, {layout.nbytes / 1e9:.2f} GB, "
              f"written in {time.perf_counter() - started:.0f} s")  # fmt: skip
        bench = Bench(Path(directory) / "model", layout)
        result |= {"rows": layout.rows, "row_bytes": layout.stride, "threads": torch.get_num_threads()}
        result["theirs"] = {f"{work}, {place}": n for (work, place), n in THEIRS.items()}
        result["figures"], result["fio"] = measure(
            bench, 1 if quick else options.turns, 1 if quick else 4, 1 if quick else 3
        )
        result["step"] = where_a_step_goes(bench, 65 if quick else 257)
    show(result["figures"])
    result["goals"] = verdicts(result["figures"])
    print("\ngoals" + (" (quick: another table, so they say nothing)" if quick else ""))
    for goal in result["goals"]:
        print(
            f"  {goal['goal']:45s} {goal['got']:8} of {goal['wanted']:8}   {'yes' if goal['reached'] else 'NO'}"
        )
    step = result["step"]
    print(f"\na decode step in RAM, {step['step_ms']} ms at a context of {step['context']}:")
    bounds = {"dense products": step["dense_bound_ms"], "key search": step["key_search_bound_ms"]}
    for part, ms in sorted(step["parts_ms"].items(), key=lambda item: -item[1]):
        bound = (
            f"   reading the weights at {step['read_gb_s']} GB/s takes {bounds[part]} ms"
            if part in bounds
            else ""
        )
        print(f"  {part:18s} {ms:7.2f} ms{bound}")
    result["foreign_load_cpus_after"] = foreign_load()
    finish(result, options.out)


if __name__ == "__main__":
    main()
