"""Around every exchange: a request id, the API key, and HTTP metrics. Plain ASGI, so that streams stay streams."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memlane_server import buckets
from memlane_server.context import json_response
from memlane_server.protocol.errors import HttpRefusal, answer

# Probes of orchestrators carry no keys and say nothing about the model.
OPEN: Final = frozenset({"/health", "/ready"})
# Scrapes and probes would drown what people ask for.
UNMEASURED: Final = frozenset({"/health", "/ready", "/metrics"})

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Every answer carries X-Request-Id: the client's own, if it sent a sensible one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


class ApiKey:
    """Refuses everything but probes without the right bearer token.

    Digests are compared, in constant time: neither the key nor its length can be learned from the answer.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._digest = None if key is None else _digest(key.strip().encode("utf-8", "surrogateescape"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._digest is None or scope["path"] in OPEN or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = HttpRefusal(
            "invalid_api_key", "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
        )
        refused = answer(refusal)
        await json_response(refused.body, refused.status, refused.headers)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        assert self._digest is not None
        sent = _digest(token.strip().encode("latin-1"))  # as ASGI servers decode headers
        return hmac.compare_digest(sent, self._digest) and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HttpMetrics:
    """Counts exchanges by route, method and class of status, under the names of the usual instrumentation."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ("handler", "method")
        self._requests = Counter(
            "http_requests", "Exchanges by class of status.", (*labels, "status"), registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Until the answer was complete.",
            labels,
            buckets=buckets.HTTP_SECONDS,
            registry=registry,
        )
        self._finely = Histogram(
            "http_request_duration_highr_seconds",
            "The same over all routes, finely.",
            buckets=buckets.FIRST_TOKEN,
            registry=registry,
        )
        self._in = Summary("http_request_size_bytes", "Bytes of bodies received.", labels, registry=registry)
        self._out = Summary("http_response_size_bytes", "Bytes of bodies sent.", labels, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNMEASURED:
            await self._app(scope, receive, send)
            return
        begun, status, received, sent = time.perf_counter(), 499, 0, 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counting_receive, counting_send)
        finally:
            # Only known routes and methods become labels: a scanner must not fill the memory.
            handler = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
            seconds = time.perf_counter() - begun
            self._requests.labels(handler, method, f"{status // 100}xx").inc()
            self._seconds.labels(handler, method).observe(seconds)
            self._finely.observe(seconds)
            self._in.labels(handler, method).observe(received)
            self._out.labels(handler, method).observe(sent)
