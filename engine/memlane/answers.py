"""Results of the offline API, and how one answer grows out of deltas."""

from __future__ import annotations

from dataclasses import dataclass

from memlane.request import FinishReason, SamplingParams, TokenDelta, TokenLogprobs
from memlane.text.detokenize import Detokenizer
from memlane.text.tokenizer import Tokenizer

__all__ = ["Answer", "CompletionOutput", "Logprob", "RequestOutput"]


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in the model's unmodified distribution. rank 1: the most likely token."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    text: "" where the model has no tokenizer. finish_reason: "stop", "length" or "error". stop_reason: the stop string
    or stop token id that ended it; None for end of text. logprobs: for each token a dict of the token itself and the
    best ones, if asked for; cumulative_logprob: the sum for the tokens themselves. error: why it failed.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt: `params.n` of them. prompt is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Answer:
    """An answer on its way: collects tokens, makes text, notices stop strings."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = None if tokenizer is None else _detokenizer(tokenizer, params)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._error: str | None = None

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def take(self, delta: TokenDelta) -> None:
        """Add what a delta brings. Afterwards the answer may be finished though the delta is not the last."""
        self._token_ids += delta.token_ids
        if self._logprobs is not None:
            self._logprobs += delta.logprobs or []
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_token_id
        if delta.failure is not None:
            self._error = delta.failure.message
        if self._detokenizer is not None:
            ended = delta.finish_reason is FinishReason.STOP
            self._text.append(self._detokenizer.push(delta.token_ids, ended_by_last=ended))
            if self._detokenizer.stopped is not None:
                self._finish_reason, self._stop_reason = FinishReason.STOP, self._detokenizer.stopped
            elif self.finished:
                self._text.append(self._detokenizer.finish())

    def output(self) -> CompletionOutput:
        """The finished answer."""
        assert self._finish_reason is not None, "the answer is not finished"
        logprobs = self._logprobs
        return CompletionOutput(
            index=self._index,
            text="".join(self._text),
            token_ids=self._token_ids,
            finish_reason=self._finish_reason.value,
            stop_reason=self._stop_reason,
            logprobs=None if logprobs is None else [self._named(entry) for entry in logprobs],
            cumulative_logprob=None if logprobs is None else sum(entry.logprob for entry in logprobs),
            error=self._error,
        )

    def _named(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        named = {entry.token_id: Logprob(entry.logprob, entry.rank, self._decode(entry.token_id))}
        for rank, (token, logprob) in enumerate(entry.top, start=1):
            named.setdefault(token, Logprob(logprob, rank, self._decode(token)))
        return named

    def _decode(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)


def _detokenizer(tokenizer: Tokenizer, params: SamplingParams) -> Detokenizer:
    return Detokenizer(
        tokenizer,
        params.stop,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        min_tokens=params.min_tokens,
    )
