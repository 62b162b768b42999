"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from memlane.request import TokenLogprobs
from memlane_server.context import context, json_response, read
from memlane_server.generate import Generation, Piece
from memlane_server.model import ServedModel
from memlane_server.prepare import Prepared, prepare_chat
from memlane_server.protocol.chat import (
    ChatRequest,
    chat_chunk,
    chat_completion,
    delta_choice,
    message_choice,
)
from memlane_server.protocol.logprobs import chat_logprobs
from memlane_server.streaming import frame, stream, unless_gone

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    body = await read(request, ChatRequest)
    here = context(request)
    model = here.need_model()
    prepared = await prepare_chat(model, body)
    answer = _Answer(model, body, prepared)
    generation = Generation(answer.id, model, here.client, here.metrics, prepared)
    if body.stream:
        return await stream(request, answer.frames(generation))
    return json_response(await unless_gone(request, answer.whole(generation)))


class _Answer:
    """Shapes the pieces of one request."""

    def __init__(self, model: ServedModel, body: ChatRequest, prepared: Prepared) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._prepared = prepared

    async def whole(self, generation: Generation) -> dict[str, Any]:
        count = self._prepared.params.n
        texts: list[list[str]] = [[] for _ in range(count)]
        tokens: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        ends: list[Piece | None] = [None] * count
        async for piece in generation.pieces():
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.token_ids
            logprobs[piece.index] += piece.logprobs or []
            if piece.finish_reason is not None:
                ends[piece.index] = piece
        choices = []
        for i, end in enumerate(ends):
            shaped = message_choice(
                i,
                "".join(texts[i]),
                logprobs=self._shape(logprobs[i]),
                finish_reason=end.finish_reason if end else None,
                stop_reason=end.stop_reason if end else None,
            )
            choices.append(shaped | {"token_ids": tokens[i]} if self._body.return_token_ids else shaped)
        body = chat_completion(self.id, self._created, self._model.name, choices, generation.usage.body())
        if self._body.return_token_ids:
            body["prompt_token_ids"] = self._prepared.prompts[0]
        return body

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        started: set[int] = set()
        # aclosing: when the client leaves, the request ends now and not when the generator is collected
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                usage = generation.usage.body() if self._body.wants_running_usage else None
                if piece.index not in started:
                    started.add(piece.index)
                    opening = delta_choice(piece.index, {"role": "assistant", "content": ""})
                    yield self._frame([opening], usage, first=len(started) == 1)
                if piece.text or piece.logprobs or piece.finish_reason or self._body.return_token_ids:
                    yield self._frame([self._delta(piece)], usage)
        if self._body.wants_usage:
            yield self._frame([], generation.usage.body())

    def _delta(self, piece: Piece) -> dict[str, Any]:
        shaped = delta_choice(
            piece.index,
            {"content": piece.text} if piece.text else {},
            logprobs=self._shape(piece.logprobs) if piece.logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )
        return shaped | {"token_ids": piece.token_ids} if self._body.return_token_ids else shaped

    def _frame(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, *, first: bool = False
    ) -> bytes:
        chunk = chat_chunk(self.id, self._created, self._model.name, choices, usage)
        if first and self._body.return_token_ids:
            chunk["prompt_token_ids"] = self._prepared.prompts[0]
        return frame(chunk)

    def _shape(self, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._prepared.params.logprobs is None:
            return None
        return chat_logprobs(self._model.tokenizer, logprobs)
