"""What can go wrong, as exception classes. They mirror the server's error table."""

from __future__ import annotations

from typing import Any


class MemlaneError(Exception):
    """Base of all errors of this package."""


class ConnectionFailed(MemlaneError):
    """The server could not be reached, or the connection broke before the answer was complete."""


class ApiError(MemlaneError):
    """The server's own words. `retry_after`: seconds after which it asks to be tried again, if it says so."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


class BadRequest(ApiError):
    """The request cannot be served as asked; `param` names the field to change."""


class AuthenticationFailed(ApiError):
    """The API key is missing or wrong."""


class NotFound(ApiError):
    """No such model, or no such endpoint."""


class Overloaded(ApiError):
    """Too many requests at once; try again after `retry_after` seconds."""


class Unavailable(ApiError):
    """The server is starting, shutting down, or has lost its engine."""


class ServerFailed(ApiError):
    """The request failed inside the server."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: AuthenticationFailed,
    404: NotFound,
    429: Overloaded,
    503: Unavailable,
}

# Errors inside a stream carry no status: their code says what they are.
_STATUS_OF_CODE = {"not_ready": 503, "engine_died": 503, "overloaded": 429}


def from_body(body: Any, status: int | None, retry_after: str | None = None) -> ApiError:
    """The error that an answer of the server describes. `status` is None for an error inside a stream."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    code = error.get("code")
    if status is None:
        status = _STATUS_OF_CODE.get(str(code), 500)
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else BadRequest)
    wait = float(retry_after) if retry_after and retry_after.isdigit() else None
    message = str(error.get("message") or f"the server answered with status {status}")
    return kind(message, status=status, code=code, param=error.get("param"), retry_after=wait)
