"""The exact bytes that each token of a `tokenizer.json` stands for.

Text is put together from bytes, because one character may be spread over several tokens. Two families of
decoders exist among language models: byte-level ones, where every character of a token names one byte, and
sentencepiece-like ones, where a token is text with a marker for the space, or `<0x0A>` for a single byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoder(ValueError):
    """The tokeniser joins its tokens in a way that bytes of single tokens cannot express."""


def byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class PieceDecoder:
    """Maps the spelling of a vocabulary entry to its bytes, following a tokenizer.json's `decoder`.

    `strip_start` is how many leading spaces a whole text loses (the one that the encoder put in front).
    """

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        self.strip_start = 0
        self._alphabet: dict[str, int] | None = None
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        if decoder is None:
            raise UnsupportedDecoder("it has no decoder")
        for step in _flatten(decoder):
            self._add_step(step)

    def _add_step(self, step: Mapping[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._alphabet = byte_alphabet()
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                self.strip_start = start
            case {"type": "Metaspace", "replacement": str(marker)}:
                self._replacements.append((marker, " "))
                self.strip_start = 0 if step.get("prepend_scheme") == "never" else 1
            case _:
                raise UnsupportedDecoder(f"its decoder step {step.get('type')!r} is not supported")

    def decode(self, piece: str) -> bytes:
        """Bytes of one ordinary (not added) vocabulary entry."""
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[c] for c in piece)
            except KeyError:
                return piece.encode()
        if self._byte_fallback and (hexadecimal := _HEX_BYTE.fullmatch(piece)):
            return bytes([int(hexadecimal.group(1), 16)])
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()


def _flatten(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]
