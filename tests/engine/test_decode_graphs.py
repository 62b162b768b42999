"""Decode steps in graphs: the logits of the same padded batch without them, bit by bit, whatever came before or fails.

Graphs are stood for by TwinCapture, which runs functions again, and by a tape, which replays as CUDA does.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import pytest
import tiny
import torch
from slow import SlowTable
from staged import StagedTable
from tape import CapturableOnly, TapeCapture
from torch import Tensor

from memlane.models import Transformer, product_keys
from memlane.models import layers as dense_layers
from memlane.models.product_keys import Selection, select_reference
from memlane.request import SamplingParams
from memlane.runner import KVCache, Runner, decode_graphs
from memlane.runner.captured import Captured, Cut, Eager, Whole
from memlane.runner.decode_graphs import ladder
from memlane.runner.graphs import Capture, TwinCapture
from memlane.scheduler import Chunk, Sequence, StepPlan
from memlane.scheduler.plan import make_plan
from memlane.tables import RowReadError, Table

BLOCK, BLOCKS, LONGEST = 4, 160, 30
# Layers 1 and 3 have memory, so a step is cut in three.
DEEP = dataclasses.replace(
    tiny.CONFIG,
    num_layers=4,
    memory=dataclasses.replace(tiny.MEMORY, layers=(1, 3), gated=True),
)
PEER = dataclasses.replace(
    DEEP,
    memory=dataclasses.replace(
        tiny.MEMORY, layers=(1, 3), kind="peer", swilu=False, value_proj=False, value_dim=DEEP.hidden_size
    ),
)
MODES = {
    "whole": (False, False),
    "whole halves": (False, True),
    "cut": (True, False),
    "cut halves": (True, True),
}
modes = pytest.mark.parametrize(("cut", "halves"), MODES.values(), ids=MODES.keys())
captures = pytest.mark.parametrize("make", [TwinCapture, TapeCapture], ids=["twin", "tape"])


@pytest.fixture(autouse=True)
def operations_of_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs natively on a CPU leaves no trace on a tape; and halves are for small batches too."""

    def search(query: Tensor, keys: Tensor, k: int) -> Selection:
        scores = torch.einsum("thsw,hsnw->thsn", query, keys)
        chosen = select_reference(scores.flatten(0, 1), k)
        return Selection(*(part.view(len(query), -1, k) for part in chosen))

    monkeypatch.setattr(product_keys, "search", search)
    for module in (dense_layers, product_keys):
        monkeypatch.setattr(module, "kernel_variant", lambda: "scalar")
    monkeypatch.setattr(decode_graphs, "MIN_HALVES", 2)


def staged(by_host: bool = True) -> StagedTable:
    return StagedTable(tiny.weights()[1], by_host=by_host)


def runner(tables: dict[str, Table], config: Any = DEEP) -> Runner:
    """Over a cache whose contents are what earlier steps left: the same random numbers each time."""
    torch.manual_seed(5)
    model = Transformer(config, tables).requires_grad_(False).eval()
    model.embed.weight *= 30
    made = Runner(model, KVCache(config, BLOCKS, BLOCK, torch.float32))
    generator = torch.Generator().manual_seed(6)
    for layer in made.kv.layers:
        layer.normal_(generator=generator)
    return made


def padded(table: Table, capture: Capture | None, cut: bool, halves: bool, sequences: int = 12) -> Runner:
    made = runner({"values": table})
    made.pad_decodes(sequences, LONGEST, capture, cut=cut, halves=halves)
    return made


def captured(made: Runner) -> list[Captured]:
    assert made.decode is not None
    return [each.captured for each in made.decode._sets.values()]


def plan(rng: random.Random, count: int) -> StepPlan:
    chunks = []
    for i, first in enumerate(rng.sample(range(BLOCKS // 8), count)):
        length = rng.randint(1, LONGEST)
        sequence = Sequence(
            f"s{i}", tiny.prompt(length, rng.randrange(999)), SamplingParams(), max_length=LONGEST
        )
        sequence.blocks = rng.sample(range(8 * first, 8 * first + 8), 8)
        chunks.append(Chunk(sequence, length - 1, 1, True))
    return make_plan(chunks)


# --- sizes ---


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 12, 16, 20]),
        (64, [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]),
        (9999, [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]),
    ],
)
def test_the_ladder(most: int, sizes: list[int]) -> None:
    assert ladder(most) == sizes


def test_larger_and_other_steps_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MOST", 4)
    made = padded(staged(), TwinCapture(), cut=False, halves=False)
    assert made.decode is not None
    rng = random.Random(0)
    assert [made.decode.takes(plan(rng, n)) for n in (1, 4, 5)] == [True, True, False]
    sequence = Sequence("p", tiny.prompt(9), SamplingParams(), max_length=LONGEST)
    assert not made.decode.takes(make_plan([Chunk(sequence, 0, 9, True)]))


# --- the same logits ---


@captures
@modes
def test_graphs_compute_what_the_same_batch_does_without(
    make: type[TwinCapture | TapeCapture], cut: bool, halves: bool
) -> None:
    """Over many steps: sizes go up and down, and nothing of an earlier step shows in a later one."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    eager = padded(staged(cut), None, cut, halves)
    graphs = padded(staged(cut), make(), cut, halves)
    plain = runner({"values": staged()})
    for step in range(8):
        each = plan(rng, rng.randint(1, 12))
        wanted, found = eager.run(each), graphs.run(each).clone()
        assert torch.equal(found, wanted), f"seed {seed}, step {step}"
        torch.testing.assert_close(found, plain.run(each), rtol=1e-4, atol=1e-4)
        for a, b in zip(eager.kv.layers, graphs.kv.layers, strict=True):
            assert torch.equal(a[:-1], b[:-1]), f"seed {seed}, step {step}"
    assert {type(c) for c in captured(graphs)} == {Cut if cut else Whole}
    assert {type(c) for c in captured(eager)} == {Eager}


def test_peer_layers_fetch_both_their_tables() -> None:
    values = torch.randn(2, PEER.memory.rows, PEER.hidden_size, generator=torch.Generator().manual_seed(0))

    def made(capture: Capture | None) -> Runner:
        tables = {f"values_{name}": StagedTable(part) for name, part in zip("uv", values, strict=True)}
        r = runner(tables, PEER)
        r.pad_decodes(4, LONGEST, capture, cut=True, halves=True)
        return r

    eager, graphs, rng = made(None), made(TapeCapture()), random.Random(1)
    for count in (4, 1, 3, 4):
        each = plan(rng, count)
        assert torch.equal(graphs.run(each), eager.run(each))


def test_a_longer_sequence_gets_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, rng = TapeCapture(), random.Random(2)
    monkeypatch.setattr(decode_graphs.DecodeGraphs, "capture_all", lambda self: None)
    made = padded(staged(False), capture, cut=False, halves=False)
    monkeypatch.setattr(made.attention, "bound", lambda longest, most: 8 if longest <= 8 else most)
    short, long = plan(rng, 1), plan(rng, 1)
    for each, length in ((short, 5), (long, 25)):
        each.chunks[0].sequence.token_ids[:] = tiny.prompt(length)
        each.chunks[0] = each.chunks[0]._replace(start=length - 1)
    plain = runner({"values": staged(False)})
    for each, graphs in ((short, 1), (long, 2), (short, 2), (long, 2)):
        torch.testing.assert_close(made.run(each), plain.run(each), rtol=1e-4, atol=1e-4)
        assert capture.captured == graphs


def test_tokens_still_on_the_device_are_taken_from_there() -> None:
    made, rng = padded(staged(), TapeCapture(), cut=True, halves=False), random.Random(3)
    known = plan(rng, 3)
    tokens = [chunk.sequence.token_ids[chunk.start] for chunk in known.chunks]
    wanted = made.run(known).clone()
    for row, chunk in zip((2, 0, 1), known.chunks, strict=True):
        chunk.sequence.token_ids[chunk.start] = -(row + 1)
    assert made.decode is not None
    previous = torch.tensor([tokens[1], tokens[2], tokens[0]])
    assert torch.equal(made.decode.run(known, previous), wanted)


@modes
@captures
def test_greedy_tokens_of_an_engine(make: type[TwinCapture | TapeCapture], cut: bool, halves: bool) -> None:
    e = tiny.engine({"values": staged(cut)}, max_num_seqs=6)
    e.runner.pad_decodes(6, e.max_model_len, make(), cut=cut, halves=halves)
    prompts = {f"r{i}": tiny.prompt(3 + i % 9, i) for i in range(11)}
    for i, (name, ids) in enumerate(prompts.items()):
        e.add(tiny.request(name, ids, tiny.greedy(max_tokens=4 + i)))
    answers = tiny.run(e)
    for i, (name, ids) in enumerate(prompts.items()):
        assert tiny.tokens(answers[name]) == tiny.greedy_naive(ids, 4 + i)


@modes
@captures
def test_greedy_tokens_of_an_engine_a_step_ahead(
    make: type[TwinCapture | TapeCapture], cut: bool, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs for longer sequences are captured while tokens that a graph chose are still expected: to capture is to run."""
    e = tiny.engine({"values": staged(cut)}, max_num_seqs=6, lookahead=True)
    monkeypatch.setattr(e.runner.attention, "bound", lambda longest, most: min(most, -(-longest // 4) * 4))
    e.runner.pad_decodes(6, e.max_model_len, make(), cut=cut, halves=halves)
    early = len(captured(e.runner))
    prompts = {f"r{i}": tiny.prompt(3 + i % 9, i) for i in range(9)}
    for i, (name, ids) in enumerate(prompts.items()):
        e.add(tiny.request(name, ids, tiny.greedy(max_tokens=4 + i)))
    answers = tiny.run(e)
    assert len(captured(e.runner)) > early
    for i, (name, ids) in enumerate(prompts.items()):
        assert tiny.tokens(answers[name]) == tiny.greedy_naive(ids, 4 + i)


# --- in an order that hides the host's part ---


def test_one_half_computes_while_rows_of_the_other_are_fetched() -> None:
    table, capture = staged(), TapeCapture()
    made = padded(table, capture, cut=True, halves=True, sequences=4)
    events: list[Any] = table.events

    def watch(graph: Any, name: str) -> Any:
        return lambda: events.append(name) or graph()

    found = made.decode._sets[4, LONGEST, True].captured  # type: ignore[union-attr, index]
    assert isinstance(found, Cut)
    assert found.pieces == 6
    for piece, name in zip(found._pieces, ("A1", "B1", "A2", "B2", "A3", "B3"), strict=True):
        piece.graph.replay = watch(piece.graph.replay, name)  # type: ignore[method-assign]
    events.clear()
    made.run(plan(random.Random(0), 4))
    fetch = ("fetch", 2)
    assert events == ["A1", "B1", fetch, "A2", fetch, "B2", fetch, "A3", fetch, "B3"]


@pytest.mark.parametrize("halves", [False, True], ids=["one", "halves"])
def test_a_lookup_knows_when_it_was_launched(halves: bool) -> None:
    """Right after its piece is replayed, before the other half's: its fetch must not wait for that one too."""
    table = staged()
    made = padded(table, TapeCapture(), cut=True, halves=halves, sequences=4)
    order: list[str] = []
    found = made.decode._sets[4, LONGEST, halves].captured  # type: ignore[union-attr, index]
    assert isinstance(found, Cut)
    for piece in found._pieces:
        piece.graph.replay = lambda replay=piece.graph.replay: order.append("replay") or replay()  # type: ignore
    table.on_launched = lambda: order.append("launched")
    made.run(plan(random.Random(0), 4))
    assert order == ["replay", "launched"] * (4 if halves else 2) + ["replay"] * (2 if halves else 1)


# --- whatever fails ---


@pytest.mark.parametrize("make", [None, TwinCapture, TapeCapture], ids=["eager", "twin", "tape"])
@pytest.mark.parametrize("halves", [False, True], ids=["one", "halves"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_cannot_be_read(make: Any, halves: bool, seed: int) -> None:
    """Errors name the step's tokens, never a row that fills the batch up; then it goes on as if nothing had been."""
    rng = random.Random(seed)
    table = staged()
    made = padded(table, make and make(), cut=True, halves=halves, sequences=8)
    each = plan(rng, rng.choice([1, 3, 5, 7]))
    chosen: list[Tensor] = []
    plain = runner({"values": staged()})
    layer = plain.transformer.layers[1].memory
    layer.choose = lambda x, choose=layer.choose: chosen.append(choose(x)[0]) or choose(x)
    plain.run(each)
    healthy = made.run(each).clone()
    table.bad = {rng.choice(chosen[0].flatten().tolist())}
    hit = torch.isin(chosen[0], torch.tensor(sorted(table.bad))).any(1).nonzero().flatten().tolist()
    size = next(n for n in ladder(8) if n >= len(each.chunks))
    if halves and size > 1:
        first = [token for token in hit if token < size // 2]
        hit = first or hit
    table.events.clear()
    with pytest.raises(RowReadError, match="broken on purpose") as caught:
        made.run(each)
    assert caught.value.tokens == hit
    rest = each.without({each.chunks[token].sequence for token in caught.value.tokens})
    if make is TapeCapture:  # nobody began them again, but what the replay asked for was given up
        assert {what for what, _ in table.events} == {"fetch", "close"}
        assert len([what for what, _ in table.events if what == "close"]) == (2 if halves and size > 1 else 1)
    table.bad = set()
    if rest.chunks:
        torch.testing.assert_close(made.run(rest), plain.run(rest), rtol=1e-4, atol=1e-4)
    assert torch.equal(made.run(each), healthy)


@modes
def test_lookups_of_a_twin_are_closed_when_rows_fail(cut: bool, halves: bool) -> None:
    """SlowTable minds how many are open."""
    table = SlowTable(tiny.table())
    made = padded(table, TwinCapture(), cut=cut, halves=halves)
    each = plan(random.Random(4), 7)
    healthy = made.run(each).clone()
    table.bad = set(range(table.rows))
    with pytest.raises(RowReadError):
        made.run(each)
    assert not table.open
    table.bad = set()
    assert torch.equal(made.run(each), healthy)


class Failing(TapeCapture):
    """Runs out of memory at its `last`-th graph."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def capture(self, function: Any) -> Any:
        if self.captured + 1 >= self.last:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().capture(function)


@modes
def test_what_cannot_be_captured_runs_without(
    cut: bool, halves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = padded(staged(cut), Failing(last=2), cut, halves, sequences=2)
    kinds = [type(each) for each in captured(made)]
    assert kinds[1:] == [Eager]
    assert "decode batches of 1 (to 30 positions) run without graphs" in caplog.text
    assert "CUDA out of memory" in caplog.text
    eager = padded(staged(cut), None, cut, halves, sequences=2)
    for count in (1, 2):
        each = plan(random.Random(count), count)
        assert torch.equal(made.run(each), eager.run(each))


def test_a_table_that_waits_for_the_device_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    """ReferenceTable looks at the ids."""
    with caplog.at_level(logging.WARNING):
        made = padded(tiny.table(), TapeCapture(), cut=False, halves=False, sequences=1)
    assert [type(each) for each in captured(made)] == [Eager]
    assert "is not permitted when a stream is capturing" in caplog.text


def test_a_whole_step_could_be_captured() -> None:
    """Of what a step of single tokens does on the device, nothing waits for it or depends on numbers in shape."""
    made = padded(staged(False), None, cut=False, halves=False)
    assert made.decode is not None
    each = plan(random.Random(5), 5)
    made.run(each)
    (found,) = captured(made)
    with torch.inference_mode(), CapturableOnly():
        found.run()
        with pytest.raises(RuntimeError, match="not permitted"):
            torch.arange(3)[torch.tensor([True, False, True])]
