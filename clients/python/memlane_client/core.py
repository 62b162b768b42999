"""What both clients share: which request to send, and how to read what comes back. No input or output here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from memlane_client.errors import ConnectionFailed, MemlaneError, from_body
from memlane_client.types import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    ModelList,
    Text,
    Tokens,
)

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Messages: TypeAlias = Sequence[Mapping[str, Any]]

# An answer may take as long as it takes; everything before it must be quick.
TIMEOUT = httpx.Timeout(10.0, read=600.0)

AnswerT = TypeVar("AnswerT", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[AnswerT]):
    """One request, and the type of its answer or of the pieces of its stream."""

    method: str
    path: str
    answer: type[AnswerT]
    body: dict[str, Any] | None = None

    def read(self, response: httpx.Response) -> AnswerT:
        """Raises ApiError."""
        check(response)
        return _parse(self.answer, response.text)


def headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def completion(prompt: Prompt, fields: dict[str, Any]) -> Call[CompletionAnswer]:
    return Call("POST", "/v1/completions", CompletionAnswer, {"prompt": prompt, **fields})


def completion_stream(prompt: Prompt, fields: dict[str, Any]) -> Call[CompletionChunk]:
    return Call("POST", "/v1/completions", CompletionChunk, {"prompt": prompt, **fields, "stream": True})


def chat(messages: Messages, fields: dict[str, Any]) -> Call[ChatAnswer]:
    return Call("POST", "/v1/chat/completions", ChatAnswer, {"messages": messages, **fields})


def chat_stream(messages: Messages, fields: dict[str, Any]) -> Call[ChatChunk]:
    return Call("POST", "/v1/chat/completions", ChatChunk, {"messages": messages, **fields, "stream": True})


def models() -> Call[ModelList]:
    return Call("GET", "/v1/models", ModelList)


def tokenize(text: str | Messages, fields: dict[str, Any]) -> Call[Tokens]:
    name = "prompt" if isinstance(text, str) else "messages"
    return Call("POST", "/tokenize", Tokens, {name: text, **fields})


def detokenize(tokens: Sequence[int]) -> Call[Text]:
    return Call("POST", "/detokenize", Text, {"tokens": list(tokens)})


def check(response: httpx.Response) -> None:
    """Raises ApiError unless the server agreed. The body must have been read."""
    if response.is_success:
        return
    try:
        body = response.json()
    except ValueError:
        body = None  # not one of ours: a proxy's page, say
    raise from_body(body, response.status_code, response.headers.get("retry-after"))


@dataclass
class EventReader(Generic[AnswerT]):
    """Reads the lines of one stream. `done` once the server has said that it is complete."""

    answer: type[AnswerT]
    done: bool = field(default=False, init=False)
    _data: list[str] = field(default_factory=list, init=False)

    def line(self, line: str) -> AnswerT | None:
        """The piece that this line completes, if it completes one. Raises ApiError for an error in the stream.

        An event ends with an empty line; one that the connection cut off is no event.
        """
        if line.startswith("data:"):
            self._data.append(line.removeprefix("data:").removeprefix(" "))
        if line or not self._data:
            return None  # also: a comment that keeps proxies awake
        data, self._data = "\n".join(self._data), []
        if data == "[DONE]":
            self.done = True
            return None
        if data.startswith('{"error"'):
            raise from_body(json.loads(data), None)
        return _parse(self.answer, data)

    def finish(self) -> None:
        if not self.done:
            raise ConnectionFailed("the stream ended before the answer was complete")


def _parse(kind: type[AnswerT], text: str) -> AnswerT:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise MemlaneError(f"the server's answer is not what this client understands: {error}") from error
