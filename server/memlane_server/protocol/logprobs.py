"""Log-probabilities in the two shapes that the API has for them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from memlane.request import TokenLogprobs
from memlane.text import Tokenizer

# JSON has no infinity; this is what OpenAI sends for "impossible".
IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer | None, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`choices[].logprobs` of chat: per token its text, its bytes, and the best alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = _bytes(tokenizer, token_id)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, IMPOSSIBLE), "bytes": list(data)}

    content = [
        entry(t.token_id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[].logprobs` of completions; text offsets (in characters) run on from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer | None, *, offset: int, skip_special_tokens: bool) -> None:
        """`offset`: characters of the answer before its first token, as with echo."""
        self._tokenizer = tokenizer
        self._offset = offset
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += self._shown(token.token_id)
        return {
            "tokens": [_spelling(self._tokenizer, t.token_id) for t in tokens],
            "token_logprobs": [max(t.logprob, IMPOSSIBLE) for t in tokens],
            "top_logprobs": [
                {
                    _spelling(self._tokenizer, i): max(p, IMPOSSIBLE)
                    for i, p in [*t.top, (t.token_id, t.logprob)]
                }
                for t in tokens
            ],
            "text_offset": offsets,
        }

    def _shown(self, token_id: int) -> int:
        """How many characters the text grows by with this token."""
        if self._tokenizer is None or (self._skip_special and self._tokenizer.is_special(token_id)):
            return 0
        return len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))


def _bytes(tokenizer: Tokenizer | None, token_id: int) -> bytes:
    return b"" if tokenizer is None else tokenizer.token_bytes(token_id)


def _spelling(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token as text; `bytes:\\xe2` when it is part of a character, so that different tokens stay different."""
    data = _bytes(tokenizer, token_id)
    try:
        return data.decode() or f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)
