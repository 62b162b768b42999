"""POST /tokenize and /detokenize: the requests."""

from __future__ import annotations

from memlane.errors import RequestError
from memlane_server.protocol.chat import Messages
from memlane_server.protocol.parsing import RequestBody
from memlane_server.protocol.sampling import TokenIds


class TokenizeRequest(RequestBody):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", param="prompt")


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: TokenIds
