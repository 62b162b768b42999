"""Continuous batching by token budget: each step gives every running sequence a number of tokens.

There are no phases. A decode is one token, a prefill is what is left of the budget, and a step mixes both:

    waiting (FIFO) ── admitted when all its tokens get KV blocks ──► running (oldest first) ──► finished
         ▲                                                              │
         └──────────── preempted: the youngest, when a decode needs a block and none is left

The order of arrival is kept throughout: every running sequence is older than every waiting one.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from memlane.errors import ErrorKind, RequestError
from memlane.scheduler.blocks import BlockPool
from memlane.scheduler.plan import Chunk, StepPlan, make_plan
from memlane.scheduler.prefix import extend_hashes
from memlane.scheduler.queue import WaitingQueue
from memlane.scheduler.sequence import Sequence

__all__ = ["Scheduler", "SchedulerStats"]


class SchedulerStats(NamedTuple):
    """Present state, and counters since start. Prefix cache figures are prompt tokens."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int


class Scheduler:
    """Decides; never computes. One thread owns it.

    Protocol of a step: `schedule`, then for each chunk either `commit` (its KV is written) or `finish` of its
    sequence. A sequence leaves only through `finish`, perhaps after `retire`. Written means that whatever is computed later finds it so: the
    device may still have to do it. Sequences may be scheduled with their newest token expected; it must be known by the
    time the chunk with it is committed.
    """

    def __init__(
        self,
        *,
        blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self.pool = BlockPool(blocks)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_caching = prefix_caching
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # oldest first
        self.retired: list[Sequence] = []  # hold blocks, and do not run any more
        self._prefix_queries = self._prefix_hits = self._preemptions = 0

    @property
    def unfinished(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises RequestError if it could never run, however long it waited."""
        # The last token of a sequence is never computed, so it needs no KV.
        if self._blocks_for(sequence.max_length - 1) > self.pool.total:
            raise RequestError(
                f"{sequence.max_length} tokens do not fit the KV cache of {self.pool.total * self.block_size}",
                kind=ErrorKind.CONTEXT_LENGTH,
            )
        self.waiting.push(sequence)

    @property
    def preempts(self) -> bool:
        """Whether `schedule` would have to take blocks from a sequence."""
        wanting = sum(self._wants_block(sequence) for sequence in self.running)
        return wanting > self.pool.available

    def schedule(self) -> StepPlan:
        """The next step. Single tokens first, so that a prefill cannot starve a decode; then older before younger.

        Empty only if all that is unfinished expects its last token.
        """
        planned: dict[Sequence, Chunk] = {}
        preempted = self._schedule_singles(planned)
        budget = self.max_num_batched_tokens - len(planned)
        for sequence in self.running:
            if budget == 0:
                break
            if sequence not in planned and not sequence.complete:
                budget -= self._plan(planned, sequence, budget)
        if not preempted and self.waiting:
            self._admit(planned, budget)
        return make_plan(list(planned.values()))

    def commit(self, chunk: Chunk) -> None:
        """The chunk's KV is written and good: blocks it filled may be shared from now on."""
        sequence = chunk.sequence
        before = sequence.computed
        assert sequence.token_ids[before + chunk.length - 1] >= 0, f"{sequence}: a placeholder is no token"
        sequence.computed = before + chunk.length
        sequence.prompt_tokens_computed += max(0, min(sequence.computed, sequence.prompt_length) - before)
        full = sequence.computed // self.block_size
        if self.prefix_caching and sequence.share_prefix and full > before // self.block_size:
            extend_hashes(sequence.hashes, sequence.token_ids, full, self.block_size)
            for index in range(before // self.block_size, full):
                self.pool.prefix.insert(sequence.hashes[index], sequence.blocks[index])

    def retire(self, sequence: Sequence) -> None:
        """Schedule a running sequence no more; its blocks are its own until `finish`."""
        self.running.remove(sequence)
        self.retired.append(sequence)

    def finish(self, sequence: Sequence, *, discard: bool = False) -> list[int]:
        """Forget a sequence, running, waiting or retired. discard: nothing it used may stay in the prefix cache.

        Returns the blocks whose content is worthless now.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            (self.retired if sequence in self.retired else self.running).remove(sequence)
        if discard:
            self.pool.withdraw(sequence.blocks)
        freed = self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        return freed

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks_used=self.pool.used,
            blocks_total=self.pool.total,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if books and sequences disagree. Holds between any two calls."""
        self.pool.check_integrity([sequence.blocks for sequence in [*self.running, *self.retired]])
        assert len(self.running) <= self.max_num_seqs, "more sequences run than may"
        for sequence in self.running:
            assert sequence.remaining > 0, f"{sequence} has nothing left to compute"
            assert self._blocks_for(sequence.computed) <= len(sequence.blocks), f"{sequence} lacks blocks"
        for sequence in self.waiting:
            assert not sequence.blocks, f"{sequence} waits, yet holds blocks"
            assert sequence.computed == 0, f"{sequence} waits, yet has computed tokens"
        arrivals = [sequence.arrived for sequence in [*self.running, *self.waiting]]
        assert arrivals == sorted(arrivals), "a younger sequence overtook an older one"

    def _schedule_singles(self, planned: dict[Sequence, Chunk]) -> bool:
        """Plan one token for each sequence that needs just one, preempting younger ones for lack of blocks."""
        preempted = False
        position = 0
        while position < len(self.running) and len(planned) < self.max_num_batched_tokens:
            sequence = self.running[position]
            position += 1
            if not self._is_single(sequence):
                continue
            if self._wants_block(sequence):
                while self.pool.available == 0 and self.running[-1] is not sequence:
                    self._preempt(self.running[-1])
                    preempted = True
                if self.pool.available == 0:
                    self._preempt(sequence)
                    return True
                sequence.blocks += self.pool.allocate(1)
            self._plan(planned, sequence, 1)
        return preempted

    @staticmethod
    def _is_single(sequence: Sequence) -> bool:
        return sequence.remaining == 1 and not sequence.complete

    def _wants_block(self, sequence: Sequence) -> bool:
        """Whether it is to compute a single token, and there is no block for that."""
        full = len(sequence.blocks) * self.block_size <= sequence.computed
        return full and self._is_single(sequence)

    def _preempt(self, victim: Sequence) -> None:
        """Take the youngest sequence's blocks; it will be computed again. Published ones stay cached for that."""
        assert self.running.pop() is victim
        self.pool.release(victim.blocks)
        victim.blocks = []
        victim.computed = 0
        victim.preemptions += 1
        self._preemptions += 1
        self.waiting.push_front(victim)

    def _admit(self, planned: dict[Sequence, Chunk], budget: int) -> None:
        """Start waiting sequences in their order while there are blocks for all their tokens.

        A sequence gets blocks for its whole prompt at once. Admitting it on the first chunk alone would let several
        half-computed prompts preempt each other in a pool that holds only one of them.
        """
        filling = {h for chunk in planned.values() for h in self._fills(chunk)}
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.first()
            shared = self._find_prefix(sequence)
            if len(shared) < len(sequence.hashes) and sequence.hashes[len(shared)] in filling:
                return  # this very step computes its next block: one step later it is there to be shared
            needed = self._blocks_for(len(sequence.token_ids)) - len(shared)
            if needed > self.pool.available - self.pool.idle_among(shared):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.pool.share(shared)
            sequence.blocks = shared + self.pool.allocate(needed)
            sequence.computed = len(shared) * self.block_size
            self._note_admission(sequence)
            budget -= self._plan(planned, sequence, budget)
            filling.update(self._fills(planned[sequence]))

    def _fills(self, chunk: Chunk) -> list[bytes]:
        """Hashes of the prompt blocks that this chunk completes."""
        return chunk.sequence.hashes[
            chunk.start // self.block_size : (chunk.start + chunk.length) // self.block_size
        ]

    @staticmethod
    def _plan(planned: dict[Sequence, Chunk], sequence: Sequence, budget: int) -> int:
        """Plan as many of the sequence's tokens as the budget allows; returns their number."""
        count = min(sequence.remaining, budget)
        planned[sequence] = Chunk(sequence, sequence.computed, count, count == sequence.remaining)
        return count

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks for the beginning of the sequence; at least its last token is left to compute."""
        if not (self.prefix_caching and sequence.share_prefix):
            return []
        usable = (len(sequence.token_ids) - 1) // self.block_size
        extend_hashes(sequence.hashes, sequence.token_ids, usable, self.block_size)
        return self.pool.prefix.find(sequence.hashes[:usable])

    def _note_admission(self, sequence: Sequence) -> None:
        if sequence.first_scheduled is not None:
            return  # a preempted sequence finding its own blocks is no hit
        sequence.first_scheduled = time.perf_counter()
        sequence.cached_tokens = sequence.computed
        if self.prefix_caching and sequence.share_prefix:
            self._prefix_queries += sequence.prompt_length
            self._prefix_hits += sequence.computed

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
