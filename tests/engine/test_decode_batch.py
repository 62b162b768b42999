"""Decode batches in tensors that stay: the numbers of make_batch, whatever blocks and rows went through before."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
import torch

from memlane.request import SamplingParams
from memlane.runner import DecodeBatches, resolve
from memlane.runner.batch import make_batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.scheduler import Chunk, Scheduler, Sequence, StepPlan
from memlane.scheduler.plan import make_plan

ROWS, LONGEST = 6, 40


def check(batches: DecodeBatches, static: DecodeBatch, plan: StepPlan) -> None:
    """Against make_batch; rows beyond the plan are its last one, but for the slot."""
    live, n = len(plan.chunks), static.n
    wanted = make_batch(plan, batches.block_size)
    rows = [*range(live), *[live - 1] * (n - live)]
    assert torch.equal(static.token_ids, wanted.token_ids[rows])
    assert torch.equal(static.positions, wanted.positions[rows])
    assert torch.equal(static.slots[:live], wanted.slots)
    assert static.slots[live:].eq(batches.sink).all()
    assert static.lengths.tolist() == [wanted.lengths[row] for row in rows]
    width = static.tables.shape[1]
    assert static.tables.tolist() == [
        blocks + blocks[-1:] * (width - len(blocks)) for blocks in (wanted.blocks[row] for row in rows)
    ]
    assert np.array_equal(static.host_lengths, static.lengths)
    assert np.array_equal(static.host_tables, static.tables)


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules(seed: int) -> None:
    """A pool that is too small, so that blocks change hands; sequences that come, leave, and are preempted."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 3, 4, 16])
    total = 2 * -(-LONGEST // block_size)
    scheduler = Scheduler(
        blocks=total,
        block_size=block_size,
        max_num_seqs=ROWS,
        max_num_batched_tokens=16,
        prefix_caching=rng.random() < 0.5,
    )
    batches = DecodeBatches(ROWS, LONGEST, block_size, total * block_size)
    batches._device_tables.fill_(-1)  # what is not sent is not seen
    decodes = added = preemptions = 0
    while decodes < 150:
        if scheduler.unfinished < ROWS and rng.random() < 0.3:
            added += 1
            length = rng.randint(1, LONGEST // 2)
            scheduler.add(
                Sequence(f"s{added}", tiny.prompt(length, added % 3), SamplingParams(), max_length=LONGEST)
            )
        plan = scheduler.schedule()
        if plan.singles:
            singles = make_plan(plan.chunks[: plan.singles])
            n = rng.randint(plan.singles, ROWS)
            longest = batches.fill(singles, n)
            assert longest == max(chunk.start for chunk in singles.chunks) + 1
            check(batches, batches.batch(n), singles)
            check(batches, batches.batch(n, rng.randint(longest, LONGEST)), singles)
            decodes += 1
        for chunk in plan.chunks:
            scheduler.commit(chunk)
            if chunk.samples and (
                chunk.sequence.append(rng.randrange(tiny.VOCAB)) is not None or rng.random() < 0.03
            ):
                preemptions += chunk.sequence.preemptions
                scheduler.finish(chunk.sequence, discard=rng.random() < 0.2)
    assert added > 5
    assert preemptions or seed


def sequence(blocks: list[int], length: int) -> Sequence:
    made = Sequence("s", tiny.prompt(length), SamplingParams(), max_length=LONGEST)
    made.blocks = blocks
    return made


def test_only_what_changed_is_written_and_sent() -> None:
    batches = DecodeBatches(3, LONGEST, 4, 99)
    a, b = sequence([7, 8], 8), sequence([3], 4)
    batches.fill(make_plan([Chunk(a, 3, 1, True), Chunk(b, 2, 1, True)]), 2)
    assert batches.batch(2).tables[:, :3].tolist() == [[7, 7, 7], [3, 3, 3]]
    batches._device_tables.fill_(-1)
    batches.tables.fill(-2)
    batches.fill(make_plan([Chunk(a, 4, 1, True), Chunk(b, 3, 1, True)]), 2)
    assert batches.batch(2).tables[:, :3].tolist() == [[-2, 8, 8], [-1, -1, -1]]  # one block was appended


def test_tokens_that_are_not_known_yet() -> None:
    batches = DecodeBatches(4, LONGEST, 4, 99)
    known, later = sequence([0], 3), sequence([1], 3)
    placeholder = sequence([2], 3)
    placeholder.token_ids[2] = -1
    later.expect(1)
    plan = make_plan([Chunk(s, p, 1, True) for s, p in ((known, 2), (later, 3), (placeholder, 2))])
    batches.fill(plan, 4)
    ids = batches.batch(4).token_ids
    assert ids.tolist() == [known.token_ids[2], -2, -1, -1]
    for dtype in (torch.int32, torch.int64):
        got = resolve(ids, torch.tensor([50, 51], dtype=dtype))
        assert got.tolist() == [known.token_ids[2], 51, 50, 50]
        assert got.dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_resolving_is_a_choice_token_by_token(seed: int) -> None:
    rng = random.Random(seed)
    previous = [rng.randrange(1000) for _ in range(rng.randint(1, 9))]
    ids = [rng.choice([rng.randrange(1000), -1 - rng.randrange(len(previous))]) for _ in range(20)]
    got = resolve(torch.tensor(ids), torch.tensor(previous))
    assert got.tolist() == [token if token >= 0 else previous[-token - 1] for token in ids]


def test_batches_are_views_of_the_same_rows() -> None:
    batches = DecodeBatches(4, 10, 4, 99)
    two, four = batches.batch(2), batches.batch(4)
    assert batches.batch(2) is two
    assert batches.batch(2, 4) is not two
    assert [batches.batch(1, longest).tables.shape[1] for longest in (1, 4, 5, 10)] == [1, 1, 2, 3]
    for name in ("token_ids", "positions", "slots", "lengths", "tables"):
        assert getattr(two, name).data_ptr() == getattr(four, name).data_ptr()
    with pytest.raises(AssertionError, match="3 chunks into 2"):
        batches.fill(make_plan([Chunk(sequence([0], 3), 1, 1, True)] * 3), 2)
    with pytest.raises(AssertionError, match="1 chunks, of which 0"):
        batches.fill(make_plan([Chunk(sequence([0], 3), 0, 2, True)]), 2)
