"""The engine: sequences in, tokens out, one step at a time. One thread owns it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec
import torch
from torch import Tensor

from memlane import recording, reporting
from memlane.admission import Admission
from memlane.choices import Choices
from memlane.config import EngineConfig
from memlane.errors import ErrorKind, RequestError
from memlane.ipc import Add, Stats
from memlane.launch import Launch
from memlane.models.loading import LoadedModel
from memlane.request import Failure, FinishReason, SamplingParams, TokenDelta, TokenLogprobs
from memlane.runner import DecodeSplit, KVCache, Runner
from memlane.runner.graphs import CudaCapture
from memlane.runner.random_numbers import derive_seed
from memlane.scheduler import Scheduler, Sequence, StepPlan
from memlane.starting import start
from memlane.tables import RowReadError
from memlane.warming import WarmStart

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

_NOT_FINITE = Failure(ErrorKind.INTERNAL, "the model's output is not finite (NaN or infinity)")


class Engine:
    """A loaded model and the sequences it works on.

    Every sequence that `add` accepts ends in exactly one delta with a finish reason, out of `step`, `abort` or
    `fail_all`.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel | None = None) -> None:
        """Load the model that config names; a `model` already loaded is taken as it is, and owned from now on.

        Raises CheckpointError, ConfigError.
        """
        recording.check(config)
        choices = Choices(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model, attention, kv = start(config, choices, model)
        self.config = config
        weights = self.model.transformer.embed.weight
        self.device = weights.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton, events and captures take the current one
        self.max_model_len = kv.max_model_len
        self.choices = choices.lines
        self.scheduler = Scheduler(
            blocks=kv.blocks,
            block_size=choices.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.prefix_caching,
        )
        cache = KVCache(self.model.config, kv.blocks, choices.block_size, weights.dtype, self.device)
        self.decode_split = DecodeSplit(self._stall_seconds)
        self.runner = Runner(
            self.model.transformer, cache, self.decode_split.wanted, attention, self._most_half()
        )
        if self.device.type == "cuda":
            self._prepare_gpu(choices)
        self.sequences: dict[str, Sequence] = {}  # accepted and not ended
        self._outbox: list[TokenDelta] = []  # of the step under way: survives an exception in its middle
        self.lookahead = choices.lookahead(self.device)
        self._outstanding: Launch | None = None  # given to the device, not collected
        self.steps = self.last_step_tokens = 0
        self._accepted = self._prompt_tokens = self._generation_tokens = 0
        eos_ids = frozenset(self.model.config.eos_token_ids)
        self._admission = Admission(self.model.config.vocab_size, self.max_model_len, eos_ids)
        self._warm_start = WarmStart(config, self.model)
        self._recorder = recording.start(
            config, self.model
        )  # last: it makes a file, which a failed start must not leave

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended, or that ended in a step that is still under way."""
        return len(self.sequences) + len(self.scheduler.retired)

    def step(self) -> list[TokenDelta]:
        """Compute one batch. Returns the new tokens, and the ends of sequences that finished or failed.

        With lookahead the tokens are those of the batch before: see memlane.launch.
        """
        self._warm_start.advance(
            0.0
        )  # takes in what has come and asks for more, which is read during the step
        # Whose blocks are taken must not be computing: see `_retire`. And an end may spare it.
        if self._outstanding is not None and (self._outstanding.holds_up or self.scheduler.preempts):
            self._collect()
        plan = self.scheduler.schedule()
        with self.decode_split.watch(plan):
            launch = self._launch(plan)
            if self.lookahead:
                self._collect(launch)  # from one launch to the next it takes as long as the step before does
        self._book(launch)
        if not self.lookahead:
            self._collect()
        return self._take_outbox()

    def add(self, request: Add) -> None:
        """Accept a sequence. Raises RequestError if it cannot be served as asked; nothing has changed then."""
        if request.request_id in self.sequences:
            raise RequestError(f"request id {request.request_id!r} is in use")
        self._admission.check(request)
        params, prompt = request.params, request.prompt_token_ids
        answer = self.max_model_len if params.max_tokens is None else params.max_tokens
        sequence = Sequence(
            request.request_id,
            prompt,
            params,
            max_length=min(len(prompt) + answer, self.max_model_len),
            eos_ids=self._admission.eos_ids,
            seed=derive_seed(self.config.seed, self._accepted) if params.seed is None else params.seed,
        )
        self.scheduler.add(sequence)
        self.sequences[request.request_id] = sequence
        self._accepted += 1

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """End these sequences now, if they are still alive."""
        alive = [self.sequences[name] for name in request_ids if name in self.sequences]
        ended = list(dict.fromkeys(alive))
        for sequence in ended:
            self._retire(sequence)
        return [_last(sequence, FinishReason.ABORT) for sequence in ended]

    def fail_all(self, message: str) -> list[TokenDelta]:
        """After an error nobody foresaw: fail everything in flight and forget all computed state."""
        failure = Failure(ErrorKind.INTERNAL, message)
        self._outstanding = None
        self._abandon_rows()
        self._outbox += [self._fail(sequence, failure) for sequence in list(self.sequences.values())]
        for sequence in list(self.scheduler.retired):
            self.scheduler.finish(sequence)
        self.scheduler.pool.drop_cached()
        self.runner.clear(range(self.scheduler.pool.total))
        return self._take_outbox()

    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits after every token of a sequence, fp32 [T, vocab], computed in chunks as in serving.

        Needs an idle engine (RuntimeError otherwise). Raises RequestError, and RowReadError if rows cannot be read.
        """
        if self.sequences:
            raise RuntimeError("logits needs an idle engine")
        self._collect()
        self._admission.check_tokens(token_ids)
        if len(token_ids) > self.max_model_len:
            raise RequestError(
                f"{len(token_ids)} tokens; at most {self.max_model_len}", kind=ErrorKind.CONTEXT_LENGTH
            )
        sequence = Sequence(
            "logits", token_ids, SamplingParams(), max_length=len(token_ids) + 1, share_prefix=False
        )
        self.scheduler.add(sequence)
        parts = []
        try:
            while sequence.remaining:
                plan = self.scheduler.schedule()
                parts.append(self.runner.run(plan, all_logits=True))
                self.scheduler.commit(plan.chunks[0])
                self._count(plan)
        finally:
            self.scheduler.finish(sequence, discard=True)
        return torch.cat(parts)

    def stats(self) -> Stats:
        """A snapshot, cheap and without effect; any thread may ask. `step_tokens` is left for the caller to fill."""
        s = self.scheduler.stats()
        return Stats(
            running=s.running,
            waiting=s.waiting,
            kv_blocks_used=s.blocks_used,
            kv_blocks_total=s.blocks_total,
            prefix_cache_queries=s.prefix_queries,
            prefix_cache_hits=s.prefix_hits,
            preemptions=s.preemptions,
            steps=self.steps,
            step_tokens=[],
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            tables=[reporting.table_stats(tier) for t in self.model.tables.values() for tier in t.tiers()],
            resident_bytes=reporting.resident_bytes(),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if the books are wrong. For tests, and after an error nobody foresaw."""
        self.scheduler.check_integrity()
        members = {*self.scheduler.running, *self.scheduler.waiting}
        assert members == set(self.sequences.values()), "scheduler and engine disagree on who is alive"

    def use_idle_time(self, patience: float) -> bool:
        """Do what can wait until nothing else is to be done, for about `patience` seconds; whether more is left."""
        more = self._warm_start.advance(patience)
        if not more:
            self._warm_start.save_now_and_then()
        return more

    def close(self) -> None:
        """Close the model's tables, and the record of rows; save what the row caches held for the next start."""
        self._warm_start.save()
        if self._recorder is not None:
            self._recorder.close()
        if self.device.type == "cuda":
            # A step whose sequences ended meanwhile may still read rows. Last: after a fault of the GPU it raises.
            torch.cuda.synchronize(self.device)
        self.model.close()

    def _launch(self, plan: StepPlan) -> Launch:
        """Start the plan. Sequences that need rows that cannot be read fail; the others are started without them."""
        while True:
            try:
                return Launch.start(self.runner, plan, self._outstanding)
            except RowReadError as error:
                logger.error("%s", error)
                self._abandon_rows()
                # First what came before: a sequence that ended there needs no rows, and others are due a token.
                self._collect()
                failure = Failure(ErrorKind.ROWS_UNREADABLE, str(error))
                lost = [sequence for sequence in plan.owners(error.tokens) if self._alive(sequence)]
                self._outbox += [self._fail(sequence, failure) for sequence in lost]
                plan = plan.without({c.sequence for c in plan.chunks if not self._alive(c.sequence)})

    def _collect(self, following: Launch | None = None) -> None:
        """Take in the results of the step that is outstanding, if one is; then `following` is. Waits for the device."""
        launch, self._outstanding = self._outstanding, following
        if launch is None:
            return
        for chunk, sampled in zip(launch.plan.chunks, launch.pending.result(), strict=True):
            sequence, finite = chunk.sequence, sampled.token_id is not None
            if sequence in self.scheduler.retired:
                freed = self.scheduler.finish(sequence, discard=not finite)
                self.runner.clear([] if finite else freed)
            elif not self._alive(sequence):
                continue  # it failed in the step before
            elif sampled.token_id is None:
                # Also in the middle of a prompt, lest what it leaves behind reaches other sequences.
                self._outbox.append(self._fail(sequence, _NOT_FINITE))
            elif chunk.samples:
                self._outbox.append(self._advance(sequence, sampled.token_id, sampled.logprobs))

    def _book(self, launch: Launch) -> None:
        """A step is under way: what it computes counts as computed, and its tokens are expected."""
        for row, chunk in enumerate(launch.plan.chunks):
            if self._alive(chunk.sequence):
                # Others may find blocks by their content from now on, before it is known to be finite. Should it not
                # be, they fail like their owner, as if they had computed it.
                self.scheduler.commit(chunk)
                if chunk.samples:
                    chunk.sequence.expect(row)
        self._count(launch.plan)
        self._outstanding = launch if self.unfinished else None

    def _alive(self, sequence: Sequence) -> bool:
        """Whether it has not ended. Its name may be another's by now."""
        return self.sequences.get(sequence.request_id) is sequence

    def _prepare_gpu(self, choices: Choices) -> None:
        """Compile dense parts and kernels, and capture decode steps."""
        config = self.config
        self.model.transformer.fuse()
        self.runner.warm_up(config.max_num_batched_tokens, self.max_model_len)
        if config.record_rows is not None:
            choices.note("CUDA graphs: off (what they read, padding included, is not to be recorded)")
        else:
            placements = {table.placement for table in self.model.tables.values()}
            self.runner.pad_decodes(
                config.max_num_seqs,
                self.max_model_len,
                CudaCapture(self.device) if choices.graphs() else None,
                cut="disk" in placements,
                halves=bool(placements & {"host", "disk"}),
                split=self.decode_split.wanted,
            )
        torch.cuda.synchronize(self.device)
        for table in self.model.tables.values():
            table.start_counting()

    def _most_half(self) -> int | None:
        """Tokens of one half of a step: two lookups of a table can be open only if each takes its ids in one part."""
        memory = self.model.config.memory
        limits = [t.most_ids for t in self.model.tables.values() if t.most_ids is not None]
        return min(limits) // memory.rows_per_token if limits and memory is not None else None

    def _abandon_rows(self) -> None:
        """A step broke off: another half of it may have taken slots for rows that nobody will bring."""
        for table in self.model.tables.values():
            table.abandon()

    def _stall_seconds(self) -> float:
        return sum(table.stall_seconds for table in self.model.tables.values())

    def _take_outbox(self) -> list[TokenDelta]:
        taken, self._outbox = self._outbox, []
        return taken

    def _count(self, plan: StepPlan) -> None:
        self.steps += bool(plan.chunks)
        self.last_step_tokens = plan.tokens
        for table in self.model.tables.values():
            table.note_tokens(plan.tokens)
        self._prompt_tokens += plan.prompt_tokens

    def _advance(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenDelta:
        """Give a sequence its token; end it if that was the last."""
        self._generation_tokens += 1
        first = sequence.first_token is None
        finish = sequence.append(token_id)
        delta = TokenDelta(
            request_id=sequence.request_id,
            token_ids=[token_id],
            logprobs=None if logprobs is None else [logprobs],
            cached_tokens=sequence.cached_tokens if first else None,
        )
        if finish is None:
            return delta
        self._retire(sequence)
        return msgspec.structs.replace(
            delta,
            finish_reason=finish.reason,
            stop_token_id=finish.stop_token_id,
            timing=sequence.timing(),
        )

    def _fail(self, sequence: Sequence, failure: Failure) -> TokenDelta:
        """End a sequence that failed; nothing it computed may be shared or left behind non-finite."""
        del self.sequences[sequence.request_id]
        self.runner.clear(self.scheduler.finish(sequence, discard=True))
        return _last(sequence, FinishReason.ERROR, failure)

    def _retire(self, sequence: Sequence) -> None:
        """A sequence ends well. What a step under way still computes for it nobody gets to see, but until it is known to
        be finite nobody else may get the blocks it lies in."""
        del self.sequences[sequence.request_id]
        if self._outstanding is not None and self._outstanding.computes(sequence):
            self.scheduler.retire(sequence)
        else:
            self.scheduler.finish(sequence)


def _last(sequence: Sequence, reason: FinishReason, failure: Failure | None = None) -> TokenDelta:
    """A delta that ends a sequence without a token."""
    return TokenDelta(
        request_id=sequence.request_id, finish_reason=reason, failure=failure, timing=sequence.timing()
    )
