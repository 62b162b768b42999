"""From the bytes of a body to a checked request object, or one clear refusal of bounded size."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import orjson
import pydantic

from memlane.errors import RequestError
from memlane_server.protocol.errors import HttpRefusal

MAX_SHOWN_ERRORS = 3


class RequestBody(pydantic.BaseModel):
    """Base of all bodies. JSON types are taken as they are: "1" is no number, 1 is no boolean.

    `no_op` lists fields of the OpenAI API and of vLLM that are not supported here, with the values that
    change nothing; any other value is refused by name. `ignored` fields describe the caller and never
    change an answer. All further fields are unknown and refused.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()


BodyT = TypeVar("BodyT", bound=RequestBody)


def parse(kind: type[BodyT], content_type: str | None, body: bytes) -> BodyT:
    """Raises RequestError or HttpRefusal; the message says what to change."""
    if (content_type or "").split(";")[0].strip().lower() != "application/json":
        got = f"got {content_type!r}" if content_type else "there is none"
        raise HttpRefusal("unsupported_media_type", f"Content-Type must be application/json; {got}")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(value)}")
    try:
        return kind.model_validate(_known_fields(kind, value))
    except pydantic.ValidationError as error:
        raise _refusal(error) from error


def _known_fields(kind: type[RequestBody], value: dict[str, Any]) -> dict[str, Any]:
    """The supported fields of a body. Checked before pydantic, so that a million unknown ones cost nothing."""
    known = {}
    for name, given in value.items():
        if name in kind.model_fields:
            known[name] = given
        elif name in kind.no_op:
            if given is not None and not _among(given, kind.no_op[name]):
                raise RequestError(f"{name} is not supported by this server; leave it out", param=name)
        elif name not in kind.ignored:
            close = difflib.get_close_matches(name[:64], list(kind.model_fields), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RequestError(f"unknown field {name[:64]!r}{hint}", param=name[:64])
    return known


def _among(given: Any, values: tuple[Any, ...]) -> bool:
    """Equality that keeps 1 and true apart."""
    return any(type(given) is type(v) and given == v for v in values)


def _refusal(error: pydantic.ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for one in found[:MAX_SHOWN_ERRORS]:
        where = ".".join(str(part) for part in one["loc"])[:200]
        lines.append(f"{where}: {one['msg'][:300]}" if where else one["msg"][:300])
    if len(found) > MAX_SHOWN_ERRORS:
        lines.append(f"and {len(found) - MAX_SHOWN_ERRORS} more")
    first = found[0]["loc"]
    return RequestError("; ".join(lines), param=str(first[0]) if first else None)


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
