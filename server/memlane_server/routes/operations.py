"""For operators and their tools: /health, /ready, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from memlane import __version__
from memlane.errors import ErrorKind, RequestError
from memlane_server.context import context, json_response
from memlane_server.engine_client import State

router = APIRouter()


@router.get("/health")
async def health() -> Response:
    """Liveness: this process answers. A dead engine is restarted by us, not by restarting us."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Readiness: requests sent now will be taken."""
    client = context(request).client
    if client.state is not State.READY:
        raise RequestError(f"the server is {client.state}: {client.reason}", kind=ErrorKind.NOT_READY)
    return json_response({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """The version of memlane."""
    return json_response({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus exposition."""
    return Response(context(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
