"""The engine over a tiny model: against a full recompute for each token, and through every way a sequence can end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import faulty
import pytest
import tiny
import torch
from tiny import answer, engine, greedy, greedy_naive, prompt, request, run, tokens

from memlane.engine import Engine
from memlane.errors import ErrorKind, RequestError
from memlane.request import FinishReason, SamplingParams, TokenDelta
from memlane.tables import RowReadError

EOS = tiny.CONFIG.eos_token_ids[0]
PROMPTS = {f"r{i}": prompt(length, i) for i, length in enumerate([1, 5, 23, 8, 40, 4, 17])}


def naive(token_ids: list[int], count: int = 12) -> list[int]:
    return greedy_naive(token_ids, count)


def end(deltas: list[TokenDelta]) -> TokenDelta:
    """The one delta that ends a sequence: the last, and no other."""
    assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    last = deltas[-1]
    assert last.timing is not None
    assert (last.failure is not None) == (last.finish_reason is FinishReason.ERROR)
    return last


def step(e: Engine, times: int = 1) -> list[TokenDelta]:
    deltas = []
    for _ in range(times):
        deltas += e.step()
        e.check_integrity()
    return deltas


def assert_idle(e: Engine) -> None:
    e.check_integrity()
    stats = e.stats()
    assert (e.unfinished, stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0, 0)


# --- the same tokens as the naive twin ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_caching": False},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 1, "max_num_seqs": 3},
        {"block_size": 1, "max_num_batched_tokens": 16},
        {"block_size": 16, "max_num_seqs": 2},
        {"kv_blocks": 16},
        {"kv_blocks": 16, "prefix_caching": False, "max_num_batched_tokens": 5},
        {"split": True},
        {"split": True, "kv_blocks": 16, "max_num_batched_tokens": 11},
        {"lookahead": True},
        {"lookahead": True, "kv_blocks": 16, "max_num_batched_tokens": 11},
    ],
    ids=str,
)
def test_greedy_is_the_full_recompute(options: dict[str, Any]) -> None:
    e = engine(**options)
    for name, ids in PROMPTS.items():
        e.add(request(name, ids))
    answers = run(e)
    assert {name: tokens(answers[name]) for name in PROMPTS} == {n: naive(p) for n, p in PROMPTS.items()}
    assert all(end(deltas).finish_reason is FinishReason.LENGTH for deltas in answers.values())
    assert_idle(e)


def test_preempted_sequences_lose_nothing() -> None:
    e = engine(kv_blocks=10, prefix_caching=False)
    prompts = {f"r{i}": prompt(9, i) for i in range(4)}
    for name, ids in prompts.items():
        e.add(request(name, ids, greedy(max_tokens=20)))
    answers = run(e)
    assert {n: tokens(answers[n]) for n in prompts} == {n: naive(p, 20) for n, p in prompts.items()}
    timings = [end(deltas).timing for deltas in answers.values()]
    assert e.stats().preemptions == sum(t.preemptions for t in timings if t) > 0
    assert e.stats().prompt_tokens == sum(t.prompt_tokens_computed for t in timings if t) > 4 * 9


def test_sequences_join_and_leave_a_running_batch() -> None:
    e = engine(max_num_batched_tokens=12, max_num_seqs=4, kv_blocks=40)
    answers: dict[str, list[TokenDelta]] = {name: [] for name in PROMPTS}
    for name, ids in PROMPTS.items():
        e.add(request(name, ids))
        for delta in step(e, 2):
            answers[delta.request_id].append(delta)
    for name, deltas in run(e).items():
        answers[name] += deltas
    assert {n: tokens(d) for n, d in answers.items()} == {n: naive(p) for n, p in PROMPTS.items()}


def test_cached_prefixes_change_no_token() -> None:
    e = engine()
    first = prompt(18)
    for ids, cached in [(first, 0), (first, 16), (first[:8], 4), (first[:10] + prompt(9, 1), 8), ([EOS], 0)]:
        e.add(request("a", ids))
        deltas = run(e)["a"]
        assert tokens(deltas) == naive(ids)
        assert [d.cached_tokens for d in deltas] == [cached, *[None] * 11]
        assert (t := end(deltas).timing) is not None
        assert t.prompt_tokens_computed == len(ids) - cached
    stats = e.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (18 + 18 + 8 + 19 + 1, 28)
    assert stats.prompt_tokens == 64 - 28

    e = engine(prefix_caching=False)
    for _ in range(2):
        e.add(request("a", first))
        assert run(e)["a"][0].cached_tokens == 0
    assert (e.stats().prefix_cache_queries, e.stats().prefix_cache_hits) == (0, 0)


def test_answers_are_cached_for_the_next_turn() -> None:
    e = engine()
    turn = prompt(9) + answer(e, prompt(9)) + prompt(3, 1)
    e.add(request("b", turn))
    deltas = run(e)["b"]
    assert deltas[0].cached_tokens == 20  # of 9 + 12 tokens the last was never computed: five full blocks
    assert tokens(deltas) == naive(turn)


def test_choices_share_their_prompt_and_differ() -> None:
    e = engine()
    params = SamplingParams(n=4, seed=7, max_tokens=8, ignore_eos=True, temperature=2.0)
    for i in range(params.n):
        e.add(request(f"choice{i}", prompt(17), params.for_choice(i)))
    answers = run(e)
    assert [answers[f"choice{i}"][0].cached_tokens for i in range(4)] == [0, 16, 16, 16]
    assert len({tuple(tokens(deltas)) for deltas in answers.values()}) == 4
    assert answer(e, prompt(17), params.for_choice(2)) == tokens(answers["choice2"])


@pytest.mark.parametrize("budget", [5, 2048])
def test_logits_are_those_of_the_full_recompute(budget: int) -> None:
    e = engine(max_num_batched_tokens=budget)
    for ids in (prompt(23), prompt(1), prompt(e.max_model_len)):
        torch.testing.assert_close(
            e.logits(ids), tiny.logits_naive(tiny.transformer(), ids), rtol=1e-4, atol=1e-4
        )
    assert_idle(e)
    for bad in ([], [tiny.VOCAB], prompt(e.max_model_len + 1)):
        with pytest.raises(RequestError):
            e.logits(bad)
    e.add(request("a", [1]))
    with pytest.raises(RuntimeError, match="idle"):
        e.logits([1])


# --- ends ---


def always(token: int, **options: Any) -> SamplingParams:
    """Greedy parameters under which the model says nothing but `token`, where it may."""
    return greedy(logit_bias={token: 100.0}, **options)


def test_end_of_text() -> None:
    e = engine()
    e.add(request("a", [1, 2], always(EOS, ignore_eos=False)))
    last = end(run(e)["a"])
    assert (last.finish_reason, last.stop_token_id, last.token_ids) == (FinishReason.STOP, None, [EOS])
    assert answer(e, [1, 2], always(EOS, max_tokens=3)) == [EOS] * 3  # ignore_eos
    e.add(request("a", [1, 2], always(EOS, stop_token_ids=[EOS])))  # named, it ends all the same
    assert end(run(e)["a"]).stop_token_id == EOS


def test_stop_token_ids() -> None:
    e = engine()
    expected = naive(prompt(6))
    stop = expected[5]
    e.add(request("a", prompt(6), greedy(stop_token_ids=[stop, tiny.VOCAB + 5])))
    deltas = run(e)["a"]
    assert tokens(deltas) == expected[: expected.index(stop) + 1]
    assert (end(deltas).finish_reason, deltas[-1].stop_token_id) == (FinishReason.STOP, stop)


def test_min_tokens_holds_back_every_stop() -> None:
    e = engine()
    for params in (
        always(EOS, ignore_eos=False, min_tokens=4),
        always(7, stop_token_ids=[7], min_tokens=4),
    ):
        said = answer(e, [1, 2, 3], params)
        assert len(said) == 5
        assert said[-1] in (EOS, 7)
        assert said[-1] not in said[:-1]
    assert answer(e, [1], always(EOS, ignore_eos=False, min_tokens=12))[-1] != EOS  # min_tokens = max_tokens


def test_the_context_ends() -> None:
    e = engine(max_model_len=16)
    for length in (10, 15):
        e.add(request("a", prompt(length), greedy(max_tokens=None)))
        deltas = run(e)["a"]
        assert tokens(deltas) == naive(prompt(length), 16 - length)
        assert end(deltas).finish_reason is FinishReason.LENGTH
    e.add(request("a", prompt(10), greedy(max_tokens=100)))
    assert len(tokens(run(e)["a"])) == 6


def test_abort_waiting_prefilling_and_running() -> None:
    e = engine(max_num_batched_tokens=8, max_num_seqs=2)
    for name, ids in {"decoding": prompt(5), "prefilling": prompt(30), "waiting": prompt(6)}.items():
        e.add(request(name, ids))
    seen = step(e, 2)
    assert {d.request_id for d in seen} == {"decoding"}
    assert e.sequences["prefilling"].computed > 0
    assert e.sequences["waiting"] in e.scheduler.waiting
    ended = e.abort(["waiting", "prefilling", "unknown", "decoding", "waiting"])
    assert [d.request_id for d in ended] == ["waiting", "prefilling", "decoding"]
    for delta in ended:
        assert end([delta]).finish_reason is FinishReason.ABORT
        assert not delta.token_ids
    assert_idle(e)
    assert e.abort(["decoding"]) == []
    assert e.step() == []
    assert answer(e, prompt(30)) == naive(prompt(30))


@pytest.mark.parametrize(
    ("ids", "options", "param"),
    [
        ([], {}, "prompt"),
        ([tiny.VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        (prompt(32), {}, "prompt"),
        ([1], {"n": 2}, "n"),
        ([1], {"logit_bias": {tiny.VOCAB: 1.0}}, "logit_bias"),
        ([1], {"min_tokens": 1, "stop_token_ids": list(range(tiny.VOCAB))}, "min_tokens"),
    ],
)
def test_a_refused_request_leaves_nothing(ids: list[int], options: dict[str, Any], param: str) -> None:
    e = engine(max_model_len=32)
    before = e.stats()
    with pytest.raises(RequestError) as caught:
        e.add(request("a", ids, greedy(**options)))
    assert caught.value.param == param
    assert_idle(e)
    assert e.stats().prompt_tokens == before.prompt_tokens
    assert answer(e, [1, 2]) == naive([1, 2])


def test_an_id_in_use_is_refused_and_its_owner_unharmed() -> None:
    e = engine()
    e.add(request("a", [1, 2]))
    with pytest.raises(RequestError, match="in use"):
        e.add(request("a", [3]))
    assert tokens(run(e)["a"]) == naive([1, 2])


def test_fail_all_ends_everything_and_forgets_what_was_computed() -> None:
    e = engine(max_num_seqs=2)
    for i in range(3):
        e.add(request(f"r{i}", prompt(9)))
    step(e)
    deltas = e.fail_all("lightning")
    assert {d.request_id for d in deltas} == {"r0", "r1", "r2"}
    for delta in deltas:
        assert (failure := end([delta]).failure) is not None
        assert (failure.kind, failure.message) == (ErrorKind.INTERNAL, "lightning")
    assert_idle(e)
    e.add(request("again", prompt(9)))
    again = run(e)["again"]
    assert again[0].cached_tokens == 0
    assert tokens(again) == naive(prompt(9))


def test_ends_of_a_step_that_broke_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence fails on its rows, then running the others breaks: fail_all hands out both ends."""
    table = faulty.FaultyTable()
    e = engine({"values": table})
    victim, other = _pair_with_private_row(table)
    for name, ids in (("victim", victim), ("other", other)):
        e.add(request(name, ids))
    healthy = e.runner.run

    def breaks_when_alone(plan: Any, **options: Any) -> torch.Tensor:
        if len(plan.chunks) == 1:
            raise RuntimeError("unforeseen")
        return healthy(plan, **options)

    monkeypatch.setattr(e.runner, "run", breaks_when_alone)
    with pytest.raises(RuntimeError, match="unforeseen"):
        e.step()
    kinds = {d.request_id: d.failure.kind for d in e.fail_all("broke") if d.failure}
    assert kinds == {"victim": ErrorKind.ROWS_UNREADABLE, "other": ErrorKind.INTERNAL}
    assert_idle(e)


# --- faults stay with those they concern ---


def _pair_with_private_row(
    table: faulty.FaultyTable, *, prompt_row: bool = True
) -> tuple[list[int], list[int]]:
    """Two prompts, and in table.bad one row that only the first needs: in its prompt, or else only in its answer."""
    victim, other = prompt(6, 1), prompt(7, 2)
    private = faulty.rows_of(victim + naive(victim)[:-1]) - faulty.rows_of(other + naive(other))
    in_prompt = faulty.rows_of(victim)
    table.bad = {min(private & in_prompt if prompt_row else private - in_prompt)}
    return victim, other


@pytest.mark.parametrize("split", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("prompt_row", [True, False], ids=["prefill", "decode"])
def test_only_the_sequence_that_needs_an_unreadable_row_fails(prompt_row: bool, split: bool) -> None:
    table = faulty.FaultyTable()
    e = engine({"values": table}, split=split)
    victim, other = _pair_with_private_row(table, prompt_row=prompt_row)
    e.add(request("victim", victim))
    e.add(request("other", other))
    answers = run(e)
    last = end(answers["victim"])
    assert last.failure is not None
    assert last.failure.kind is ErrorKind.ROWS_UNREADABLE
    assert str(min(table.bad)) in last.failure.message
    said = tokens(answers["victim"])
    assert said == naive(victim)[: len(said)]
    assert bool(said) is not prompt_row
    assert tokens(answers["other"]) == naive(other)
    assert end(answers["other"]).finish_reason is FinishReason.LENGTH
    assert_idle(e)

    table.bad = set()
    e.add(request("victim", victim))
    again = run(e)["victim"]
    assert again[0].cached_tokens == 0, "what a failed sequence computed was shared"
    assert tokens(again) == naive(victim)


def test_a_fault_that_names_no_token_fails_the_whole_step_only() -> None:
    table = faulty.FaultyTable(names_tokens=False)
    e = engine({"values": table}, max_num_seqs=2)
    victim, other = _pair_with_private_row(table)
    e.add(request("victim", victim))
    e.add(request("other", other))
    e.add(request("later", other))
    answers = run(e)
    assert end(answers["victim"]).finish_reason is end(answers["other"]).finish_reason is FinishReason.ERROR
    assert tokens(answers["later"]) == naive(other)
    assert_idle(e)


def test_sharers_of_a_prefix_survive_the_failure_of_one() -> None:
    table = faulty.FaultyTable()
    e = engine({"values": table})
    common = prompt(8)
    victim, other = common + prompt(5, 1), common + prompt(5, 3)
    e.add(request("first", common, greedy(max_tokens=1)))
    run(e)
    table.bad = {min(faulty.rows_of(victim) - faulty.rows_of(other + naive(other)))}
    e.add(request("other", other))
    step(e)
    e.add(request("victim", victim))
    answers = run(e)
    assert end(answers["victim"]).finish_reason is FinishReason.ERROR
    table.bad = set()
    e.add(request("victim", victim))
    assert tokens(run(e)["victim"]) == naive(victim)
    e.add(request("other", other))
    assert tokens(run(e)["other"]) == naive(other)


def test_unreadable_rows_in_logits_leave_the_engine_whole() -> None:
    table = faulty.FaultyTable()
    e = engine({"values": table}, max_num_batched_tokens=4)
    table.bad = faulty.rows_of(prompt(9)) - faulty.rows_of(prompt(9)[:4])
    with pytest.raises(RowReadError):
        e.logits(prompt(9))
    assert_idle(e)
    table.bad = set()
    assert answer(e, prompt(9)) == naive(prompt(9))


def _clean(length: int, first_seed: int) -> list[int]:
    """A prompt that the poisoned model answers as the healthy one does."""
    candidates = (prompt(length, first_seed + i) for i in range(100))
    return next(ids for ids in candidates if faulty.POISON not in ids + naive(ids))


def test_output_that_is_not_finite_fails_its_sequence_alone() -> None:
    """It owns block 0 and is computed in pieces, beside decodes of unequal lengths."""
    e = engine(model=faulty.poisoned(), max_num_batched_tokens=8, prefix_caching=False)
    e.add(request("holder of block 0", [1, 2]))
    step(e)
    others = {"short": _clean(2, 200), "long": _clean(9, 300)}
    for name, ids in others.items():
        e.add(request(name, ids))
    seen = step(e, 2)
    e.abort(["holder of block 0"])
    e.add(request("sick", [1, faulty.POISON, *_clean(30, 100)]))
    seen += step(e)
    assert "sick" not in e.sequences, "it fails with its first piece"
    assert 0 not in {block for s in e.sequences.values() for block in s.blocks}
    answers = {name: [d for d in seen if d.request_id == name] for name in (*others, "sick")}
    for name, deltas in run(e).items():
        answers[name] += deltas
    assert (failure := end(answers["sick"]).failure) is not None
    assert (failure.kind, tokens(answers["sick"])) == (ErrorKind.INTERNAL, [])
    assert {n: tokens(answers[n]) for n in others} == {n: naive(p) for n, p in others.items()}
    assert_idle(e)


@pytest.mark.parametrize("budget", [8, 2048], ids=["in pieces", "whole"])
def test_nothing_that_is_not_finite_is_left_in_the_kv_cache(budget: int) -> None:
    e = engine(model=faulty.poisoned(), max_num_batched_tokens=budget)
    e.add(request("sick", [1, faulty.POISON, *_clean(20, 100)]))
    assert end(step(e)).finish_reason is FinishReason.ERROR
    assert all(torch.isfinite(layer).all() for layer in e.runner.kv.layers)
    assert_idle(e)


# --- random lives ---


@pytest.mark.parametrize("seed", range(10))
def test_random_lives(seed: int) -> None:
    """Adds, aborts, faults and steps in any order: each accepted sequence ends once, and says what it should."""
    rng = random.Random(seed)
    table = faulty.FaultyTable()
    e = engine(
        {"values": table},
        kv_blocks=rng.randint(8, 20),
        max_num_batched_tokens=rng.choice([3, 9, 40]),
        max_num_seqs=rng.randint(1, 5),
        prefix_caching=rng.random() < 0.7,
        split=bool(seed % 2),
        lookahead=seed >= 5,
    )
    prompts = [prompt(n, 50)[:n] for n in (1, 6, 13)] + [prompt(13, 50)[:9] + prompt(4, 51)]
    needed = sorted(faulty.rows_of(prompts[2]))
    accepted: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    deltas: dict[str, list[TokenDelta]] = {}

    def note(new: Iterable[TokenDelta]) -> None:
        for delta in new:
            deltas.setdefault(delta.request_id, []).append(delta)
        e.check_integrity()

    def add() -> None:
        name, ids = f"r{len(accepted)}", rng.choice(prompts)
        limits[name] = rng.randint(1, 12)
        e.add(request(name, ids, greedy(max_tokens=limits[name])))
        accepted[name] = ids

    def abort() -> None:
        if accepted:
            note(e.abort([rng.choice(list(accepted))]))

    def fault() -> None:
        table.bad = {rng.choice(needed)} if rng.random() < 0.5 else set()

    def fail_all() -> None:
        note(e.fail_all("random"))

    def advance() -> None:
        note(e.step())

    actions: list[Callable[[], None]] = [add, abort, fault, fail_all, advance]
    for _ in range(150):
        rng.choices(actions, [25, 5, 5, 1, 64])[0]()
    while e.unfinished:
        advance()
    assert deltas.keys() == accepted.keys()
    for name, ids in accepted.items():
        said = tokens(deltas[name])
        assert said == naive(ids)[: len(said)]
        if end(deltas[name]).finish_reason is FinishReason.LENGTH:
            assert len(said) == limits[name]
    assert e.stats().generation_tokens == sum(len(tokens(d)) for d in deltas.values())
    assert_idle(e)


def test_stats_of_one_plain_run() -> None:
    e = engine()
    fresh = e.stats()
    assert (fresh.steps, fresh.prompt_tokens, fresh.generation_tokens, fresh.preemptions) == (0, 0, 0, 0)
    e.add(request("a", prompt(9)))
    e.add(request("b", prompt(3, 1), greedy(max_tokens=2)))
    assert (e.stats().running, e.stats().waiting) == (0, 2)
    step(e)
    assert e.last_step_tokens == 12
    now = e.stats()
    assert (now.running, now.waiting, now.steps, now.kv_blocks_used) == (2, 0, 1, 4)
    assert (now.prompt_tokens, now.generation_tokens) == (12, 2)
    run(e)
    after = e.stats()
    assert (after.steps, after.prompt_tokens, after.generation_tokens) == (12, 12, 14)
    assert after.kv_blocks_total == now.kv_blocks_total == 64 * 32
    assert_idle(e)
