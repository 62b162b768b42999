"""Thousands of steps of an engine whose disk fails at random: every request ends once, and the answers given are right."""

from __future__ import annotations

import errno
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from tiny import greedy, prompt, request

from memlane.engine import Engine
from memlane.errors import ErrorKind
from memlane.native import cache_policies
from memlane.request import FinishReason, TokenDelta
from memlane.runner.halves import MIN_TOKENS
from memlane.tables import ValueTable, write_table

STEPS = 260
HANG = -1  # of inject_fault: reads that never end
LENGTHS = (1, 3, 9, 14, 30, 60, 90, 110)


class Case(NamedTuple):
    prompt: int  # of PROMPTS
    count: int


class Options(NamedTuple):
    slots: int  # of the cache
    verify: bool
    sequences: int
    tokens: int  # a step
    blocks: int
    split: bool  # every step into halves, not only those that are long enough


PARTS = [
    Options(slots=3, verify=True, sequences=40, tokens=512, blocks=400, split=False),
    Options(slots=300, verify=False, sequences=40, tokens=512, blocks=120, split=True),
    Options(slots=40, verify=True, sequences=4, tokens=16, blocks=60, split=False),
    Options(slots=0, verify=False, sequences=10, tokens=64, blocks=100, split=True),
]
PROMPTS = [prompt(length, seed) for length in LENGTHS for seed in range(4)]
PROMPTS += [PROMPTS[-1][:100] + prompt(5, seed) for seed in range(3)]  # they share their beginning


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that meet after every tiny product make a busy machine ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def expected(case: Case) -> list[int]:
    """What an engine whose table lies in RAM answers."""
    return tiny.answer(reference(), PROMPTS[case.prompt], greedy(max_tokens=case.count))


@functools.cache
def reference() -> Engine:
    return tiny.engine()


class Run:
    """One engine on a failing table, and the books of what was asked of it."""

    def __init__(self, path: Path, policy: str, uring: bool, rng: random.Random, options: Options) -> None:
        rows = tiny.weights()[1]
        layout = write_table(path, "values", len(rows), rows.shape[1], "float32", [rows])
        self.rng = rng
        self.table = ValueTable.open(
            layout,
            "disk",
            options.slots * layout.stride,
            policy=policy,
            allow_uring=uring,
            deadline=0.05,
            verify=options.verify,
        )
        self.engine = tiny.engine(
            {"values": self.table},
            max_num_seqs=options.sequences,
            max_num_batched_tokens=options.tokens,
            kv_blocks=options.blocks,
            split=options.split,
        )
        self.asked: dict[str, Case] = {}
        self.got: dict[str, list[TokenDelta]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.halves = 0
        splits = self.engine.runner.splits
        self.engine.runner.splits = lambda plan: self._counted(splits(plan))  # type: ignore[method-assign]

    def _counted(self, split: bool) -> bool:
        self.halves += split
        return split

    def add(self) -> None:
        case = Case(self.rng.randrange(len(PROMPTS)), self.rng.randint(1, 14))
        name = f"r{len(self.asked)}"
        self.engine.add(request(name, PROMPTS[case.prompt], greedy(max_tokens=case.count)))
        self.asked[name], self.got[name] = case, []

    def fail_somewhere(self) -> None:
        first = self.rng.randrange(1000)
        last = min(1023, first + self.rng.choice([0, 5, 100]))
        error, times = self.rng.choice(
            [(0, 0)] * 4
            + [(errno.EIO, -1), (errno.EIO, 3), (0, -1), (0, 1), (errno.EAGAIN, 2), (errno.EAGAIN, 9)]
        )
        if self.rng.random() < 0.03:
            error, times = HANG, -1
        self.table.source.inject_fault(first, last, error, times)

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            name = delta.request_id
            assert name not in self.ended, "nothing follows a request's end"
            self.got[name].append(delta)
            if delta.finish_reason is not None:
                self.ended[name] = delta.finish_reason
                assert (delta.finish_reason is FinishReason.ERROR) == (delta.failure is not None)
                assert delta.failure is None or delta.failure.kind is ErrorKind.ROWS_UNREADABLE

    def step(self) -> None:
        if self.rng.random() < 0.3 and self.engine.unfinished < 60:
            for _ in range(self.rng.choice([1, 1, 2, 12])):
                self.add()
        if self.rng.random() < 0.2:
            self.fail_somewhere()
        if self.rng.random() < 0.05 and self.engine.sequences:
            names = self.rng.sample(sorted(self.engine.sequences), 1)
            self.take(self.engine.abort([*names, "nobody"]))
        if self.rng.random() < 0.05:
            ids = np.array([self.rng.randrange(1024) for _ in range(200)])
            self.table.start_warming(ids, pin=self.rng.choice([0, 5]))
        self.table.warm_some(0.0)
        self.take(self.engine.step())
        self.engine.check_integrity()
        self.table.check_integrity()


@pytest.mark.parametrize("uring", [True, False], ids=["io_uring", "threads"])
@pytest.mark.parametrize("policy", cache_policies())
def test_every_request_ends_once_and_rightly(tmp_path: Path, policy: str, uring: bool) -> None:
    rng = random.Random(f"{policy} {uring}")
    ends: list[FinishReason] = []
    retries = scratch = errors = halves = 0
    for part, options in enumerate(PARTS):
        run = Run(tmp_path / f"{part}", policy, uring, rng, options)
        for _ in range(STEPS // len(PARTS)):
            run.step()
        run.table.source.inject_fault(0, 0, 0, 0)
        while run.engine.unfinished:
            run.take(run.engine.step())
            run.engine.check_integrity()
            run.table.check_integrity()
        assert run.ended.keys() == run.asked.keys()
        for name, case in run.asked.items():
            tokens = tiny.tokens(run.got[name])
            wanted = expected(case)
            finished = run.ended[name] is FinishReason.LENGTH
            assert tokens == (wanted if finished else wanted[: len(tokens)]), (name, case)
        stats = run.table.stats()
        assert stats.in_flight == 0
        assert stats.hits + stats.misses == stats.requested_rows
        retries, scratch = retries + stats.retries, scratch + stats.scratch_rows
        errors, halves = errors + stats.errors, halves + run.halves
        assert run.halves > 0 or options.tokens < 2 * MIN_TOKENS, "no step was long enough for halves"
        ends += run.ended.values()
        every_row = torch.arange(run.table.rows)
        assert torch.equal(run.table.gather(every_row), tiny.weights()[1]), "and nothing stale was kept"
        run.engine.close()
        run.table.close()
    assert min(retries, scratch, errors, halves) > 0
    assert {FinishReason.LENGTH, FinishReason.ERROR, FinishReason.ABORT} == set(ends)
    assert ends.count(FinishReason.LENGTH) > 50
