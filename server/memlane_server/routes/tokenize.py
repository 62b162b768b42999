"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from memlane.errors import RequestError
from memlane_server.context import context, json_response, read
from memlane_server.prepare import render_messages, tokenize_text
from memlane_server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation as the model's template lays it out."""
    body = await read(request, TokenizeRequest)
    model = context(request).need_model()
    model.check_name(body.model)
    body.check()
    tokenizer = model.need_tokenizer("prompt")
    if body.messages is None:
        text, special = body.prompt or "", body.add_special_tokens is not False
    else:
        flat = [message.flat(i) for i, message in enumerate(body.messages)]
        text, special = (
            render_messages(model, flat, body.add_generation_prompt),
            bool(body.add_special_tokens),
        )
    ids = await tokenize_text(tokenizer, text, special)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
    answer["token_strs"] = tokenizer.token_strings(ids) if body.return_token_strs else None
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text that token ids stand for."""
    body = await read(request, DetokenizeRequest)
    model = context(request).need_model()
    model.check_name(body.model)
    tokenizer = model.need_tokenizer("tokens")
    for token_id in body.tokens:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside the vocabulary of {model.vocab_size}", param="tokens"
            )
    return json_response({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})
