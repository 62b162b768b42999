"""GET /v1/models: the objects."""

from __future__ import annotations

from typing import Any


def model_card(model_id: str, created: int, root: str, max_model_len: int) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "memlane",
        "root": root,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }
