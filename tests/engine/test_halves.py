"""Steps run as two halves: the same answers as whole ones, in an order that hides reads, whatever fails."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import pytest
import tiny
import torch
from slow import SlowTable
from tiny import engine, prompt, request, run, tokens
from torch import Tensor

import memlane
from memlane import LLM, SamplingParams
from memlane.models import Transformer
from memlane.runner import KVCache, Runner, halves
from memlane.scheduler import Chunk, Sequence, StepPlan
from memlane.scheduler.plan import make_plan
from memlane.tables import RowReadError, Table, ValueTable, write_table

DEMO = Path(memlane.__file__).parent / "demo"
BLOCK = 4
# Layers 1 and 3 have memory, so each half stops twice.
DEEP = dataclasses.replace(
    tiny.CONFIG,
    num_layers=4,
    memory=dataclasses.replace(tiny.MEMORY, layers=(1, 3)),
    tie_word_embeddings=False,
)


def flat(plan: StepPlan) -> list[tuple[Sequence, int]]:
    """Sequence and position of every token, in the order in which the runner packs them."""
    return [(c.sequence, p) for c in plan.chunks for p in range(c.start, c.start + c.length)]


def random_plan(rng: random.Random, decodes: int = 4, prompts: int = 3) -> StepPlan:
    """Decodes, and prompts of which a part may be computed already. Every sequence has blocks of its own."""
    chunks = []
    for i in range(decodes + prompts):
        length, block = rng.randint(2, 30), 8 * i
        start = length - 1 if i < decodes else rng.randint(0, length - 2)
        count = rng.randint(2, length - start) if i >= decodes else 1
        sequence = Sequence(f"s{i}", prompt(length, i), SamplingParams(), max_length=99)
        sequence.blocks = rng.sample(range(block, block + 8), 8)
        chunks.append(Chunk(sequence, start, count, start + count == length))
    rng.shuffle(chunks)
    return make_plan(chunks)


def deep(table: Table) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(DEEP, {"values": table})
    model.embed.weight.data *= 30
    return model.requires_grad_(False).eval()


def runner(table: Table, *, split: bool) -> Runner:
    """A runner over a cache whose contents are what earlier steps left: the same random numbers each time."""
    made = Runner(deep(table), KVCache(DEEP, 80, BLOCK, torch.float32))
    generator = torch.Generator().manual_seed(6)
    for layer in made.kv.layers:
        layer.normal_(generator=generator)
    made.splits = lambda plan: split  # type: ignore[method-assign]
    return made


# --- where to cut ---


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_keeps_every_token_in_its_place(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    for at in range(1, plan.tokens):
        first, second = halves.cut(plan, at)
        assert flat(first) + flat(second) == flat(plan)
        assert first.tokens == at
        sampling = [c.sequence for half in (first, second) for c in half.chunks if c.samples]
        assert sampling == [c.sequence for c in plan.chunks if c.samples]
        for half in (first, second):
            assert all(c.length == 1 for c in half.chunks[: half.singles])
        assert first.singles + second.singles == plan.singles


def test_what_is_split_depends_on_the_plan() -> None:
    def plan(decodes: int, length: int) -> StepPlan:
        s = Sequence("a", [1] * (length + 1), SamplingParams(), max_length=9999)
        return make_plan([Chunk(s, 0, 1, False)] * decodes + ([Chunk(s, 0, length, False)] if length else []))

    asked: list[int] = []
    r = Runner(tiny.transformer(), KVCache(tiny.CONFIG, 1, 4, torch.float32))
    at = 2 * halves.MIN_TOKENS
    assert [r.splits(plan(*p)) for p in ((0, at), (0, at - 1), (5, at - 5), (at - 2, 2), (at, 0))] == [
        True, False, True, True, False,
    ]  # fmt: skip
    r.split_decode = lambda n: bool(asked.append(n)) or n == 40
    assert [r.splits(plan(n, 0)) for n in (1, 39, 40)] == [False, False, True]
    assert asked == [39, 40]
    dense = dataclasses.replace(tiny.CONFIG, memory=None)
    r = Runner(Transformer(dense), KVCache(dense, 1, 4, torch.float32), lambda n: True)
    assert not r.splits(plan(0, at))
    assert not r.splits(plan(at, 0))


# --- the same answers ---


@pytest.mark.parametrize("all_logits", [False, True], ids=["ends", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_logits_and_cache_are_those_of_the_whole_step(seed: int, all_logits: bool) -> None:
    rng = random.Random(seed)
    plan = random_plan(rng, rng.randint(0, 5), rng.randint(0, 3) or 1)
    table = tiny.table()
    whole, split = (runner(table, split=split) for split in (False, True))
    wanted, got = (r.run(plan, all_logits=all_logits) for r in (whole, split))
    assert wanted.shape[0] == (plan.tokens if all_logits else len(plan.chunks))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for a, b in zip(whole.kv.layers, split.kv.layers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ValueTable]]:
    """The tiny model's table in RAM, and on disk behind a cache of a few rows."""
    values = tiny.weights()[1]
    path = tmp_path_factory.mktemp("tables") / "t.safetensors"
    layout = write_table(path, "values", *values.shape, "float32", [values])
    opened = {p: ValueTable.open(layout, p, 40 * layout.stride) for p in ("host", "disk")}
    yield opened
    for table in opened.values():
        table.check_integrity()
        table.close()


@pytest.mark.parametrize("seed", range(5))
def test_placements_agree_bit_by_bit(seed: int, tables: dict[str, ValueTable]) -> None:
    plan = random_plan(random.Random(seed), decodes=5, prompts=4)
    host, disk, twin = (runner(t, split=True).run(plan) for t in (*tables.values(), tiny.table()))
    assert torch.equal(host, disk)
    torch.testing.assert_close(host, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "halves"])
def test_greedy_tokens_of_a_large_batch(tables: dict[str, ValueTable], placement: str, split: bool) -> None:
    e = engine({"values": tables[placement]}, max_num_seqs=40)
    e.runner.split_decode = lambda n: split
    prompts = {f"r{i}": prompt(3 + i % 9, i) for i in range(40)}
    for name, ids in prompts.items():
        e.add(request(name, ids, tiny.greedy(max_tokens=6)))
    answers = run(e)
    assert {n: tokens(answers[n]) for n in prompts} == {
        n: tiny.greedy_naive(p, 6) for n, p in prompts.items()
    }


def test_the_demo_model_says_the_same() -> None:
    """Prompts of a step that is cut, then decode batches whole and in halves, in RAM and from disk."""
    questions = [f"What is U+{code:04X}?" for code in range(0x2600, 0x2630)]
    said = []
    for options in ({"placement": "host"}, {"placement": "disk", "row_cache": "10%"}):
        for split in (False, True):
            with LLM(DEMO, threads=2, **options) as llm:
                llm.engine.runner.split_decode = lambda n, split=split: split
                outputs = llm.generate(
                    questions, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False
                )
                said.append([output.outputs[0].token_ids for output in outputs])
    assert said[0] == said[1] == said[2] == said[3]


# --- in an order that hides reads ---


def test_one_half_computes_while_the_other_reads() -> None:
    table = SlowTable(tiny.table(), seconds=0.02)
    r = runner(table, split=True)
    events: list[tuple[Any, ...]] = table.events
    for layer, block in enumerate(r.transformer.layers):
        block.attn.register_forward_hook(lambda _, args, out, n=layer: events.append((f"attn {n}", len(out))))
    sequence = Sequence("a", prompt(21), SamplingParams(), max_length=99)
    sequence.blocks = list(range(6))
    r.run(make_plan([Chunk(sequence, 0, 21, True)]))
    a, b = 10, 11
    assert events == [
        ("attn 0", a), ("attn 1", a), ("begin", a),
        ("attn 0", b), ("attn 1", b), ("begin", b),  # while A's rows are read
        ("end", a), ("attn 2", a), ("attn 3", a), ("begin", a),  # while B's are
        ("end", b), ("attn 2", b), ("attn 3", b), ("begin", b),  # while A's are
        ("end", a), ("end", b),
    ]  # fmt: skip


def test_an_engine_that_waits_for_rows_tries_halves() -> None:
    """As its tables report it, all the time is spent waiting."""
    table = SlowTable(tiny.table())
    e = engine({"values": table}, max_num_seqs=40)

    class Waiting:
        """All it does is wait."""

        @property
        def stall_seconds(self) -> float:
            return perf_counter()

        def note_tokens(self, tokens: int) -> None:
            pass

        def abandon(self) -> None:
            pass

    e.model.tables["values"] = cast(Any, Waiting())
    for i in range(40):
        e.add(request(f"r{i}", prompt(1, i), tiny.greedy(max_tokens=20)))
    while e.unfinished:
        e.step()
    begun = [count for what, count in table.events if what == "begin"]
    assert begun == [40] * 16 + [20] * 2 * 4


# --- whatever fails ---


@pytest.mark.parametrize("seed", range(12))
def test_errors_name_the_tokens_of_the_step(seed: int) -> None:
    """Halves stop at the first layer that fails, so the tokens are those of one half that need a bad row there."""
    rng = random.Random(seed)
    plan = random_plan(rng, rng.randint(0, 5), rng.randint(1, 3))
    table = SlowTable(tiny.table())
    r = runner(table, split=True)
    healthy = r.run(plan)
    chosen: list[Tensor] = []
    for layer in DEEP.memory.layers if DEEP.memory else ():
        memory = r.transformer.layers[layer].memory
        memory.choose = lambda x, choose=memory.choose: chosen.append(choose(x)[0]) or choose(x)
    r.run(plan)
    a1, b1, a2, b2 = chosen
    table.bad = {rng.choice(rng.choice(chosen).flatten().tolist())}
    middle = plan.tokens // 2
    hit = [
        torch.isin(ids, torch.tensor(sorted(table.bad))).any(1).nonzero().flatten()
        for ids in (a1, b1, a2, b2)
    ]
    hit = [tokens + begin for tokens, begin in zip(hit, (0, middle, 0, middle), strict=True)]
    with pytest.raises(RowReadError, match="broken on purpose") as caught:
        r.run(plan)
    assert caught.value.tokens == next(tokens.tolist() for tokens in hit if len(tokens))
    assert not table.open, "the other half kept its lookup"
    table.bad = set()
    torch.testing.assert_close(r.run(plan), healthy, rtol=0, atol=0)


def test_a_half_that_cannot_begin_closes_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SlowTable(tiny.table())
    r = runner(table, split=True)
    plan = random_plan(random.Random(0))
    begin = table.begin

    def only_once(ids: Tensor, live: Tensor | None = None) -> Any:
        if table.open:
            raise IndexError("no such row")
        return begin(ids)

    monkeypatch.setattr(table, "begin", only_once)
    with pytest.raises(IndexError, match="no such row"):
        r.run(plan)
    assert not table.open
