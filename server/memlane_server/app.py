"""The ASGI application: routes, errors and what lies around them."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from memlane import __version__
from memlane.errors import MemlaneError
from memlane_server import openapi
from memlane_server.context import Context, json_response
from memlane_server.middleware import ApiKey, HttpMetrics, RequestId
from memlane_server.protocol.errors import INTERNAL, HttpRefusal, answer
from memlane_server.routes import chat, completions, models, operations, tokenize
from memlane_server.streaming import ClientGone

log = logging.getLogger(__name__)


def make_app(here: Context) -> FastAPI:
    """One server's application. The interactive pages are off: they load scripts from other hosts."""
    app = FastAPI(title="memlane", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = here
    for module in (completions, chat, models, tokenize, operations):
        app.include_router(module.router)
    app.add_exception_handler(MemlaneError, _refused)
    app.add_exception_handler(HTTPException, _unknown_route)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _failed)
    # The last added is the outermost.
    app.add_middleware(ApiKey, key=here.config.api_key)
    app.add_middleware(HttpMetrics, registry=here.metrics.registry)
    app.add_middleware(RequestId)
    openapi.describe(app)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, MemlaneError)
    answered = answer(error)
    return json_response(answered.body, answered.status, answered.headers)


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 405:
        refusal = HttpRefusal("method_not_allowed", f"{path} does not take {request.method[:20]}")
    elif error.status_code == 404:
        refusal = HttpRefusal("not_found", f"there is no {path} here")
    else:
        raise error
    answered = answer(refusal)
    headers: dict[str, Any] = dict(error.headers or {}) | answered.headers
    return json_response(answered.body, answered.status, headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted


async def _failed(request: Request, error: Exception) -> Response:
    """A defect of ours: logged by the server with its traceback, told to the client without."""
    return json_response(INTERNAL.body, INTERNAL.status)
