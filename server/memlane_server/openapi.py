"""The OpenAPI document. Bodies are read by hand (see protocol/parsing.py), so their schemas are added here."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from memlane_server.protocol.chat import ChatRequest
from memlane_server.protocol.completions import CompletionRequest
from memlane_server.protocol.parsing import RequestBody
from memlane_server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

BODIES: Final[dict[str, type[RequestBody]]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` tell the whole truth about request bodies and errors."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Error" in schemas:
            return document
        _, defined = models_json_schema(
            [(body, "validation") for body in BODIES.values()],
            ref_template="#/components/schemas/{model}",
        )
        schemas.clear()
        schemas.update(defined["$defs"], Error=ERROR)
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = {"description": "An error.", "content": error}
                if path in BODIES:
                    schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
                    operation["requestBody"] = {
                        "required": True,
                        "content": {"application/json": {"schema": schema}},
                    }
        return document

    app.openapi = complete  # type: ignore[method-assign]
