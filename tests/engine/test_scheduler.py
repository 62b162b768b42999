"""The scheduler alone: random lives of many sequences, and each of its rules by example."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlane.errors import ErrorKind, RequestError
from memlane.request import FinishReason, SamplingParams
from memlane.scheduler import BlockPool, Scheduler, Sequence, StepPlan

BLOCK = 4


def scheduler(blocks: int = 16, *, seqs: int = 8, budget: int = 16, prefix_caching: bool = True) -> Scheduler:
    return Scheduler(
        blocks=blocks,
        block_size=BLOCK,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        prefix_caching=prefix_caching,
    )


def sequence(name: str, prompt: list[int], answer: int = 4) -> Sequence:
    return Sequence(name, prompt, SamplingParams(max_tokens=answer), max_length=len(prompt) + answer)


def next_token(seq: Sequence) -> int:
    """A fake model: the next token is a function of all tokens before it."""
    return hash(tuple(seq.token_ids)) % 5


def step(s: Scheduler) -> StepPlan:
    """Schedule, compute with the fake model, commit; finished sequences leave."""
    plan = s.schedule()
    for chunk in plan.chunks:
        s.commit(chunk)
        if chunk.samples and chunk.sequence.append(next_token(chunk.sequence)) is not None:
            s.finish(chunk.sequence)
    s.check_integrity()
    return plan


def check_plan(s: Scheduler, plan: StepPlan) -> None:
    assert plan.tokens <= s.max_num_batched_tokens
    assert all(chunk.length == 1 for chunk in plan.chunks[: plan.singles])
    assert all(chunk.length > 1 for chunk in plan.chunks[plan.singles :])
    assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
    for chunk in plan.chunks:
        seq = chunk.sequence
        assert chunk.start == seq.computed, "tokens are computed in order and once"
        assert len(seq.blocks) * BLOCK >= chunk.start + chunk.length
        assert chunk.samples == (chunk.start + chunk.length == len(seq.token_ids))


events = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20), st.integers(0, 2)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("fail"), st.integers(0, 30)),
    st.just(("step",)),
)


@settings(max_examples=80, deadline=None)
@given(
    events=st.lists(events, max_size=60),
    blocks=st.integers(4, 20),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 24),
    prefix_caching=st.booleans(),
)
def test_random_lives(
    events: list[tuple[object, ...]], blocks: int, seqs: int, budget: int, prefix_caching: bool
) -> None:
    s = scheduler(blocks, seqs=seqs, budget=budget, prefix_caching=prefix_caching)
    alive: dict[str, Sequence] = {}
    contents: dict[
        int, tuple[int, ...]
    ] = {}  # block -> the tokens its KV was computed from, from the start on

    def compute(plan: StepPlan) -> None:
        check_plan(s, plan)
        for chunk in plan.chunks:
            seq = chunk.sequence
            for index in range(chunk.start // BLOCK):  # what was computed earlier, or found in the cache
                assert contents[seq.blocks[index]] == tuple(seq.token_ids[: (index + 1) * BLOCK])
            for position in range(chunk.start, chunk.start + chunk.length):
                contents[seq.blocks[position // BLOCK]] = tuple(seq.token_ids[: position + 1])
            s.commit(chunk)
        for chunk in plan.chunks:
            if chunk.samples and chunk.sequence.append(next_token(chunk.sequence)) is not None:
                s.finish(chunk.sequence)
                del alive[chunk.sequence.request_id]
        s.check_integrity()

    for number, event in enumerate(events):
        if event[0] == "add":
            _, length, answer, family = event
            seq = sequence(
                f"s{number}", [family] * length, answer
            )  # few different prompts: many shared prefixes
            try:
                s.add(seq)
                alive[seq.request_id] = seq
            except RequestError:
                assert (length + answer - 1) > blocks * BLOCK
        elif event[0] == "step":
            compute(s.schedule())
        elif alive:
            name = sorted(alive)[event[1] % len(alive)]
            s.finish(alive.pop(name), discard=event[0] == "fail")
        s.check_integrity()
    for _ in range(5000):
        if not s.unfinished:
            break
        plan = s.schedule()
        assert plan.chunks, "sequences are unfinished, yet a step computes nothing"
        compute(plan)
    assert not s.unfinished
    assert not alive
    assert s.pool.used == 0
    s.pool.drop_cached()
    s.check_integrity()


def test_decodes_and_prefill_chunks_share_a_step() -> None:
    s = scheduler(budget=8)
    s.add(sequence("a", [1, 2, 3]))
    step(s)
    s.add(sequence("b", list(range(20))))
    plan = step(s)
    assert [(c.sequence.request_id, c.length, c.samples) for c in plan.chunks] == [
        ("a", 1, True),
        ("b", 7, False),
    ]
    assert plan.singles == 1
    assert [c.length for c in step(s).chunks] == [1, 7]
    assert [(c.length, c.samples) for c in step(s).chunks] == [(1, True), (6, True)]


def test_admission_is_first_come_first_served() -> None:
    s = scheduler(blocks=6, prefix_caching=False)
    s.add(sequence("a", [1] * 12))
    s.add(sequence("b", [2] * 16))  # does not fit beside a
    s.add(sequence("c", [3]))  # would fit, but b was first
    plan = step(s)
    assert [c.sequence.request_id for c in plan.chunks] == ["a"]
    assert s.stats().waiting == 2


def test_at_most_max_num_seqs_run() -> None:
    s = scheduler(seqs=2)
    for name in "abc":
        s.add(sequence(name, [1, 2]))
    step(s)
    assert (s.stats().running, s.stats().waiting) == (2, 1)


def test_the_youngest_is_preempted_and_keeps_its_tokens() -> None:
    s = scheduler(blocks=4, prefix_caching=False)
    old, young = sequence("old", [1] * 7, 8), sequence("young", [2] * 7, 8)
    s.add(old)
    s.add(young)
    step(s)
    step(s)  # both have 8 computed tokens now: the next one needs a block, and none is left
    tokens = list(young.token_ids)
    plan = step(s)
    assert [c.sequence for c in plan.chunks] == [old]
    assert young in s.waiting
    assert young.token_ids == tokens
    assert young.preemptions == s.stats().preemptions == 1
    while s.unfinished:
        step(s)
    assert old.output_length == young.output_length == 8


def test_what_can_never_fit_is_refused() -> None:
    s = scheduler(blocks=4)
    s.add(sequence("fits", [1] * 13, 4))  # the last token is never computed
    with pytest.raises(RequestError) as caught:
        s.add(sequence("too long", [1] * 14, 4))
    assert caught.value.kind is ErrorKind.CONTEXT_LENGTH


def test_full_blocks_are_shared_and_the_last_token_is_computed() -> None:
    s = scheduler()
    s.add(sequence("a", list(range(8)), 1))
    step(s)
    b = sequence("b", list(range(8)), 1)
    s.add(b)
    plan = step(s)
    assert b.cached_tokens == 4, (
        "of two equal full blocks the second holds the last token, which must be computed"
    )
    assert plan.tokens == 4
    c = sequence("c", [*range(8), 9], 1)
    s.add(c)
    step(s)
    assert c.cached_tokens == 8
    assert s.stats().prefix_hits == 12
    assert s.stats().prefix_queries == 8 + 8 + 9


def test_a_different_beginning_shares_nothing() -> None:
    s = scheduler()
    s.add(sequence("a", [0, 1, 2, 3, 4, 5, 6, 7, 8], 1))
    step(s)
    b = sequence("b", [9, 1, 2, 3, 4, 5, 6, 7, 8], 1)  # its second block has equal tokens, after other ones
    s.add(b)
    step(s)
    assert b.cached_tokens == 0


def test_equal_prompts_of_one_moment_are_computed_once() -> None:
    s = scheduler(blocks=32, budget=64)
    choices = [sequence(f"choice {i}", list(range(17)), 2) for i in range(4)]
    for choice in choices:
        s.add(choice)
    assert step(s).tokens == 17
    assert [c.length for c in step(s).chunks] == [1, 1, 1, 1]
    assert [c.cached_tokens for c in choices] == [0, 16, 16, 16]


def test_failed_sequences_leave_nothing_in_the_prefix_cache() -> None:
    s = scheduler()
    a = sequence("a", list(range(12)))
    s.add(a)
    step(s)
    assert len(s.finish(a, discard=True)) == 3
    b = sequence("b", list(range(12)))
    s.add(b)
    step(s)
    assert b.cached_tokens == 0


def test_stalest_cached_blocks_are_evicted_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2), pool.allocate(1)
    for digest, block in zip((b"1", b"2", b"3"), first + second, strict=True):
        pool.prefix.insert(digest, block)
    pool.release(first)
    pool.release(second)
    pool.share(second)  # used again: the youngest now
    pool.release(second)
    assert pool.allocate(3) == [first[1], first[0], second[0]]


def test_eviction_never_takes_a_block_in_use() -> None:
    s = scheduler(blocks=5, budget=64)
    s.add(sequence("a", [1] * 9, 1))
    step(s)
    b = sequence("b", [1] * 9, 4)  # shares two cached blocks
    s.add(b)
    step(s)
    shared = b.blocks[:2]
    s.add(sequence("c", [2] * 8, 1))
    step(s)
    assert b.blocks[:2] == shared


def test_ends_of_a_sequence() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=[5])
    seq = Sequence("a", [1], params, max_length=4, eos_ids=frozenset([7]))
    assert seq.append(1) is None
    assert seq.append(5) == (FinishReason.STOP, 5)
    seq = Sequence("a", [1], params, max_length=4, eos_ids=frozenset([7]))
    assert seq.append(7) == (FinishReason.STOP, None)
    seq = Sequence("a", [1], SamplingParams(ignore_eos=True), max_length=3, eos_ids=frozenset([7]))
    assert seq.append(7) is None
    assert seq.append(7) == (FinishReason.LENGTH, None)


def test_a_sequence_is_planned_with_its_newest_token_expected_but_not_past_its_length() -> None:
    s = scheduler()
    a = sequence("a", [1, 2, 3], 2)
    s.add(a)
    s.commit(s.schedule().chunks[0])
    a.expect(0)
    (chunk,) = s.schedule().chunks
    assert chunk == (a, 3, 1, True)
    with pytest.raises(AssertionError, match="placeholder"):
        s.commit(chunk)
    a.append(4)
    s.commit(chunk)
    a.expect(0)
    assert a.complete
    assert s.schedule().chunks == []
    s.check_integrity()
    assert a.append(5) == (FinishReason.LENGTH, None)


def test_who_is_retired_runs_no_more_and_keeps_its_blocks() -> None:
    s = scheduler(seqs=1)
    a, b = sequence("a", [1] * 5), sequence("b", [2] * 5)
    s.add(a)
    s.add(b)
    step(s)
    s.retire(a)
    s.check_integrity()
    assert [chunk.sequence for chunk in step(s).chunks] == [b]
    assert (len(a.blocks), s.stats().running, s.stats().blocks_used) == (2, 1, 4)
    assert len(s.finish(a)) == 1  # the other stays cached
    s.check_integrity()
    assert s.stats().blocks_used == 2


def test_the_scheduler_says_beforehand_whether_it_will_preempt() -> None:
    s = scheduler(blocks=4, prefix_caching=False)
    for name, token in (("old", 1), ("young", 2)):
        s.add(sequence(name, [token] * 7, 8))
    said = []
    while s.unfinished:
        before, expected = s.stats().preemptions, s.preempts
        step(s)
        said.append((expected, s.stats().preemptions > before))
    assert set(said) == {(False, False), (True, True)}


def test_books_that_do_not_balance_are_noticed() -> None:
    s = scheduler()
    a = sequence("a", list(range(12)))
    s.add(a)
    step(s)
    s.pool.release(a.blocks[:1])
    with pytest.raises(AssertionError, match="reference counts"):
        s.check_integrity()


def test_no_torch() -> None:
    code = "import sys, memlane.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
