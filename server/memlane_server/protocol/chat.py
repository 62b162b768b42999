"""POST /v1/chat/completions: the request, and the objects it is answered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from memlane.errors import RequestError
from memlane.request import MAX_LOGPROBS
from memlane_server.protocol.parsing import RequestBody
from memlane_server.protocol.sampling import GenerationRequest


class TextPart(RequestBody):
    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    """One turn. An answer may be sent back as it was received: its empty extra fields are dropped."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    def flat(self, index: int) -> dict[str, Any]:
        """The message as chat templates expect it: content is one string. Raises RequestError."""
        for name, value in (self.model_extra or {}).items():
            if value:
                raise RequestError(
                    f"messages.{index}: {name[:64]} is not supported; leave it out", param="messages"
                )
        if self.content is None and self.role != "assistant":
            raise RequestError(f"messages.{index}: content is missing", param="messages")
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(p.text for p in parts)
        flat = {"role": self.role, "content": content}
        return flat if self.name is None else flat | {"name": self.name}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatRequest(GenerationRequest):
    messages: Messages
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # templates bring their own

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.no_op,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "reasoning_effort": (),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
    }

    def check(self) -> None:
        self.check_stream_options()
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise RequestError(
                "max_tokens is the old name of max_completion_tokens; send one of them", param="max_tokens"
            )
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
            if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
                raise RequestError(f"top_logprobs must be from 0 to {MAX_LOGPROBS}", param="top_logprobs")

    def flat_messages(self) -> list[dict[str, Any]]:
        return [message.flat(i) for i, message in enumerate(self.messages)]


def chat_completion(
    request_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def chat_chunk(
    request_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
) -> dict[str, Any]:
    chunk = chat_completion(request_id, created, model, choices, usage)
    return chunk | {"object": "chat.completion.chunk"}


def message_choice(
    index: int,
    content: str,
    *,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: str | int | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def delta_choice(
    index: int,
    delta: dict[str, Any],
    *,
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
