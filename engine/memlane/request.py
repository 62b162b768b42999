"""What a caller asks of the engine, and what it gets back: plain structs that travel over the wire.

Nothing here knows about text, tensors or HTTP. Token ids in, token ids out.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import msgspec

from memlane.errors import ErrorKind, RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop. Names and meanings are those of the OpenAI API and vLLM.

    Raises RequestError on values that make no sense; nothing is silently clamped.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the model's context leaves room for
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: list[str] = msgspec.field(default_factory=list)  # searched in text, by whoever holds the text
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # log-probabilities of the chosen token and this many of the best
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        # A convenience of the offline API: one stop string need not be wrapped in a list.
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        elif self.stop is None:
            msgspec.structs.force_setattr(self, "stop", [])
        _check_numbers(self)
        _check_stops(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def for_choice(self, index: int) -> SamplingParams:
        """The parameters of choice `index` of `n`: one sequence, its own seed, so that choices differ."""
        seed = None if self.seed is None else (self.seed + index) % (MAX_SEED + 1)
        return msgspec.structs.replace(self, n=1, seed=seed)


def _check_numbers(p: SamplingParams) -> None:
    _int_in(p.n, "n", 1, 128)
    if p.max_tokens is not None:
        _int_in(p.max_tokens, "max_tokens", 1, 2**31)
    _int_in(p.min_tokens, "min_tokens", 0, 2**31 if p.max_tokens is None else p.max_tokens)
    _float_in(p.temperature, "temperature", 0.0, 2.0)
    _float_in(p.top_p, "top_p", 0.0, 1.0)
    if p.top_p == 0.0:
        raise RequestError("top_p must be greater than 0 and at most 1", param="top_p")
    _int_in(p.top_k, "top_k", -1, 2**31)
    _float_in(p.min_p, "min_p", 0.0, 1.0)
    _float_in(p.repetition_penalty, "repetition_penalty", 0.01, 100.0)
    _float_in(p.presence_penalty, "presence_penalty", -2.0, 2.0)
    _float_in(p.frequency_penalty, "frequency_penalty", -2.0, 2.0)
    if p.seed is not None:
        _int_in(p.seed, "seed", 0, MAX_SEED)
    if p.logprobs is not None:
        _int_in(p.logprobs, "logprobs", 0, MAX_LOGPROBS)
    for token, bias in (p.logit_bias or {}).items():
        _int_in(token, "logit_bias", 0, 2**31)
        _float_in(bias, "logit_bias", -100.0, 100.0)


def _check_stops(p: SamplingParams) -> None:
    if not isinstance(p.stop, list) or not all(isinstance(s, str) for s in p.stop):
        raise RequestError("stop must be a string or a list of strings", param="stop")
    if len(p.stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(p.stop)}", param="stop")
    if any(not s for s in p.stop):
        raise RequestError("stop strings must not be empty", param="stop")
    for token in p.stop_token_ids:
        _int_in(token, "stop_token_ids", 0, 2**31)


def _int_in(value: Any, name: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, got {value!r}", param=name)


def _float_in(value: Any, name: str, low: float, high: float) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}", param=name)


class FinishReason(StrEnum):
    """How an accepted request ended. Exactly one of these is sent for each."""

    STOP = "stop"  # end of text, a stop token id, or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # cancelled by the client or the operator
    ERROR = "error"  # failed; `Failure` says why


class Failure(msgspec.Struct, frozen=True):
    """Why a request failed: the kind decides the HTTP status, the message is for people."""

    kind: ErrorKind
    message: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability (natural log, of the unmodified distribution) of a token, and the best ones beside it."""

    token_id: int
    logprob: float
    rank: int  # 1: the most likely token
    top: list[tuple[int, float]]  # best first


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one sequence since the last delta. The last one carries a finish reason."""

    request_id: str
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token id that ended it, when it was one of stop_token_ids
    failure: Failure | None = None
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache; sent with the first delta
    timing: RequestTiming | None = None  # sent with the last delta


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Durations of one finished request inside the engine, in seconds, and what it cost."""

    queue: float  # accepted to first scheduled
    prefill: float  # first scheduled to first token
    decode: float  # first token to last token
    preemptions: int = 0
    prompt_tokens_computed: int = 0
