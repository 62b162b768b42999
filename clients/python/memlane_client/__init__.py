"""Python client of memlane servers: `MemlaneClient` and `AsyncMemlaneClient` over one core."""

from __future__ import annotations

from memlane_client.aio import AsyncMemlaneClient
from memlane_client.client import MemlaneClient
from memlane_client.errors import (
    ApiError,
    AuthenticationFailed,
    BadRequest,
    ConnectionFailed,
    MemlaneError,
    NotFound,
    Overloaded,
    ServerFailed,
    Unavailable,
)
from memlane_client.types import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    Model,
    Tokens,
    Usage,
)

__all__ = [
    "ApiError",
    "AsyncMemlaneClient",
    "AuthenticationFailed",
    "BadRequest",
    "ChatAnswer",
    "ChatChunk",
    "CompletionAnswer",
    "CompletionChunk",
    "ConnectionFailed",
    "MemlaneClient",
    "MemlaneError",
    "Model",
    "NotFound",
    "Overloaded",
    "ServerFailed",
    "Tokens",
    "Unavailable",
    "Usage",
]
