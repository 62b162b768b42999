"""POST /v1/completions."""

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
from memlane_server.prepare import Prepared, prepare_completion
from memlane_server.protocol.completions import CompletionRequest, choice, completion
from memlane_server.protocol.logprobs import CompletionLogprobs
from memlane_server.streaming import frame, stream, unless_gone

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    body = await read(request, CompletionRequest)
    here = context(request)
    model = here.need_model()
    prepared = await prepare_completion(model, body)
    answer = _Answer(model, body, prepared)
    generation = Generation(answer.id, model, here.client, here.metrics, prepared)
    if body.stream:
        return await stream(request, answer.frames(generation))
    return json_response(await unless_gone(request, answer.whole(generation)))


class _Answer:
    """Shapes the pieces of one request."""

    def __init__(self, model: ServedModel, body: CompletionRequest, prepared: Prepared) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._prepared = prepared
        self._echo = [self._prompt_text(p) if body.echo else "" for p in prepared.prompts]
        choices = len(prepared.prompts) * prepared.params.n
        self._logprobs = [
            CompletionLogprobs(
                model.tokenizer,
                offset=len(self._echo[self._prompt_of(i)]),
                skip_special_tokens=body.skip_special_tokens,
            )
            for i in range(choices)
        ]

    def _prompt_text(self, prompt: list[int]) -> str:
        return self._model.need_tokenizer("echo").decode(prompt)

    def _prompt_of(self, index: int) -> int:
        return index // self._prepared.params.n

    async def whole(self, generation: Generation) -> dict[str, Any]:
        count = len(self._logprobs)
        texts = [[self._echo[self._prompt_of(i)]] for i in range(count)]
        tokens: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        ends: list[Piece | None] = [None] * count
        async for piece in generation.pieces():
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.token_ids
            logprobs[piece.index] += piece.logprobs or []
            if piece.finish_reason is not None:
                ends[piece.index] = piece
        choices = [
            self._choice(i, "".join(texts[i]), tokens[i], logprobs[i], ends[i], first=True)
            for i in range(count)
        ]
        return completion(self.id, self._created, self._model.name, choices, generation.usage.body())

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        started: set[int] = set()
        # aclosing: when the client leaves, the request ends now and not when the generator is collected
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                index, first = piece.index, piece.index not in started
                started.add(index)
                text = self._echo[self._prompt_of(index)] + piece.text if first else piece.text
                if not (text or piece.logprobs or piece.finish_reason or self._body.return_token_ids):
                    continue
                shaped = self._choice(index, text, piece.token_ids, piece.logprobs or [], piece, first=first)
                usage = generation.usage.body() if self._body.wants_running_usage else None
                yield frame(completion(self.id, self._created, self._model.name, [shaped], usage))
        if self._body.wants_usage:
            usage = generation.usage.body()
            yield frame(completion(self.id, self._created, self._model.name, [], usage))

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprobs],
        end: Piece | None,
        *,
        first: bool,
    ) -> dict[str, Any]:
        wanted = self._prepared.params.logprobs is not None
        shaped = choice(
            index,
            text,
            logprobs=self._logprobs[index].add(logprobs) if wanted else None,
            finish_reason=end.finish_reason if end else None,
            stop_reason=end.stop_reason if end else None,
        )
        if self._body.return_token_ids:
            shaped["token_ids"] = token_ids
            shaped["prompt_token_ids"] = self._prepared.prompts[self._prompt_of(index)] if first else None
        return shaped
