"""The closed list of ways memlane refuses or fails.

Every error that can end a request has an `ErrorKind`; the HTTP side maps kinds to status codes in one
table and never looks at exception classes. This module imports nothing, so that every process can use it.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorKind(StrEnum):
    """Why a request was refused or failed. Values travel over the wire and appear in metrics labels."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH = "context_length_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"
    ENGINE_DIED = "engine_died"
    ROWS_UNREADABLE = "rows_unreadable"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class MemlaneError(Exception):
    """Base of all errors raised on purpose. `str(error)` is fit to be shown to a user."""

    kind = ErrorKind.INTERNAL


class ConfigError(MemlaneError):
    """An option has a value that cannot work, or two options contradict each other."""


class CheckpointError(MemlaneError):
    """A model file is missing, truncated, corrupt or of an unsupported form."""

    def __init__(self, path: object, defect: str) -> None:
        super().__init__(f"{path}: {defect}")
        self.path = str(path)
        self.defect = defect


class RequestError(MemlaneError):
    """A request that cannot be served as asked. `param` names the offending field, if there is one."""

    kind = ErrorKind.INVALID_REQUEST

    def __init__(self, message: str, *, param: str | None = None, kind: ErrorKind | None = None) -> None:
        super().__init__(message)
        self.param = param
        if kind is not None:
            self.kind = kind


class EngineDiedError(MemlaneError):
    """The engine process ended, or stopped answering, while a request was in flight."""

    kind = ErrorKind.ENGINE_DIED
