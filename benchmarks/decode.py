"""Tokens per second of decoding with the demo model: its table on disk behind a warm cache of 25 %, against the table in RAM.

Both models live in one process and answer the same questions in turns, so that whatever else the machine does
hits both. The cache was warmed by `hot_rows.npy` and by earlier questions, as in service. Questions come in two
kinds: "zipf" (some facts are asked for far more often than others, as people do) and "uniform" (every fact is
equally likely, so nearly every question is new: the worst case of a cache). The table in RAM is the ceiling: the
ratio says what offloading costs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from measuring import finish, header

import memlane
from memlane import LLM, SamplingParams
from memlane.ipc import Add

DEMO = Path(memlane.__file__).parent / "demo"
WARM_UP = 512  # questions answered before the clock starts
GREEDY = SamplingParams(temperature=0, max_tokens=64)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "unicode_facts"))
from data import PHRASINGS, all_facts  # noqa: E402 - the example is a folder of scripts


def questions(count: int, popularity: str, rng: np.random.Generator) -> list[str]:
    """Questions in phrasings drawn at random. "uniform": facts that were never asked before are as likely as any;
    "zipf": the r-th most popular of all facts is asked for with a probability in proportion to 1 / r."""
    facts = all_facts()
    ranks = np.random.default_rng(99).permutation(len(facts))
    weights = 1 / (1 + ranks) if popularity == "zipf" else np.ones(len(facts))
    drawn = rng.choice(len(facts), size=count, p=weights / weights.sum())
    return [
        facts[i].prompt(int(p)) for i, p in zip(drawn, rng.integers(len(PHRASINGS), size=count), strict=True)
    ]


def answer(llm: LLM, prompts: list[str], batch: int) -> tuple[list[list[int]], float]:
    """Answer the prompts greedily, `batch` at a time. Returns the answers and the tokens per second of decoding.

    Only steps in which every sequence of the batch decodes count: prompts are another matter.
    """
    assert llm.tokenizer is not None
    engine, answers, decoded, seconds = llm.engine, {}, 0, 0.0
    for at in range(0, len(prompts), batch):
        for number, text in enumerate(prompts[at : at + batch], start=at):
            name = f"{id(prompts)}-{number}"
            answers[name] = list[int]()
            engine.add(Add(request_id=name, prompt_token_ids=llm.tokenizer.encode(text), params=GREEDY))
        prefilling = True
        while engine.unfinished:
            start = time.perf_counter()
            deltas = engine.step()
            if not prefilling:
                seconds += time.perf_counter() - start
                decoded += sum(len(delta.token_ids) for delta in deltas)
            for delta in deltas:
                answers[delta.request_id] += delta.token_ids
            prefilling = prefilling and not all(answers.values())
    return list(answers.values()), decoded / seconds


def measure(
    host: LLM, disks: dict[str, LLM], popularity: str, batch: int, rounds: int, count: int
) -> list[dict[str, Any]]:
    """One result for each cache policy; all engines answer the same questions in turns."""
    rng = np.random.default_rng(batch)
    engines = {"host": host, **disks}
    for llm in engines.values():
        answer(llm, questions(max(count, WARM_UP), popularity, rng), 64)
    before = {name: dict(llm.stats().tables[0].counters) for name, llm in disks.items()}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    generated = 0
    for number in range(rounds):
        prompts = questions(count, popularity, rng)
        order = list(engines)
        tokens = {}
        for name in order[number % len(order) :] + order[: number % len(order)]:
            tokens[name], speed = answer(engines[name], prompts, batch)
            speeds[name].append(speed)
        assert all(found == tokens["host"] for found in tokens.values()), (
            "placements must not change an answer"
        )
        generated += sum(map(len, tokens["host"]))
    results = []
    for name, llm in disks.items():
        after = llm.stats().tables[0].counters
        delta = {key: after[key] - before[name][key] for key in after}
        ratios = [d / h for d, h in zip(speeds[name], speeds["host"], strict=True)]
        results.append(
            {
                "questions": popularity,
                "batch": batch,
                "policy": name,
                "host_tokens_per_s": round(statistics.median(speeds["host"])),
                "disk_tokens_per_s": round(statistics.median(speeds[name])),
                "ratio": round(statistics.median(ratios), 3),
                "hit_rate": round(delta["hits"] / delta["requested_rows"], 4),
                "rows_read_per_token": round(delta["unique_misses"] / generated, 2),
                "stall_us_per_token": round(1e6 * delta["stall_seconds"] / generated, 1),
                "read_us_per_token": round(1e6 * delta["read_seconds"] / generated, 1),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--row-cache", default="25%")
    parser.add_argument("--policies", default="lru,tinylfu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--questions", type=int, default=64, help="in a round")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        **header("decode"),
        "model": arguments.model.name,
        "row_cache": arguments.row_cache,
        "target_ratio": 0.9,
        "results": [],
    }
    with ExitStack() as opened:
        host = opened.enter_context(LLM(arguments.model, placement="host"))
        disks = {
            policy: opened.enter_context(
                LLM(arguments.model, placement="disk", row_cache=arguments.row_cache, cache_policy=policy,
                    warm_start="hot-rows")
            )
            for policy in arguments.policies.split(",")
        }  # fmt: skip
        print(
            f"{'questions':<9} {'batch':>5} {'policy':>8} {'RAM tok/s':>10} {'disk tok/s':>10} {'disk/RAM':>9}"
            f" {'hit rate':>9} {'stall':>12}"
        )
        for popularity, batch in itertools.product(("zipf", "uniform"), (1, 16, 64)):
            for row in measure(host, disks, popularity, batch, arguments.rounds, arguments.questions):
                result["results"].append(row)
                print(
                    f"{popularity:<9} {batch:>5} {row['policy']:>8} {row['host_tokens_per_s']:>10}"
                    f" {row['disk_tokens_per_s']:>10} {row['ratio']:>9.3f} {row['hit_rate']:>9.2%}"
                    f" {row['stall_us_per_token']:>6.0f} us/token",
                    flush=True,
                )
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
