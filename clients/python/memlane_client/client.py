"""The client for ordinary code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class MemlaneClient:
    """Talks to one server. Keeps connections open: use it as a context manager, or close() it.

    Methods raise MemlaneError. Further fields of the API (temperature, stop, …) are keyword arguments.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: httpx.Timeout | float = core.TIMEOUT,
    ) -> None:
        self._http = httpx.Client(base_url=base_url, headers=core.headers(api_key), timeout=timeout)

    def __enter__(self) -> MemlaneClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def completion(self, prompt: Prompt, **fields: Any) -> CompletionAnswer:
        """Continue a prompt (or several): text, or token ids."""
        return self._send(core.completion(prompt, fields))

    def stream_completion(self, prompt: Prompt, **fields: Any) -> Iterator[CompletionChunk]:
        """The same, piece by piece. Leaving the loop early cancels the request."""
        return self._stream(core.completion_stream(prompt, fields))

    def chat(self, messages: Messages, **fields: Any) -> ChatAnswer:
        """Answer a conversation: [{"role": "user", "content": "…"}]."""
        return self._send(core.chat(messages, fields))

    def stream_chat(self, messages: Messages, **fields: Any) -> Iterator[ChatChunk]:
        """The same, piece by piece. Leaving the loop early cancels the request."""
        return self._stream(core.chat_stream(messages, fields))

    def models(self) -> list[Model]:
        """The models that the server has."""
        return self._send(core.models()).data

    def tokenize(self, text: str | Messages, **fields: Any) -> Tokens:
        """Token ids of a text or of a conversation."""
        return self._send(core.tokenize(text, fields))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that token ids stand for."""
        return self._send(core.detokenize(tokens)).prompt

    def ready(self) -> bool:
        """Whether the server takes requests now. False also when nobody listens."""
        try:
            core.check(self._request("GET", "/ready"))
        except (Unavailable, ConnectionFailed):
            return False
        return True

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self._http.base_url}: {error}") from error

    def _send(self, call: Call[AnswerT]) -> AnswerT:
        return call.read(self._request(call.method, call.path, call.body))

    def _stream(self, call: Call[AnswerT]) -> Iterator[AnswerT]:
        reader = core.EventReader(call.answer)
        try:
            with self._http.stream(call.method, call.path, json=call.body) as response:
                if not response.is_success:
                    response.read()
                    core.check(response)
                for line in response.iter_lines():
                    if (piece := reader.line(line)) is not None:
                        yield piece
        except httpx.TransportError as error:
            raise ConnectionFailed(f"{self._http.base_url}: {error}") from error
        reader.finish()
