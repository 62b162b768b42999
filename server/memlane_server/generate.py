"""From the engine's tokens to the pieces of text that clients see: detokenise, stop strings, usage.

One `Generation` is one HTTP request; it yields `Piece`s of its choices in the order they arrive.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from memlane.errors import ErrorKind, RequestError
from memlane.request import FinishReason, TokenDelta, TokenLogprobs
from memlane.text import Detokenizer
from memlane_server.engine_client import EngineClient
from memlane_server.metrics import Metrics, SequenceRecord
from memlane_server.model import ServedModel
from memlane_server.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of choice `index`, and what belongs to it. The last piece has a finish reason."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class Usage:
    """Tokens of one request so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt index → tokens found in the prefix cache

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Generation:
    """A prepared request in the engine. Iterate once; leaving the iteration early cancels the rest."""

    def __init__(
        self, request_id: str, model: ServedModel, client: EngineClient, metrics: Metrics, prepared: Prepared
    ) -> None:
        """Submits the request: raises RequestError when it is not admitted."""
        self.prepared = prepared
        self.usage = Usage(sum(len(p) for p in prepared.prompts))
        sequences = prepared.sequences()
        try:
            self._stream = client.submit(request_id, sequences)
        except RequestError as error:
            metrics.refused(error.kind)
            raise
        metrics.accepted(prepared.params.n)
        self._texts = [_Text(model, prepared) for _ in sequences]
        self._records = [metrics.sequence(len(s.prompt), s.params) for s in sequences]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises the request's failure (MemlaneError)."""
        reason = "abort"  # if we are left before the end, it is by cancellation
        try:
            async with self._stream as stream:
                async for output in stream:
                    piece = self._piece(output.index, output.delta)
                    if piece.finish_reason is not None:
                        stream.cancel(output.index)  # a stop string: the engine does not know of it
                    yield piece
        except RequestError as error:
            reason = "abort" if error.kind is ErrorKind.CANCELLED else "error"
            raise
        except Exception:
            reason = "error"
            raise
        finally:
            for record in self._records:
                record.finish(reason)  # those that have finished by themselves stay as they are

    def _piece(self, index: int, delta: TokenDelta) -> Piece:
        if delta.finish_reason is FinishReason.ABORT:
            raise RequestError("the request was cancelled", kind=ErrorKind.CANCELLED)
        piece = self._texts[index].push(index, delta)
        if delta.cached_tokens is not None and index % self.prepared.params.n == 0:
            self.usage.cached[index // self.prepared.params.n] = delta.cached_tokens
        self.usage.completion_tokens += len(piece.token_ids)
        record: SequenceRecord = self._records[index]
        record.tokens(len(piece.token_ids))
        if piece.finish_reason is not None:
            record.finish(piece.finish_reason)
        return piece


class _Text:
    """The text of one choice."""

    def __init__(self, model: ServedModel, prepared: Prepared) -> None:
        params = prepared.params
        self._detokenizer = None
        if model.tokenizer is not None:
            self._detokenizer = Detokenizer(
                model.tokenizer,
                params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )

    def push(self, index: int, delta: TokenDelta) -> Piece:
        finish = None if delta.finish_reason is None else delta.finish_reason.value
        if self._detokenizer is None:
            return Piece(index, "", delta.token_ids, delta.logprobs, finish, delta.stop_token_id)
        before = self._detokenizer.token_count
        text = self._detokenizer.push(delta.token_ids, ended_by_last=delta.finish_reason is FinishReason.STOP)
        used = self._detokenizer.token_count - before
        logprobs = None if delta.logprobs is None else delta.logprobs[:used]
        if self._detokenizer.stopped is not None:
            stop = self._detokenizer.stopped
            return Piece(index, text, delta.token_ids[:used], logprobs, "stop", stop)
        if finish is not None:
            text += self._detokenizer.finish()
            if self._detokenizer.stopped is not None:
                return Piece(index, text, delta.token_ids, logprobs, "stop", self._detokenizer.stopped)
        return Piece(index, text, delta.token_ids, logprobs, finish, delta.stop_token_id)
