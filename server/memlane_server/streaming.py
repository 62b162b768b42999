"""Server-sent events, and what happens when the client goes away.

Starlette's own helpers either poll (`is_disconnected`, which breaks behind middleware) or notice a lost
client only when the next token is sent. Here every wait is raced against `http.disconnect`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from memlane.errors import MemlaneError
from memlane_server.protocol.errors import INTERNAL, answer

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


def frame(value: dict[str, Any]) -> bytes:
    """One event. JSON holds no raw line breaks, so one `data:` line is enough."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; if the client leaves first, `work` is cancelled and ClientGone is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, gone)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def stream(request: Request, frames: AsyncGenerator[bytes, None]) -> EventStream:
    """The response that streams `frames`. What goes wrong before the first of them is still an HTTP status."""
    return EventStream(await unless_gone(request, anext(frames)), frames)


class EventStream(Response):
    """Sends `first` and then `frames`, and `[DONE]` at the end, also after an error.

    `frames` is closed when the client leaves, which cancels the request behind it.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(writer, gone)
            await self._frames.aclose()

    async def _write(self, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await body(self._first)
            async for data in self._frames:
                await body(data)
        except MemlaneError as error:
            await body(frame(answer(error).body))
        except Exception:
            log.exception("a stream failed")
            await body(frame(INTERNAL.body))
        await body(DONE, more=False)
