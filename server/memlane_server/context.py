"""What the routes work with: one object per server, put into the app when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from memlane import ipc
from memlane.config import EngineConfig, ServerConfig
from memlane.errors import ErrorKind, RequestError
from memlane_server import model
from memlane_server.engine_client import EngineClient
from memlane_server.metrics import Metrics
from memlane_server.model import ServedModel
from memlane_server.protocol.errors import HttpRefusal
from memlane_server.protocol.parsing import BodyT, parse
from memlane_server.streaming import ClientGone


@dataclass
class Context:
    """The server's parts. `model` is None until the engine has loaded it."""

    engine_config: EngineConfig
    config: ServerConfig
    metrics: Metrics
    model: ServedModel | None = None
    ready: ipc.Ready | None = None
    client: EngineClient = field(init=False)

    def model_loaded(self, ready: ipc.Ready) -> None:
        """Called with each new engine; the same directory is not read twice."""
        if self.model is None or self.ready is None or self.ready.model_directory != ready.model_directory:
            self.model = model.load(self.engine_config, self.config, ready)
        self.ready = ready

    def need_model(self) -> ServedModel:
        if self.model is None:
            raise RequestError(
                f"the server is {self.client.state}: {self.client.reason}", kind=ErrorKind.NOT_READY
            )
        return self.model


def context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


async def read(request: Request, kind: type[BodyT]) -> BodyT:
    """The checked body of a request. Raises RequestError or HttpRefusal."""
    body = await _bytes(request, context(request).config.max_body_bytes)
    return parse(kind, request.headers.get("content-type"), body)


async def _bytes(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > 8 * limit:
                break
            # Else read on and forget: most clients send everything before they look for an answer.
    except ClientDisconnect:
        raise ClientGone from None
    if size > limit:
        raise HttpRefusal("request_too_large", f"the body is larger than {limit} bytes, the limit here")
    return b"".join(parts)
