"""GET /v1/models: the objects."""

from __future__ import annotations

from typing import Any


def model_card(model_id: str, created: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": created,
        "owned_by": "memlane",
        "root": model_id,  # vLLM tells its path on disk; that is nobody's business
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }
