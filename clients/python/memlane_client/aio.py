"""The client for asyncio. Method for method the same as MemlaneClient."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from memlane_client import core
from memlane_client.core import AnswerT, Call, Messages, Prompt
from memlane_client.errors import ConnectionFailed, Unavailable
from memlane_client.types import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    Model,
    Tokens,
)


class AsyncMemlaneClient:
    """Talks to one server. Keeps connections open: use it with `async with`, or await close().

    Methods raise MemlaneError. Further fields of the API (temperature, stop, …) are keyword arguments.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = core.TIMEOUT,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, headers=core.headers(api_key), timeout=timeout)

    async def __aenter__(self) -> AsyncMemlaneClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def completion(self, prompt: Prompt, **fields: Any) -> CompletionAnswer:
        """Continue a prompt (or several): text, or token ids."""
        return await self._send(core.completion(prompt, fields))

    def stream_completion(self, prompt: Prompt, **fields: Any) -> AsyncIterator[CompletionChunk]:
        """The same, piece by piece. Leaving the loop early cancels the request."""
        return self._stream(core.completion_stream(prompt, fields))

    async def chat(self, messages: Messages, **fields: Any) -> ChatAnswer:
        """Answer a conversation: [{"role": "user", "content": "…"}]."""
        return await self._send(core.chat(messages, fields))

    def stream_chat(self, messages: Messages, **fields: Any) -> AsyncIterator[ChatChunk]:
        """The same, piece by piece. Leaving the loop early cancels the request."""
        return self._stream(core.chat_stream(messages, fields))

    async def models(self) -> list[Model]:
        """The models that the server has."""
        return (await self._send(core.models())).data

    async def tokenize(self, text: str | Messages, **fields: Any) -> Tokens:
        """Token ids of a text or of a conversation."""
        return await self._send(core.tokenize(text, fields))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that token ids stand for."""
        return (await self._send(core.detokenize(tokens))).prompt

    async def ready(self) -> bool:
        """Whether the server takes requests now. False also when nobody listens."""
        try:
            core.check(await self._request("GET", "/ready"))
        except (Unavailable, ConnectionFailed):
            return False
        return True

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self._http.base_url}: {error}") from error

    async def _send(self, call: Call[AnswerT]) -> AnswerT:
        return call.read(await self._request(call.method, call.path, call.body))

    async def _stream(self, call: Call[AnswerT]) -> AsyncIterator[AnswerT]:
        reader = core.EventReader(call.answer)
        try:
            async with self._http.stream(call.method, call.path, json=call.body) as response:
                if not response.is_success:
                    await response.aread()
                    core.check(response)
                async for line in response.aiter_lines():
                    if (piece := reader.line(line)) is not None:
                        yield piece
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self._http.base_url}: {error}") from error
        reader.finish()
