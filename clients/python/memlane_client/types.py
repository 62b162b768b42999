"""Answers of the server. Fields that a newer server adds are kept in `model_extra`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    # `model_` is pydantic's prefix; here `model` and `max_model_len` are the API's names
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class CachedTokens(_Answer):
    cached_tokens: int = 0


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens = CachedTokens()


class CompletionChoice(_Answer):
    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


class CompletionAnswer(_Answer):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of the first choice; empty in a chunk that only brings the usage."""
        return self.choices[0].text if self.choices else ""


class CompletionChunk(CompletionAnswer):
    """New text of one choice."""


class Message(_Answer):
    role: str | None = None
    content: str | None = None


class ChatChoice(_Answer):
    index: int
    message: Message
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None


class ChatAnswer(_Answer):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].message.content or ""


class DeltaChoice(_Answer):
    index: int
    delta: Message
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None


class ChatChunk(_Answer):
    """New text of one choice; the first of a choice carries its role."""

    id: str
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        return (self.choices[0].delta.content or "") if self.choices else ""


class Model(_Answer):
    id: str
    created: int
    max_model_len: int


class ModelList(_Answer):
    data: list[Model]


class Tokens(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(_Answer):
    prompt: str
