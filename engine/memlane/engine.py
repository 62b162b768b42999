"""The engine: sequences in, tokens out, one step at a time. One thread owns it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memlane import recording, reporting
from memlane.checkpoints import resolve
from memlane.choices import Choices, available_memory
from memlane.config import EngineConfig
from memlane.errors import ErrorKind, RequestError
from memlane.ipc import Add, Stats
from memlane.models.loading import LoadedModel, TableOptions, load_model, table_bytes
from memlane.request import Failure, FinishReason, SamplingParams, TokenDelta
from memlane.runner import DecodeSplit, KVCache, Runner, Sampled, sample
from memlane.runner.graphs import CudaCapture
from memlane.runner.random_numbers import derive_seed
from memlane.scheduler import Scheduler, Sequence, StepPlan
from memlane.tables import RowReadError
from memlane.warming import WarmStart

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

_NOT_FINITE = Failure(ErrorKind.INTERNAL, "the model's output is not finite (NaN or infinity)")


class _Computed(NamedTuple):
    """A step that ran: its plan without the sequences that failed, and logits [chunks, vocab] after each chunk."""

    plan: StepPlan
    logits: Tensor


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
        self.model = model or _load(config, choices)
        self.config = config
        self.device = self.model.transformer.embed.weight.device
        dtype = self.model.transformer.embed.weight.dtype
        attention = choices.attention(self.model.config, dtype, self.device)
        kv = choices.kv_size(self.model.config, dtype, available_memory())
        self.max_model_len = kv.max_model_len
        self.choices = choices.lines
        self.scheduler = Scheduler(
            blocks=kv.blocks,
            block_size=choices.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.prefix_caching,
        )
        cache = KVCache(self.model.config, kv.blocks, choices.block_size, dtype, self.device)
        self.decode_split = DecodeSplit(self._stall_seconds)
        self.runner = Runner(self.model.transformer, cache, self.decode_split.wanted, attention)
        if self.device.type == "cuda":
            self.model.transformer.fuse()
            on_disk = any(table.placement == "disk" for table in self.model.tables.values())
            capture = CudaCapture(self.device) if config.cuda_graphs else None
            self.runner.pad_decodes(
                config.max_num_seqs, kv.max_model_len, capture, cut=on_disk, halves=on_disk
            )
        self.sequences: dict[str, Sequence] = {}  # accepted and not ended
        self._outbox: list[TokenDelta] = []  # of the step under way: survives an exception in its middle
        self.steps = self.last_step_tokens = 0
        self._accepted = self._prompt_tokens = self._generation_tokens = 0
        self._eos_ids = frozenset(self.model.config.eos_token_ids)
        self._warm_start = WarmStart(config, self.model)
        self._recorder = recording.start(
            config, self.model
        )  # last: it makes a file, which a failed start must not leave

    @property
    def unfinished(self) -> int:
        """Sequences that were accepted and have not ended."""
        return len(self.sequences)

    def step(self) -> list[TokenDelta]:
        """Compute one batch. Returns the new tokens, and the ends of sequences that finished or failed."""
        self._warm_start.advance(
            0.0
        )  # takes in what has come and asks for more, which is read during the step
        plan, logits = self._compute(self.scheduler.schedule())
        rows = [row for row, chunk in enumerate(plan.chunks) if chunk.samples]
        partial = len(rows) < len(plan.chunks)
        sampling = [plan.chunks[row].sequence for row in rows]
        sampled = sample(logits[rows] if partial else logits, sampling)
        self._commit(plan)
        if partial:
            self._check_partial(plan, logits)
        self._outbox += map(self._advance, sampling, sampled)
        return self._take_outbox()

    def add(self, request: Add) -> None:
        """Accept a sequence. Raises RequestError if it cannot be served as asked; nothing has changed then."""
        self._check(request)
        params, prompt = request.params, request.prompt_token_ids
        answer = self.max_model_len if params.max_tokens is None else params.max_tokens
        sequence = Sequence(
            request.request_id,
            prompt,
            params,
            max_length=min(len(prompt) + answer, self.max_model_len),
            eos_ids=self._eos_ids,
            seed=derive_seed(self.config.seed, self._accepted) if params.seed is None else params.seed,
        )
        self.scheduler.add(sequence)
        self.sequences[request.request_id] = sequence
        self._accepted += 1

    def abort(self, request_ids: Iterable[str]) -> list[TokenDelta]:
        """End these sequences now, if they are still alive."""
        alive = [self.sequences[name] for name in request_ids if name in self.sequences]
        return [self._end(sequence, FinishReason.ABORT) for sequence in dict.fromkeys(alive)]

    def fail_all(self, message: str) -> list[TokenDelta]:
        """After an error nobody foresaw: fail everything in flight and forget all computed state."""
        failure = Failure(ErrorKind.INTERNAL, message)
        self._outbox += [self._fail(sequence, failure) for sequence in list(self.sequences.values())]
        self.scheduler.pool.drop_cached()
        self.runner.clear(range(self.scheduler.pool.total))
        return self._take_outbox()

    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits after every token of a sequence, fp32 [T, vocab], computed in chunks as in serving.

        Needs an idle engine (RuntimeError otherwise). Raises RequestError, and RowReadError if rows cannot be read.
        """
        if self.sequences:
            raise RuntimeError("logits needs an idle engine")
        self._check_tokens(token_ids)
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
                self._commit(plan)
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
            tables=[reporting.table_stats(table.stats()) for table in self.model.tables.values()],
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
        self.model.close()

    def _compute(self, plan: StepPlan) -> _Computed:
        """Run the plan. Sequences that need rows that cannot be read fail; the others run again without them."""
        while plan.chunks:
            try:
                with self.decode_split.watch(plan):
                    return _Computed(plan, self.runner.run(plan))
            except RowReadError as error:
                logger.error("%s", error)
                lost = _owners(plan, error.tokens)
                failure = Failure(ErrorKind.ROWS_UNREADABLE, str(error))
                self._outbox += [self._fail(sequence, failure) for sequence in lost]
                plan = plan.without(set(lost))
        return _Computed(plan, torch.empty(0, 0))

    def _stall_seconds(self) -> float:
        return sum(table.stall_seconds for table in self.model.tables.values())

    def _check_partial(self, plan: StepPlan, logits: Tensor) -> None:
        """Fail prompts that went wrong before their end, lest what they leave behind reaches other sequences."""
        for chunk, finite in zip(plan.chunks, torch.isfinite(logits.sum(-1)).tolist(), strict=True):
            if not chunk.samples and not finite:
                self._outbox.append(self._fail(chunk.sequence, _NOT_FINITE))

    def _take_outbox(self) -> list[TokenDelta]:
        taken, self._outbox = self._outbox, []
        return taken

    def _commit(self, plan: StepPlan) -> None:
        """Book a step that was computed."""
        for chunk in plan.chunks:
            self.scheduler.commit(chunk)
        self.steps += 1
        self.last_step_tokens = plan.tokens
        self._prompt_tokens += plan.prompt_tokens

    def _advance(self, sequence: Sequence, sampled: Sampled) -> TokenDelta:
        """Give a sequence its token; end it if that was the last."""
        if sampled.token_id is None:
            return self._fail(sequence, _NOT_FINITE)
        self._generation_tokens += 1
        first = sequence.first_token is None
        finish = sequence.append(sampled.token_id)
        token_ids = [sampled.token_id]
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        cached = sequence.cached_tokens if first else None
        if finish is None:
            return TokenDelta(
                request_id=sequence.request_id, token_ids=token_ids, logprobs=logprobs, cached_tokens=cached
            )
        self._release(sequence)
        return TokenDelta(
            request_id=sequence.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            cached_tokens=cached,
            finish_reason=finish.reason,
            stop_token_id=finish.stop_token_id,
            timing=sequence.timing(),
        )

    def _fail(self, sequence: Sequence, failure: Failure) -> TokenDelta:
        """End a sequence that failed; nothing it computed may be shared or left behind non-finite."""
        self.runner.clear(self._release(sequence, discard=True))
        return _last(sequence, FinishReason.ERROR, failure)

    def _end(self, sequence: Sequence, reason: FinishReason) -> TokenDelta:
        self._release(sequence)
        return _last(sequence, reason)

    def _release(self, sequence: Sequence, *, discard: bool = False) -> list[int]:
        del self.sequences[sequence.request_id]
        return self.scheduler.finish(sequence, discard=discard)

    def _check(self, request: Add) -> None:
        params, prompt = request.params, request.prompt_token_ids
        if params.n != 1:
            raise RequestError("the engine takes one sequence at a time; n must be 1", param="n")
        if request.request_id in self.sequences:
            raise RequestError(f"request id {request.request_id!r} is in use")
        self._check_tokens(prompt)
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with room for one more, the model's context of "
                f"{self.max_model_len} takes at most {self.max_model_len - 1}",
                param="prompt",
                kind=ErrorKind.CONTEXT_LENGTH,
            )
        vocab = self.model.config.vocab_size
        for token in params.logit_bias or ():
            if token >= vocab:
                raise RequestError(
                    f"logit_bias: {token} is not in the vocabulary of {vocab}", param="logit_bias"
                )
        ends = self._eos_ids.union(params.stop_token_ids)
        if params.min_tokens and sum(token < vocab for token in ends) >= vocab:
            raise RequestError("min_tokens forbids every token of the vocabulary", param="min_tokens")

    def _check_tokens(self, token_ids: list[int]) -> None:
        vocab = self.model.config.vocab_size
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if not (min(token_ids) >= 0 and max(token_ids) < vocab):
            bad = next(token for token in token_ids if not 0 <= token < vocab)
            raise RequestError(f"token id {bad} is not in the vocabulary of {vocab}", param="prompt")


def _load(config: EngineConfig, choices: Choices) -> LoadedModel:
    directory = resolve(Path(config.model), tokenizer=config.tokenizer)
    size = table_bytes(directory)
    tables = TableOptions(
        placement=choices.placement(size, available_memory()),
        cache_bytes=choices.cache_bytes(size),
        policy=config.cache_policy,
        io=config.table_io,
        deadline=config.read_timeout,
    )
    return load_model(
        directory,
        tables=tables,
        dtype=choices.dtype("cpu"),
        tokenizer=config.tokenizer,
    )


def _owners(plan: StepPlan, tokens: list[int]) -> list[Sequence]:
    """The sequences to which these flat tokens of the step belong; all of them where no token is named."""
    wanted = set(tokens)
    owners = []
    begin = 0
    for chunk in plan.chunks:
        if not wanted or not wanted.isdisjoint(range(begin, begin + chunk.length)):
            owners.append(chunk.sequence)
        begin += chunk.length
    return owners


def _last(sequence: Sequence, reason: FinishReason, failure: Failure | None = None) -> TokenDelta:
    """A delta that ends a sequence without a token."""
    return TokenDelta(
        request_id=sequence.request_id, finish_reason=reason, failure=failure, timing=sequence.timing()
    )
