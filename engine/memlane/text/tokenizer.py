"""A model's tokeniser, read from Hugging Face files, without transformers (and so without torch)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from memlane.errors import CheckpointError, RequestError
from memlane.text.pieces import PieceDecoder, UnsupportedDecoder


class Tokenizer:
    """Encodes text to token ids and decodes them back. Immutable; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """`config` is the content of tokenizer_config.json. Raises UnsupportedDecoder, a ValueError."""
        config = config or {}
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._pieces = PieceDecoder(json.loads(backend.to_str())["decoder"])
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._bytes = self._vocabulary({i: token.content for i, token in added.items()})
        self.vocab_size = len(self._bytes)
        self.longest_token = max(map(len, self._bytes), default=0)  # in bytes
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.chat_template = _default_template(config.get("chat_template"))

    def _vocabulary(self, added: dict[int, str]) -> list[bytes]:
        entries = self._backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(entries.values(), default=-1) + 1)
        for piece, token_id in entries.items():
            table[token_id] = added[token_id].encode() if token_id in added else self._pieces.decode(piece)
        return table

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, given as a file or by its directory, and what lies beside it.

        Beside it may be tokenizer_config.json and chat_template.jinja. Raises CheckpointError.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(file, "no such file")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:
            raise CheckpointError(file, f"not a usable tokenizer.json: {error}") from error
        config_file = file.parent / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.is_file() else {}
        template_file = file.parent / "chat_template.jinja"
        if template_file.is_file():
            config["chat_template"] = template_file.read_text(encoding="utf-8")
        try:
            return cls(backend, config)
        except UnsupportedDecoder as error:
            raise CheckpointError(file, str(error)) from error

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    def token_id(self, token: str) -> int | None:
        """Id of a vocabulary entry, as it is spelled in tokenizer.json."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens spelled out in it become their ids, as chat templates need.

        Raises RequestError on text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError("the text holds a lone surrogate, which no UTF-8 text can") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole token sequence; bytes that are no UTF-8 become U+FFFD."""
        joined = b"".join(
            self.token_bytes(i) for i in token_ids if not (skip_special_tokens and i in self._special)
        )
        strip = self._pieces.strip_start
        while strip and joined.startswith(b" "):
            joined, strip = joined[1:], strip - 1
        return joined.decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; empty for ids that the vocabulary does not name."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as text on its own; incomplete characters show as U+FFFD."""
        return [self.token_bytes(i).decode("utf-8", errors="replace") for i in token_ids]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, "not a JSON object")
    return value


def _token_text(entry: Any) -> str | None:
    """bos/eos in tokenizer_config.json: a string, or an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _default_template(entry: Any) -> str | None:
    """chat_template in tokenizer_config.json: a string, or a list of named ones."""
    if isinstance(entry, list):
        named = {t.get("name"): t.get("template") for t in entry if isinstance(t, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None
