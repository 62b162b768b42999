"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from memlane_server.context import context, json_response
from memlane_server.model import ServedModel
from memlane_server.protocol.models import model_card

router = APIRouter()


def _card(model: ServedModel) -> dict[str, Any]:
    return model_card(model.name, model.created, model.max_model_len)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response({"object": "list", "data": [_card(context(request).need_model())]})


@router.get("/v1/models/{model_id:path}")
async def model_by_id(request: Request, model_id: str) -> Response:
    """The model by its name."""
    model = context(request).need_model()
    model.check_name(model_id)
    return json_response(_card(model))
