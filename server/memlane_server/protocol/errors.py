"""Every error that a client can get: one table from kinds to HTTP, one envelope, OpenAI's.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from memlane.errors import ErrorKind, MemlaneError, RequestError

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"


@dataclass(frozen=True)
class HttpMeaning:
    """How one kind of error looks from outside. `retry_after` is in seconds; None: retrying will not help."""

    status: int
    type: str
    retry_after: int | None = None


KINDS: Final[dict[ErrorKind, HttpMeaning]] = {
    ErrorKind.INVALID_REQUEST: HttpMeaning(400, INVALID),
    ErrorKind.CONTEXT_LENGTH: HttpMeaning(400, INVALID),
    ErrorKind.MODEL_NOT_FOUND: HttpMeaning(404, INVALID),
    ErrorKind.OVERLOADED: HttpMeaning(429, "rate_limit_error", retry_after=1),
    ErrorKind.NOT_READY: HttpMeaning(503, SERVER, retry_after=2),
    ErrorKind.ENGINE_DIED: HttpMeaning(503, SERVER, retry_after=2),
    ErrorKind.ROWS_UNREADABLE: HttpMeaning(500, SERVER),
    ErrorKind.CANCELLED: HttpMeaning(499, SERVER),
    ErrorKind.INTERNAL: HttpMeaning(500, SERVER),
}

# Refusals that arise before a request has a meaning: (status, type) by code.
HTTP_CODES: Final[dict[str, tuple[int, str]]] = {
    "invalid_api_key": (401, INVALID),
    "not_found": (404, INVALID),
    "method_not_allowed": (405, INVALID),
    "request_too_large": (413, INVALID),
    "unsupported_media_type": (415, INVALID),
}

# A message quotes the request; a hostile one must not come back tenfold.
MAX_MESSAGE: Final = 2000


class HttpRefusal(MemlaneError):
    """A refusal of the HTTP layer itself; `code` is a key of HTTP_CODES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ErrorAnswer:
    """An error, ready to be sent as a response or as a frame of a stream."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def answer(error: MemlaneError) -> ErrorAnswer:
    """The one place where an error becomes HTTP."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpRefusal):
        status, type_ = HTTP_CODES[error.code]
        code = error.code
        if status == 401:
            headers["www-authenticate"] = "Bearer"
    else:
        meaning = KINDS[error.kind]
        status, type_, code = meaning.status, meaning.type, error.kind.value
        if meaning.retry_after is not None:
            headers["retry-after"] = str(meaning.retry_after)
    param = error.param if isinstance(error, RequestError) else None
    return ErrorAnswer(status, envelope(str(error), type_, code, param), headers)


def envelope(message: str, type_: str, code: str, param: str | None = None) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    # Text of the request may hold lone surrogates that arrived by way of a header; JSON cannot carry them.
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


INTERNAL = ErrorAnswer(
    500, envelope("internal error; the server's log says more", SERVER, ErrorKind.INTERNAL), {}
)
