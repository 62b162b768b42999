"""One sequence on its way through the engine: its tokens, how many of them are computed, and where their KV lies."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from memlane.request import FinishReason, RequestTiming, SamplingParams

__all__ = ["Finish", "Sequence"]


class Finish(NamedTuple):
    """Why a sequence is over, and the stop token that ended it if it was one the request named."""

    reason: FinishReason
    stop_token_id: int | None = None


class Sequence:
    """A prompt and the tokens generated so far. Compared by identity; owned by the engine's thread.

        token_ids  | prompt ........................ | generated ...... |
        KV         | computed ............ | not yet |
        blocks     | block 0 | block 1 | block 2 | .. |   of block_size tokens each

    A preempted sequence gives up its blocks (`computed` falls to 0) and nothing else: its generated tokens stay,
    and since sampling is a function of (seed, output position) there is no other state to lose.
    """

    def __init__(
        self,
        request_id: str,
        prompt: SequenceOf[int],
        params: SamplingParams,
        *,
        max_length: int,
        eos_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        share_prefix: bool = True,
    ) -> None:
        """max_length: prompt plus answer in tokens; the sequence ends there. share_prefix: may use and fill the
        prefix cache. seed: what draws depend on (the request's own, or one chosen for it)."""
        self.request_id = request_id
        self.token_ids = list(prompt)
        self.prompt_length = len(self.token_ids)
        self.params = params
        self.max_length = max_length
        self.eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = frozenset(params.stop_token_ids)
        self.seed = seed
        self.share_prefix = share_prefix

        self.computed = 0  # tokens whose KV is in `blocks`
        self.blocks: list[int] = []  # only appended to: giving blocks up begins another list
        self.hashes: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed

        self.cached_tokens = 0  # prompt tokens found in the prefix cache when first admitted
        self.preemptions = 0
        self.prompt_tokens_computed = 0
        self.arrived = time.perf_counter()
        self.first_scheduled: float | None = None
        self.first_token: float | None = None

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled: 1 in plain decoding."""
        return len(self.token_ids) - self.computed

    @property
    def output_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    def append(self, token: int) -> Finish | None:
        """Add a sampled token; says whether it was the last one."""
        self.token_ids.append(token)
        if self.first_token is None:
            self.first_token = time.perf_counter()
        if token in self.stop_ids:
            return Finish(FinishReason.STOP, token)
        if token in self.eos_ids:
            return Finish(FinishReason.STOP)
        if len(self.token_ids) >= self.max_length:
            return Finish(FinishReason.LENGTH)
        return None

    def timing(self) -> RequestTiming:
        """Durations up to now, for a sequence that ends now. Phases it never reached last 0 s."""
        now = time.perf_counter()
        scheduled = self.first_scheduled if self.first_scheduled is not None else now
        first = self.first_token if self.first_token is not None else now
        return RequestTiming(
            queue=scheduled - self.arrived,
            prefill=first - scheduled,
            decode=now - first,
            preemptions=self.preemptions,
            prompt_tokens_computed=self.prompt_tokens_computed,
        )

    def __repr__(self) -> str:
        return f"Sequence({self.request_id!r}, {self.prompt_length}+{self.output_length} tokens, {self.computed} computed)"
