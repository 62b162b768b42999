"""Steps planned before the tokens of those before them are known: the same answers, whatever happens meanwhile."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import faulty
import pytest
import tiny
import torch
from tiny import answer, engine, greedy, greedy_naive, prompt, request, run, tokens

from memlane.engine import Engine
from memlane.errors import ErrorKind
from memlane.request import FinishReason, SamplingParams, TokenDelta
from memlane.runner import Pending
from memlane.runner.batch import make_batch
from memlane.scheduler import Sequence
from memlane.scheduler.plan import Chunk, make_plan

EOS = tiny.CONFIG.eos_token_ids[0]


def ahead(tables: Any = None, model: Any = None, **options: Any) -> Engine:
    return engine(tables, model, lookahead=True, **options)


def always(token: int, **options: Any) -> SamplingParams:
    return greedy(logit_bias={token: 100.0}, **options)


def assert_idle(e: Engine) -> None:
    e.check_integrity()
    stats = e.stats()
    assert (e.unfinished, stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0, 0)
    assert all(torch.isfinite(layer).all() for layer in e.runner.kv.layers)


# --- the same answers ---


class Event(NamedTuple):
    """Something a client does before a step."""

    step: int
    name: str
    prompt: list[int] | None  # None: abort
    params: SamplingParams | None


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.2 else otherwise

    return SamplingParams(
        max_tokens=rng.randint(1, 24),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=maybe(0.8, 1.0),
        top_k=maybe(5, 0),
        seed=rng.randrange(1000),
        stop_token_ids=maybe(rng.sample(range(tiny.VOCAB), 8), []),
        ignore_eos=rng.random() < 0.5,
        min_tokens=maybe(1, 0),
        logit_bias=maybe({EOS: 3.0}, None),
        logprobs=maybe(2, None),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.5, 0.0),
        frequency_penalty=maybe(0.5, 0.0),
    )


def random_events(rng: random.Random) -> list[Event]:
    """Requests, some with a common beginning, and aborts of some of them."""
    events = []
    for i in range(24):
        start, ids = rng.randint(0, 40), prompt(rng.randint(1, 24), i % 5)
        events.append(Event(start, f"r{i}", prompt(9, 77) + ids if i % 3 else ids, random_params(rng)))
        if rng.random() < 0.25:
            events.append(Event(start + rng.randint(0, 12), f"r{i}", None, None))
    return sorted(events, key=lambda event: event.step)


def live(e: Engine, events: list[Event]) -> dict[str, list[TokenDelta]]:
    """What came of these events."""
    deltas: dict[str, list[TokenDelta]] = {}
    left, number = list(events), 0
    while left or e.unfinished:
        new = []
        while left and left[0].step <= number:
            event = left.pop(0)
            if event.prompt is None:
                new += e.abort([event.name])
            else:
                e.add(request(event.name, event.prompt, event.params))
        new += e.step()
        e.check_integrity()
        for delta in new:
            deltas.setdefault(delta.request_id, []).append(delta)
        number += 1
    for of_one in deltas.values():
        assert [d.finish_reason is not None for d in of_one] == [False] * (len(of_one) - 1) + [True]
    assert_idle(e)
    return deltas


def logprobs(deltas: list[TokenDelta]) -> list[Any]:
    return [
        (x.token_id, pytest.approx(x.logprob, abs=1e-3), [t for t, _ in x.top])
        for d in deltas
        for x in d.logprobs or ()
    ]


@pytest.mark.parametrize("seed", range(10))
def test_random_workloads(seed: int) -> None:
    rng = random.Random(seed)
    options = {
        "kv_blocks": rng.choice([16, 20, 400]),
        "max_num_batched_tokens": rng.choice([6, 20, 2048]),
        "max_num_seqs": rng.choice([2, 6, 64]),
        "prefix_caching": rng.random() < 0.7,
        "split": rng.random() < 0.3,
    }
    events = random_events(rng)
    expected, got = (live(engine(lookahead=flag, **options), events) for flag in (False, True))
    aborted = {event.name for event in events if event.prompt is None}
    assert got.keys() == expected.keys() == {event.name for event in events}
    for name in got:
        a, b = tokens(got[name]), tokens(expected[name])
        if name in aborted:  # after more or fewer tokens
            assert a[: len(b)] == b[: len(a)]
            continue
        assert a == b, name
        last, twin = got[name][-1], expected[name][-1]
        assert (last.finish_reason, last.stop_token_id) == (twin.finish_reason, twin.stop_token_id)
        assert logprobs(got[name]) == [(t, p.expected, top) for t, p, top in logprobs(expected[name])]
        assert len(got[name]) == len(a), "each token comes in a delta of its own"


def test_random_workloads_meet_what_they_are_for() -> None:
    """Preemption, stop tokens, sharing and aborts do happen in them."""
    e = ahead(kv_blocks=16, max_num_batched_tokens=20)
    rng = random.Random(0)
    deltas = live(e, random_events(rng))
    stats = e.stats()
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    ends = {d.finish_reason for of_one in deltas.values() for d in of_one}
    assert ends == {None, FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}


# --- what is planned when ---


def watch(e: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Fills a list with ("run", tokens) and ("result", rows) as they happen."""
    events: list[tuple[str, int]] = []
    healthy, result = e.runner.run, Pending.result

    def running(plan: Any, **options: Any) -> torch.Tensor:
        events.append(("run", plan.tokens))
        return healthy(plan, **options)

    def resulting(pending: Pending) -> Any:
        if len(pending.tokens):
            events.append(("result", len(pending.tokens)))
        return result(pending)

    monkeypatch.setattr(e.runner, "run", running)
    monkeypatch.setattr(Pending, "result", resulting)
    return events


def test_a_step_is_launched_before_the_one_before_it_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    e = ahead()
    events = watch(e, monkeypatch)
    assert answer(e, prompt(9), greedy(max_tokens=4)) == greedy_naive(prompt(9), 4)
    # Nothing is planned past the last token, whose place in the answer is known.
    assert events == [
        ("run", 9), ("run", 1), ("result", 1), ("run", 1), ("result", 1), ("run", 1), ("result", 1),
        ("result", 1),
    ]  # fmt: skip
    assert (e.steps, e.last_step_tokens) == (4, 0)


def test_without_lookahead_each_step_is_collected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    assert not e.lookahead, "it is for GPUs"
    events = watch(e, monkeypatch)
    answer(e, prompt(9), greedy(max_tokens=3))
    assert events == [("run", 9), ("result", 1), ("run", 1), ("result", 1), ("run", 1), ("result", 1)]


def test_a_stop_token_costs_one_token_that_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    e = ahead()
    events = watch(e, monkeypatch)
    e.add(request("a", [1, 2], always(EOS, ignore_eos=False)))
    assert tokens(run(e)["a"]) == [EOS]
    assert events == [("run", 2), ("run", 1), ("result", 1), ("result", 1)]
    assert e.stats().generation_tokens == 1
    assert_idle(e)


def test_penalties_wait_for_the_token_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    e = ahead(max_num_batched_tokens=8)
    events = watch(e, monkeypatch)
    e.add(request("a", prompt(12), greedy(max_tokens=3, presence_penalty=0.1)))
    run(e)
    # The prompt's first piece samples nothing, so the second is launched behind it.
    assert events == [
        ("run", 8), ("run", 4), ("result", 1), ("result", 1), ("run", 1), ("result", 1), ("run", 1), ("result", 1),
    ]  # fmt: skip


def test_blocks_are_taken_only_from_sequences_that_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    e = ahead(kv_blocks=8, prefix_caching=False)
    preempt = e.scheduler._preempt

    def checked(victim: Sequence) -> None:
        assert e._outstanding is None
        assert not victim.expects
        preempt(victim)

    monkeypatch.setattr(e.scheduler, "_preempt", checked)
    for i in range(3):
        e.add(request(f"r{i}", prompt(7, i), greedy(max_tokens=20)))
    answers = run(e)
    assert e.stats().preemptions > 0
    assert all(tokens(answers[f"r{i}"]) == greedy_naive(prompt(7, i), 20) for i in range(3))


# --- tokens that are not known yet ---


def expecting(row: int) -> Sequence:
    s = Sequence("s", [4, 5, 6], SamplingParams(), max_length=99)
    s.blocks = [0]
    s.expect(row)
    return s


def test_a_placeholder_is_no_token() -> None:
    plan = make_plan([Chunk(expecting(0), 3, 1, True)])
    with pytest.raises(AssertionError, match="placeholder"):
        make_batch(plan, 4)


def test_expected_tokens_are_taken_from_the_step_before() -> None:
    sequences = [expecting(2), Sequence("k", [7, 8], SamplingParams(), max_length=99), expecting(0)]
    sequences[1].blocks = [1]
    plan = make_plan([Chunk(s, len(s.token_ids) - 1, 1, True) for s in sequences])
    batch = make_batch(plan, 4, previous=torch.tensor([40, 41, 42]))
    assert batch.token_ids.tolist() == [42, 8, 40]


def test_a_sequence_that_expects_a_token() -> None:
    s = expecting(3)
    assert (s.expects, s.output_length, s.remaining, s.first_token) == (True, 1, 4, None)
    with pytest.raises(AssertionError):
        s.expect(0)
    assert s.append(9) is None
    assert (s.token_ids, s.expects) == ([4, 5, 6, 9], False)
    assert s.first_token is not None


# --- ends while a step is under way ---


def test_an_abort_keeps_its_blocks_until_its_step_is_collected() -> None:
    e = ahead()
    e.add(request("a", prompt(9)))
    e.step()
    assert [d.finish_reason for d in e.abort(["a"])] == [FinishReason.ABORT]
    assert (e.unfinished, e.stats().running, e.stats().kv_blocks_used) == (1, 0, 3)
    e.add(request("a", prompt(5)))  # the name is free
    assert tokens(run(e)["a"]) == greedy_naive(prompt(5), 12)
    assert_idle(e)


def test_logits_of_an_engine_whose_last_step_is_under_way() -> None:
    e = ahead()
    e.add(request("a", prompt(9)))
    e.step()
    e.abort(["a"])
    torch.testing.assert_close(
        e.logits(prompt(7)), tiny.logits_naive(tiny.transformer(), prompt(7)), rtol=1e-4, atol=1e-4
    )
    assert_idle(e)


def test_fail_all_forgets_the_step_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose results may be what is broken: asking for them would break the next step too."""
    e = ahead()
    for name in ("aborted", "failed"):
        e.add(request(name, prompt(9)))
    events = watch(e, monkeypatch)
    e.step()
    e.abort(["aborted"])
    assert [d.request_id for d in e.fail_all("lightning")] == ["failed"]
    assert_idle(e)
    assert e.step() == []
    assert [event for event, _ in events] == ["run"]
    assert answer(e, prompt(9)) == greedy_naive(prompt(9), 12)


def test_a_launch_that_breaks_loses_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    e = ahead()
    e.add(request("a", prompt(9)))
    e.step()

    def broken(*args: Any, **options: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(e.runner, "run", broken)
        with pytest.raises(ZeroDivisionError):
            e.step()
    assert [(d.request_id, d.finish_reason) for d in e.fail_all("broke")] == [("a", FinishReason.ERROR)]
    assert_idle(e)


# --- faults ---


def _clean(length: int, seed: int) -> list[int]:
    """A prompt that the poisoned model answers as the healthy one does."""
    candidates = (prompt(length, 100 * seed + i) for i in range(100))
    return next(ids for ids in candidates if faulty.POISON not in ids + greedy_naive(ids, 12))


def rows_of_token(ids: list[int], said: list[int]) -> set[int]:
    """Rows that only the last token of ids + said needs."""
    return faulty.rows_of(ids + said) - faulty.rows_of(ids + said[:-1])


def test_tokens_come_before_the_failure_of_the_step_after_them() -> None:
    table = faulty.FaultyTable()
    e = ahead({"values": table})
    said = greedy_naive(prompt(6), 12)
    table.bad = {min(rows_of_token(prompt(6), said[:1]))}
    e.add(request("a", prompt(6)))
    deltas = run(e)["a"]
    assert tokens(deltas) == said[:1]
    assert deltas[-1].failure is not None
    assert deltas[-1].failure.kind is ErrorKind.ROWS_UNREADABLE
    assert_idle(e)


def test_who_has_ended_needs_no_rows() -> None:
    """The token after its stop token cannot be computed; it has ended all the same, and the others go on."""
    table = faulty.FaultyTable()
    e = ahead({"values": table})
    said, other = greedy_naive(prompt(6), 1), greedy_naive(prompt(7, 1), 12)
    unreadable = rows_of_token(prompt(6), said) - faulty.rows_of(prompt(7, 1) + other)
    table.bad = {min(unreadable)}
    e.add(request("stops", prompt(6), greedy(stop_token_ids=said)))
    e.add(request("goes on", prompt(7, 1)))
    answers = run(e)
    assert tokens(answers["stops"]) == said
    assert answers["stops"][-1].finish_reason is FinishReason.STOP
    assert tokens(answers["goes on"]) == other
    assert_idle(e)


@pytest.mark.parametrize("budget", [8, 2048], ids=["in pieces", "whole"])
def test_output_that_is_not_finite_fails_its_sequence_alone(budget: int) -> None:
    clean = {f"r{i}": prompt(7, i) for i in range(20)}
    clean = {n: p for n, p in clean.items() if faulty.POISON not in p + greedy_naive(p, 12)}
    e = ahead(model=faulty.poisoned(), max_num_batched_tokens=budget, kv_blocks=24)
    for i, (name, ids) in enumerate(clean.items()):
        e.add(request(name, ids))
        if i % 3 == 0:
            e.add(request(f"sick {i}", [1, faulty.POISON, *prompt(20, i)]))
    answers = run(e)
    for name, deltas in answers.items():
        if name in clean:
            assert tokens(deltas) == greedy_naive(clean[name], 12)
        else:
            assert tokens(deltas) == []
            assert deltas[-1].failure is not None
            assert deltas[-1].failure.kind is ErrorKind.INTERNAL
    assert_idle(e)


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_what_is_not_finite_after_an_end_reaches_nobody(how: str) -> None:
    """The stop token, or the prompt of an aborted sequence, is poison: it is computed, and its block used again.

    The others differ in length: what lies past the end of the shorter one is masked, and shows if it is not finite.
    """
    e = ahead(model=faulty.poisoned(), kv_blocks=12, prefix_caching=False)
    for seed in range(6):
        others = {"short": _clean(3, seed), "long": _clean(14, seed)}
        if how == "stop":
            e.add(request("sick", [1, 2], always(faulty.POISON, stop_token_ids=[faulty.POISON])))
        else:
            e.add(request("sick", [1, faulty.POISON]))
        for name, ids in others.items():
            e.add(request(name, ids))
        assert e.step() == []
        if how == "abort":
            e.abort(["sick"])
        answers = run(e)
        assert {n: tokens(answers[n]) for n in others} == {n: greedy_naive(p, 12) for n, p in others.items()}
        assert_idle(e)


def test_a_failure_is_not_that_of_the_next_who_has_its_name() -> None:
    """It was computing once more when it failed."""
    e = ahead(model=faulty.poisoned())
    e.add(request("a", [1, faulty.POISON]))
    assert e.step() == []
    e.add(request("b", ids := _clean(5, 0)))
    assert [d.finish_reason for d in e.step()] == [FinishReason.ERROR]
    e.add(request("a", ids))
    answers = run(e)
    assert tokens(answers["a"]) == tokens(answers["b"]) == greedy_naive(ids, 12)
